"""The house keeps its order: rooms import only lower rooms, files and functions stay small, commands exist."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"kernels": 1, "text": 1, "model": 2, "cost": 3, "inference": 4, "training": 5, "show": 6}
MODULES = sorted((ROOT / "dsa").rglob("*.py"))
COURSE_ONLY = {"matplotlib", "ipywidgets", "IPython"}

each = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def room(path):
    return path.relative_to(ROOT / "dsa").parts[0]


def imports(path):
    """Modules that a file imports when it runs, including inside functions; those for types only do not count."""
    tree = ast.parse(path.read_text("utf-8"))
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@each
def test_a_room_imports_only_itself_and_lower_floors(path):
    if path.parent == ROOT / "dsa":
        return  # the door: its names are looked up when first used
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "dsa" and len(parts) > 1 and parts[1] in FLOORS and parts[1] != room(path):
            assert FLOORS[parts[1]] < FLOORS[room(path)], f"{path.name} imports {name}"


@each
def test_only_show_draws(path):
    if path.parent == ROOT / "dsa" or room(path) != "show":
        assert not {name.split(".")[0] for name in imports(path)} & COURSE_ONLY


@each
def test_a_module_can_be_read_in_one_sitting(path):
    assert len(path.read_text("utf-8").splitlines()) <= 280
    assert "util" not in path.stem


@each
def test_every_module_says_what_it_is_for_and_packages_run_nothing(path):
    tree = ast.parse(path.read_text("utf-8"))
    if path.name == "__init__.py" and path.parent != ROOT / "dsa":
        assert len(tree.body) <= 1 and (not tree.body or ast.get_docstring(tree))
    else:
        assert ast.get_docstring(tree)


def test_functions_are_short():
    lengths = [
        node.end_lineno - node.lineno + 1
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    assert median(lengths) < 10
    assert quantiles(lengths, n=10)[-1] <= 25


def test_commands_of_the_makefile_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for module in re.findall(r"python -m (dsa[\w.]*)", makefile):
        assert find_spec(module), f"python -m {module}"
    for script in re.findall(r"python ([\w/]+\.py)", makefile):
        assert (ROOT / script).exists(), script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run is not executable"
