"""A notebook over its time budget fails the run, even when every cell was right."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
from builder.manners import BUDGETS, seconds

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@pytest.fixture
def budgets():
    spec = spec_from_file_location("notebooks_conftest", NOTEBOOKS / "conftest.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Budgets()


def ran(budgets, name, *durations):
    for cell, duration in enumerate(durations):
        report = SimpleNamespace(nodeid=f"notebooks/{name}.ipynb::Cell {cell}", duration=duration)
        budgets.pytest_runtest_logreport(report)


def finished(budgets):
    session = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    budgets.pytest_sessionfinish(session)
    return session.exitstatus


def test_all_cells_of_a_notebook_count(budgets):
    ran(budgets, "99_other", 30, 20, 15)
    assert budgets.over() == ["99_other took 65 s; its budget is 60 s (notebooks/builder/manners.py)"]
    assert finished(budgets) == pytest.ExitCode.TESTS_FAILED


def test_each_notebook_has_its_own_budget(budgets):
    ran(budgets, "98_other", 30, 20)
    ran(budgets, "99_other", 30, 20)
    assert budgets.over() == []
    assert finished(budgets) == pytest.ExitCode.OK


def test_budgets_are_for_notebooks_that_exist():
    assert {path.stem for path in (NOTEBOOKS / "src").glob("*.py")} >= set(BUDGETS)
    assert all(0 < seconds(name) <= 150 for name in BUDGETS)
