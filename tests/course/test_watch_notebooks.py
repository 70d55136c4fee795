"""A notebook over its time budget fails the run, and so does a changed file, even when every cell was right."""

import re
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import watch_notebooks
from course.builder.lint import BUDGETS, time_budget
from processor import processor_seconds
from project import NOTEBOOKS, ROOT


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
    before = processor_seconds()  # of a browser that another test has started
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert 0.4 < processor_seconds() - before < 60
        child.communicate(b"\n")
    assert processor_seconds() - before < 0.4


def test_the_clock_s_limit_on_a_cell_is_far_from_every_budget():
    [limit] = re.findall(r"--nbval-cell-timeout (\d+)", (ROOT / "Makefile").read_text("utf-8"))
    assert int(limit) > 5 * max(BUDGETS.values())


@pytest.mark.slow
def test_a_notebook_that_hangs_ends_and_says_so(tmp_path):
    notebook = tmp_path / "99_hangs.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("while True:\n    pass", execution_count=1)]), notebook)
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "2", notebook]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert said.returncode == pytest.ExitCode.TESTS_FAILED
    assert "Timeout of 2 seconds exceeded" in said.stdout


def test_each_notebook_has_its_own_budget(budgets):
    ran(budgets, "98_other", 30, 20)
    ran(budgets, "99_other", 30, 20)
    assert budgets.over() == []
    assert finished(budgets) == pytest.ExitCode.OK


def test_budgets_are_for_notebooks_that_exist():
    assert {path.stem for path in (NOTEBOOKS / "course/src").glob("*.py")} >= set(BUDGETS)
    assert all(0 < time_budget(name) <= 150 for name in BUDGETS)


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
