"""A notebook over its time budget fails the run, and so does a changed file, even when every cell was right."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
from builder.manners import BUDGETS, seconds

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@pytest.fixture
def conftest():
    spec = spec_from_file_location("notebooks_conftest", NOTEBOOKS / "conftest.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def budgets(conftest):
    return conftest.Budgets()


def ran(budgets, name, *durations, folder="notebooks"):
    for cell, duration in enumerate(durations):
        report = SimpleNamespace(nodeid=f"{folder}/{name}.ipynb::Cell {cell}", duration=duration)
        budgets.pytest_runtest_logreport(report)


def finished(watcher):
    session = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    watcher.pytest_sessionfinish(session)
    return session.exitstatus


def test_all_cells_of_a_notebook_count(budgets):
    ran(budgets, "99_other", 30, 20, 15)
    assert budgets.over() == ["notebooks/99_other.ipynb took 65 s; its budget is 60 s (notebooks/builder)"]
    assert finished(budgets) == pytest.ExitCode.TESTS_FAILED


def test_each_notebook_has_its_own_budget(budgets):
    ran(budgets, "98_other", 30, 20)
    ran(budgets, "99_other", 30, 20)
    assert budgets.over() == []
    assert finished(budgets) == pytest.ExitCode.OK


def test_a_route_has_a_budget_of_its_own_for_each_notebook(budgets):
    ran(budgets, "07_sparse_training", 20, 15, folder="route-2h")
    ran(budgets, "07_sparse_training", 20, 15)
    assert budgets.over() == ["route-2h/07_sparse_training.ipynb took 35 s; its budget is 30 s (notebooks/builder)"]


def test_budgets_are_for_notebooks_that_exist():
    assert {path.stem for path in (NOTEBOOKS / "src").glob("*.py")} >= set(BUDGETS)
    assert all(0 < seconds(name) <= 150 for name in BUDGETS)


def write(path):
    (path / "data" / "new.json").write_text("{}")


def overwrite(path):
    (path / "data" / "model.json").write_text("{} ")


def remove(path):
    (path / "data" / "model.json").unlink()


def cache(path):
    (path / "data" / "__pycache__").mkdir()
    (path / "data" / "__pycache__" / "x.pyc").write_text("")
    (path / ".hidden").write_text("")


@pytest.mark.parametrize(
    ("do", "named"), [(write, "data/new.json"), (overwrite, "data/model.json"), (remove, "data/model.json")]
)
def test_a_run_that_changes_files_fails(conftest, tmp_path, do, named):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "model.json").write_text("{}")
    files = conftest.Files(tmp_path)
    do(tmp_path)
    assert [line.split()[0] for line in files.changes()] == [named]
    assert finished(files) == pytest.ExitCode.TESTS_FAILED


def test_caches_may_come_and_go(conftest, tmp_path):
    (tmp_path / "data").mkdir()
    files = conftest.Files(tmp_path)
    cache(tmp_path)
    assert files.changes() == []
    assert finished(files) == pytest.ExitCode.OK
