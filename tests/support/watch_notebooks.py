"""What a run of the notebooks must keep besides their outputs: its time, and the files that were there.

A notebook that takes longer than its budget fails the run with a line that says so.
On a machine that is busy besides, everything takes longer: what counts is the clock's time or the processor's,
whichever is less.

So does a run that leaves a file of the project changed, added or removed. As notebooks share nothing but files, and
each starts a kernel of its own, none of them can then depend on which others ran before.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from course.builder.lint import time_budget
from processor import processor_seconds
from project import ROOT

PROCESSOR = "processor seconds"
PASSING = (
    "__pycache__",
    "build",
    "book",
    "dsa.egg-info",
)  # Python's, pip's and `make book`'s, as what begins with a dot


class Processor:
    """Notes on every report what the kernel has had of the processor, in the process that runs the cell."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        """Note it once more when a phase of a cell has ended."""
        report = yield
        report.user_properties.append((PROCESSOR, processor_seconds()))
        return report


class Budgets:
    """Adds up the time of each notebook's cells; under pytest-xdist in the process that collects the reports."""

    def __init__(self) -> None:
        self.clock, self.processor = Counter[Path](), Counter[Path]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one phase of one cell; the first includes the start of the kernel."""
        path = Path(report.nodeid.split("::")[0])
        self.clock[path] += report.duration
        self.processor[path] = max(self.processor[path], dict(report.user_properties).get(PROCESSOR, 0.0))

    @property
    def spent(self) -> dict[Path, float]:
        """Seconds of each notebook."""
        return {path: min(clock, self.processor[path] or clock) for path, clock in self.clock.items()}

    def over(self) -> list[str]:
        """A line for each notebook over its budget."""
        return [
            f"{path} took {spent:.0f} s; its budget is {time_budget(path.stem)} s (course/builder/lint.py)"
            for path, spent in sorted(self.spent.items())
            if spent > time_budget(path.stem)
        ]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a run that is over budget."""
        if self.over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say how long each notebook took, and which took too long."""
        for path, spent in sorted(self.spent.items()):
            terminalreporter.write_line(f"{path}: {spent:.0f} of {time_budget(path.stem)} s")
        for line in self.over():
            terminalreporter.write_line(f"FAILED {line}", red=True)


class Files:
    """Compares the files under a folder at the end of a run with those at its beginning."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before = self.now()

    def now(self) -> dict[Path, tuple[int, int]]:
        """Size and time of every file that counts."""
        return {path.relative_to(self.root): (path.stat().st_size, path.stat().st_mtime_ns) for path in self._walk()}

    def _walk(self) -> Iterator[Path]:
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".") and name not in PASSING]
            yield from (Path(folder) / name for name in files if not name.startswith("."))

    def changes(self) -> list[str]:
        """A line for each file that is not as it was."""
        now = self.now()
        touched = sorted(path for path in {*now, *self.before} if now.get(path) != self.before.get(path))
        return [f"{path} was written, or removed, while the notebooks ran" for path in touched]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a run that leaves the project changed."""
        if self.changes() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say which files changed."""
        for line in self.changes():
            terminalreporter.write_line(f"FAILED {line}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    """Watch the run: each cell where it runs, the whole once."""
    if not config.getoption("nbval", default=False):
        return
    config.pluginmanager.register(Processor())
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budgets())
        config.pluginmanager.register(Files(ROOT))
