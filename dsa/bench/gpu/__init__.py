"""Our kernels on a real GPU, checked and timed: `dsa bench gpu`; read `correctness`, then `cases`."""
