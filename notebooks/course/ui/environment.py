"""What this machine offers the course, in one line: nothing is downloaded and nothing is needed beyond it."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch


def environment(data: str | Path = "../data") -> str:
    """Check the set-up and say what is available.

    Args:
        data: the course's data folder, from the notebook's point of view.

    Raises:
        ValueError: if the shipped models are not where they should be, with what to do.
    """
    models = sorted(path.parent.name for path in Path(data).glob("*/config.json"))
    if not models:
        raise ValueError(f"no models under {str(data)!r}: open this notebook from the course's notebooks/ folder")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU, and none is needed"
    return (
        f"Ready: Python {platform.python_version()}, torch {torch.__version__}, JupyterLab {version('jupyterlab')}, "
        f"{torch.get_num_threads()} thread(s), {gpu}; models: {', '.join(models)}; no network is used."
    )
