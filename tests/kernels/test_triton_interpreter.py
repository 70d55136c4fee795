"""Every Triton kernel gives the reference's numbers, forward and backward, as far as can be told without a GPU."""

import ast
import os
import subprocess
import sys

import pytest

from project import ROOT

pytest.importorskip("triton", reason="Triton is made for Linux only")

SCRIPT = ROOT / "tests/support/triton_cases.py"
CASES = [
    node.name
    for node in ast.parse(SCRIPT.read_text("utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.decorator_list
]
HALF = {"scores_in_fp16": 1e-6, "sparse_attention_in_fp16": 1e-3, "decode_from_an_fp8_cache": 1e-3}


@pytest.fixture(scope="module")
def errors():
    """What the script prints: {name: error}."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    made = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    return {name: float(error) for name, error in map(str.split, made.stdout.splitlines())}


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_the_references_numbers(name, errors):
    assert errors[name] <= HALF.get(name, 2e-6)  # NaN is not
