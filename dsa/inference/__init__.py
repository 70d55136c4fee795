"""Running a trained model, and its files."""
