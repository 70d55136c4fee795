"""Makes a notebook of the course run where somebody else has set up Python, such as on Colab.

A service like that opens a notebook by itself: no file of the repository is beside it, its folder is another one, and
each notebook has a machine of its own. So in a new cell above the first, with this repository's address:

    !git clone --depth 1 ADDRESS dsa-course
    %run dsa-course/notebooks/course/colab.py

What is installed there stays, whatever its version: PyTorch with CUDA takes minutes to fetch again, and the service's
own page needs its IPython and ipywidgets. Only what is missing is added, by the pins of requirements.txt. The package
`dsa` and the chapters' own `course` are not installed but found, here and in processes that a notebook starts. (The
clone has another name than `course`, which Python would otherwise take for that package.)
"""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "numpy", "matplotlib", "pillow", "ipython", "ipywidgets", "safetensors", "tqdm")


def pins(requirements: str) -> dict[str, str]:
    """Which version of which package is asked for: {"torch": "2.13.0", ...}."""
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", requirements, re.MULTILINE))


def installed(name: str) -> str:
    """The version of a package, or "" if it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def start(root: Path) -> str:
    """Add what is missing, let `dsa` and `course` be found, go to the notebooks' folder; say so to the reader."""
    wanted = pins((root / "requirements.txt").read_text("utf-8"))
    if missing := [f"{name}=={wanted[name]}" for name in NEEDED if not installed(name)]:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
    ours = [str(root), str(root / "notebooks")]
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*ours, *known]))
    sys.path[:] = dict.fromkeys([*ours, *sys.path])
    os.chdir(root / "notebooks")
    other = [f"{name} {installed(name)} ({wanted[name]})" for name in NEEDED if not _is(installed(name), wanted[name])]
    added = f"Added {', '.join(missing)}. " if missing else ""
    told = f" Not the versions it was tested with, which are in brackets: {', '.join(other)}." if other else ""
    return f"{added}Ready: run the cells of the notebook.{told}"


def _is(found: str, wanted: str) -> bool:
    """Whether a version is the one wanted, of whatever build: 2.13.0+cu130 is 2.13.0."""
    return found.split("+")[0] == wanted


if __name__ == "__main__":
    print(start(ROOT))
