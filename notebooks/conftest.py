"""Time budgets: a notebook that takes longer than its budget fails the run, with a line that says so."""

from collections import Counter
from pathlib import Path

import pytest
from builder.manners import seconds


class Budgets:
    """Adds up the time of each notebook's cells; under pytest-xdist in the process that collects the reports."""

    def __init__(self) -> None:
        self.spent = Counter[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one phase of one cell; the first includes the start of the kernel."""
        self.spent[Path(report.nodeid.split("::")[0]).stem] += report.duration

    def over(self) -> list[str]:
        """A line for each notebook over its budget."""
        return [
            f"{name} took {spent:.0f} s; its budget is {seconds(name)} s (notebooks/builder/manners.py)"
            for name, spent in sorted(self.spent.items())
            if spent > seconds(name)
        ]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a run that is over budget."""
        if self.over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say how long each notebook took, and which took too long."""
        for name, spent in sorted(self.spent.items()):
            terminalreporter.write_line(f"{name}: {spent:.0f} of {seconds(name)} s")
        for line in self.over():
            terminalreporter.write_line(f"FAILED {line}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    """Watch the run, once."""
    if config.getoption("nbval", default=False) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budgets())
