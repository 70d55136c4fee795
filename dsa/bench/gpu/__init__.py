"""Our kernels on a real GPU, checked and timed: `python -m dsa.bench.gpu`; read `correctness`, then `cases`."""
