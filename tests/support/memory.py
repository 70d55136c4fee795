"""How much memory a call needs, from the allocator's own record, or from the operating system's."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Most memory that the allocator handed out at one time during `call`, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    del kept
    return int(changes.cumsum(0).max())


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
