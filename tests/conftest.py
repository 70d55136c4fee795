"""What all tests share: one thread, so that times and rounding do not depend on load; no network; a small text."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import small
import torch

from dsa.text.corpus import own_text

torch.set_num_threads(1)

OFFLINE = str(Path(__file__).parent / "offline")  # its sitecustomize refuses every host but this one
if OFFLINE not in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # make test has it there, for notebooks too
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (OFFLINE, os.environ.get("PYTHONPATH"))))  # for children
    sys.modules.pop("sitecustomize", None)
    sys.path.insert(0, OFFLINE)
    import sitecustomize  # noqa: F401 - and for this process


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small corpus of one's own: `small.LINES`."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(small.LINES)
    return own_text(path)
