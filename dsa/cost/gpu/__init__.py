"""Our kernels on a real GPU, checked and timed: read `timing`, then `cases`; `python -m dsa.cost.gpu --help` runs it."""
