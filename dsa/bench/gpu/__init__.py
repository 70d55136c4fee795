"""Our kernels on a real GPU, checked and timed: read `timing`, then `cases`; run `python -m dsa.bench.gpu --help`."""
