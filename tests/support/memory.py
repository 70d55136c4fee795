"""How much memory a call needs, as the operating system counts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RESIDENT = """
from pathlib import Path
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
"""


def peak_of_script(before: str, script: str, *arguments: object) -> int:
    """Most memory that a fresh process held during `script`, beyond what it held after `before`, files mapped included.

    Both are Python source; `arguments` are its `sys.argv[1:]`. Only Linux tells.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc, which only Linux has")
    source = f'{RESIDENT}\n{before}\nstart = resident("VmRSS")\n{script}\nprint(resident("VmHWM") - start)'
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", source, *map(str, arguments)]
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout)
