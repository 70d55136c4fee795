"""A notebook over its time budget fails the run, and so does a changed file, even when every cell was right."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

import watch_notebooks
from course.builder.lint import BUDGETS, seconds
from project import NOTEBOOKS


@pytest.fixture
def budgets():
    return watch_notebooks.Budgets()


def ran(budgets, name, *durations, processor=None):
    for cell, duration in enumerate(durations):
        report = SimpleNamespace(nodeid=f"notebooks/{name}.ipynb::Cell {cell}", duration=duration)
        report.user_properties = [] if processor is None else [("processor seconds", processor[cell])]
        budgets.pytest_runtest_logreport(report)


def finished(watcher):
    session = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    watcher.pytest_sessionfinish(session)
    return session.exitstatus


def test_all_cells_of_a_notebook_count(budgets):
    ran(budgets, "99_other", 30, 20, 15)
    assert budgets.over() == ["notebooks/99_other.ipynb took 65 s; its budget is 60 s (course/builder/lint.py)"]
    assert finished(budgets) == pytest.ExitCode.TESTS_FAILED


def test_on_a_busy_machine_the_processor_is_asked(budgets):
    ran(budgets, "98_other", 30, 20, 45, processor=[20, 30, 55])  # since the kernel's start
    ran(budgets, "99_other", 30, 20, 45, processor=[20, 30, 65])
    assert budgets.over() == ["notebooks/99_other.ipynb took 65 s; its budget is 60 s (course/builder/lint.py)"]
    ran(budgets, "97_other", 30, processor=[99])  # on several cores at once
    assert not any("97" in line for line in budgets.over())


def test_what_children_compute_is_counted():
    code = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert 0.4 < watch_notebooks.processor_seconds() < 60
        child.communicate(b"\n")
    assert watch_notebooks.processor_seconds() == 0


def test_each_notebook_has_its_own_budget(budgets):
    ran(budgets, "98_other", 30, 20)
    ran(budgets, "99_other", 30, 20)
    assert budgets.over() == []
    assert finished(budgets) == pytest.ExitCode.OK


def test_budgets_are_for_notebooks_that_exist():
    assert {path.stem for path in (NOTEBOOKS / "course/src").glob("*.py")} >= set(BUDGETS)
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
def test_a_run_that_changes_files_fails(tmp_path, do, named):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "model.json").write_text("{}")
    files = watch_notebooks.Files(tmp_path)
    do(tmp_path)
    assert [line.split()[0] for line in files.changes()] == [named]
    assert finished(files) == pytest.ExitCode.TESTS_FAILED


def test_caches_may_come_and_go(tmp_path):
    (tmp_path / "data").mkdir()
    files = watch_notebooks.Files(tmp_path)
    cache(tmp_path)
    assert files.changes() == []
    assert finished(files) == pytest.ExitCode.OK
