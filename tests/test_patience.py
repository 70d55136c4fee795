"""A busy machine does not bring the limit nearer, as it counts what is computed; neither work nor a hang evades it."""

import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from patience import patiently


@contextmanager
def running(code):
    """A process with this program, while the block runs."""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield process
        finally:
            process.kill()


def after(seconds):
    """A question that is answered with yes from then on."""
    then = time.monotonic() + seconds
    return lambda: time.monotonic() > then


def test_what_waits_for_the_processor_is_waited_for():
    with running("import time; time.sleep(60)"):
        patiently(after(2), "a page", seconds=1)


def test_work_has_a_limit():
    with running("while True: pass"), pytest.raises(AssertionError, match=r"a page: not after .* processor seconds"):
        patiently(after(60), "a page", seconds=0.5)


def test_a_hang_has_one_too():
    with running("import time; time.sleep(60)"), pytest.raises(AssertionError, match="a page: not after 1 s by the"):
        patiently(after(60), "a page", seconds=60, hangs=1)
