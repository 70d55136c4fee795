"""Runs everything that `dsa bench gpu` measures, tiny, in Triton's interpreter, with a clock that is none.

A script: kernels are interpreted in a whole process or not at all. `test_gpu` starts it, and it writes the record.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import sys
from pathlib import Path

import torch

from dsa.bench.gpu.__main__ import about
from dsa.bench.gpu.cases import case_groups
from dsa.bench.gpu.inputs import Inputs, Shape
from dsa.bench.gpu.suite import Record, run_group

TINY = Shape(
    heads=16, nope=16, rotary=16, value=16, latent=128, index_heads=16, index_width=32, top_k=16, prompt=8, chunk=8,
    lengths=(64, 128), indexer_batch=2, layer_batch=2, attention_batch=2, square=64,
)  # fmt: skip


def clock(calls):
    """The last call is made; it takes one millisecond the first time, two the second."""
    calls[-1]()
    return [1.0, 2.0]


if __name__ == "__main__":
    torch.manual_seed(0)
    out = Path(sys.argv[1])
    for cases in case_groups(TINY).values():
        run_group(cases, Inputs(torch.device("cpu"), torch.float16, sets=2), clock, Record(out, about(out)).keep)
