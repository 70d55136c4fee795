"""A clock that stands still while others have the processor: what limits in the tests are measured by.

Ten other processes on a machine make a notebook ten times as slow by the clock on the wall. What it has had of the
processor stays the same.
"""

from contextlib import suppress

import psutil


def processor_seconds() -> float:
    """What all that this process has started, and that still runs, has had of the processor since its start."""
    spent = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent += times.user + times.system + times.children_user + times.children_system
    return spent
