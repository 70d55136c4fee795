"""The command for a GPU: without one it says so in a sentence, and its checks see a wrong or unwritten number."""

import subprocess
import sys

import pytest
import torch

from dsa.cost.gpu import __main__ as gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_clear_sentence(tmp_path):
    with pytest.raises(SystemExit, match="PyTorch sees none"):
        gpu.main(["--out", str(tmp_path / "a.json")])
    assert not (tmp_path / "a.json").exists()


def test_nan_and_a_missing_mask_never_pass():
    right = torch.tensor([1.0, 2.0, -torch.inf])
    assert gpu.error(right, right) == 0
    for wrong in ([1.0, torch.nan, -torch.inf], [1.0, 2.0, 0.0], [1.0, -torch.inf, -torch.inf]):
        assert gpu.error(torch.tensor(wrong), right) == float("inf")
    assert gpu.error(torch.tensor([1.0, 2.5, -torch.inf]), right) == pytest.approx(0.5 / 5**0.5)


def test_the_checks_themselves_run_in_the_interpreter():
    pytest.importorskip("triton")
    program = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'; import torch; from dsa.cost.gpu import __main__ as gpu;"
        "found = gpu.errors(torch.device('cpu'), torch.float16, 60, 16); print(found);"
        "assert len(found) == 6 and all(e < 2e-3 for e in found.values())"
    )
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr[-2000:]
