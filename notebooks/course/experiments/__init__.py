"""What made the recorded results under data/measurements: `python -m course.experiments.NAME`."""
