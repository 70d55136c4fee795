"""`python -m dsa` is the console script `dsa`; under torchrun, `torchrun --nproc-per-node N -m dsa ...`."""

from dsa.cli import main

main()
