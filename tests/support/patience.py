"""Waiting with a limit that other work on the machine does not bring nearer.

What is limited is what server, kernels and browser compute meanwhile. On a busy machine they take longer and compute
no more, so a limit by the clock is only for what hangs, and far away.
"""

import time
from collections.abc import Callable

from processor import processor_seconds

HANGS = 900  # seconds by the clock after which what does not compute does not come either


def patiently(done: Callable[[], bool], what: str, seconds: float, hangs: float = HANGS) -> None:
    """Wait until `done`; fail, naming `what`, when processes started here have had `seconds` of the processor."""
    clock, processor = time.monotonic(), processor_seconds()
    while not done():
        if (spent := processor_seconds() - processor) > seconds:
            raise AssertionError(f"{what}: not after {spent:.1f} processor seconds, {seconds} are allowed")
        if (passed := time.monotonic() - clock) > hangs:
            raise AssertionError(f"{what}: not after {passed:.0f} s by the clock, with {spent:.1f} of the processor's")
        time.sleep(0.1)
