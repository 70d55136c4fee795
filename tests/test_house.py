"""The house keeps its order: rooms import only lower rooms, files and functions stay small, commands exist."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from statistics import quantiles

import pytest

from dsa import cli
from project import ROOT

FLOORS = (  # from the ground up; rooms of one floor do not know each other
    ("dsa.io",),
    ("dsa.record",),
    ("dsa.kernels", "dsa.datasets"),
    ("dsa.model",),
    ("dsa.distributed.tensor_parallel", "dsa.distributed.fsdp"),
    ("dsa.analysis",),
    ("dsa.checkpoint",),
    ("dsa.generation",),
    ("dsa.training",),
    ("dsa.bench",),
    ("dsa.doctor", "dsa.evaluate"),
    ("dsa.cli",),
    ("dsa.__main__",),
    ("course.ui",),
    ("course.experiments",),
    ("course.bugs",),
    ("course.figures",),
    ("course.exercises",),
    ("course.builder",),
    ("course",),
)
# what is chosen by name at run time: the door, sub-commands, backends, a chapter's exercises
LAZY = {"dsa", "dsa.cli", "dsa.kernels.backends", "course.exercises.registry"}
GPU = ("dsa.kernels.triton", "dsa.bench.gpu")
MODULES = sorted((ROOT / "dsa").rglob("*.py"))
COURSE = [path for path in sorted((ROOT / "notebooks/course").rglob("*.py")) if "src" not in path.parts]
ALLOWED = {"torch", "numpy", "safetensors", "tqdm"}  # what `pip install` brings along
OPTIONAL = {
    "triton",
    "tokenizers",
    "jinja2",
    "transformers",
}  # imported where they are needed, and said to be missing elsewhere

each = pytest.mark.parametrize("path", [*MODULES, *COURSE], ids=lambda path: str(path.relative_to(ROOT)))
library = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def name_of(path):
    """The dotted name of a module or package."""
    folder = ROOT if path.is_relative_to(ROOT / "dsa") else ROOT / "notebooks"
    return ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")


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


def floor(name):
    """On which floor a module is, and in which room there; None for what is not of this house."""
    return next(
        ((number, room) for number, rooms in enumerate(FLOORS) for room in rooms if f"{name}.".startswith(f"{room}.")),
        None,
    )


@each
def test_a_room_imports_only_itself_and_lower_floors(path):
    if path.name == "__init__.py":
        return  # packages run nothing, and the door `dsa` looks its names up when they are first used
    here = floor(name_of(path))
    assert here, f"{name_of(path)} is on no floor: give it one"
    for name in imports(path):
        there = floor(name)
        assert there is None or there == here or there[0] < here[0], f"{name_of(path)} imports {name}"


def test_no_module_imports_one_that_imports_it():
    """No circles, not even of modules in one room, and none hidden in a function or in a string."""
    modules = {name_of(path): path for path in [*MODULES, *COURSE] if path.name != "__init__.py"}
    graph = {
        name: {part for full in imports(path) for part in (full, full.rpartition(".")[0]) if part in modules}
        for name, path in modules.items()
    }
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_no_module_of_ours_is_imported_by_a_string_elsewhere_than_at_the_door():
    for path in [*MODULES, *COURSE]:
        if "import_module(" in path.read_text("utf-8"):
            assert name_of(path) in LAZY, f"{name_of(path)} imports by a string"


@library
def test_the_library_needs_four_packages_and_knows_no_course(path):
    used = {name.split(".")[0] for name in imports(path)}
    assert used - set(sys.stdlib_module_names) - {"dsa"} <= ALLOWED | OPTIONAL


REFUSING = """
import sys
allowed = {allowed!r} | set(sys.stdlib_module_names)


class Refuse:
    def find_spec(self, name, path=None, target=None):
        caller = sys._getframe(1)
        while caller and "importlib" in caller.f_code.co_filename:
            caller = caller.f_back
        asked = caller.f_globals.get("__name__", "") if caller else ""
        if asked.split(".")[0] in ("dsa", "__main__") and name.split(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{{asked}} wants {{name}}")


sys.meta_path.insert(0, Refuse())
from importlib import import_module
for name in {modules!r}:
    import_module(name)
"""


def test_every_module_of_the_library_is_imported_without_any_other_package():
    """The kernels for GPUs need Triton; everything else needs four packages, each with what it needs itself."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
    wanted = [name for name in modules if not name.startswith(GPU) and not name.endswith("__main__")]
    program = REFUSING.format(allowed=ALLOWED | {"dsa"}, modules=wanted)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@each
def test_a_module_can_be_read_in_one_sitting(path):
    assert len(path.read_text("utf-8").splitlines()) <= 300
    assert "util" not in path.stem


@each
def test_every_module_says_what_it_is_for_and_packages_run_nothing(path):
    tree = ast.parse(path.read_text("utf-8"))
    if path.name == "__init__.py" and path != ROOT / "dsa/__init__.py":
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
    assert quantiles(lengths, n=10)[-1] <= 30  # the longest tenth; a median would breed helpers that are used once


def commands(target):
    """What `make` runs for a target: what the targets before it run, then its own lines."""
    rules = re.findall(r"^(\w+):(.*)\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    rules = {name: (before.split(), recipe.split("\n\t")) for name, before, recipe in rules}
    before, recipe = rules[target]
    for name in before:
        yield from commands(name) if name in rules else ()
    for line in map(str.strip, recipe):
        called = re.fullmatch(r"\$\(MAKE\) (\w+)", line)
        yield from commands(called[1]) if called else [line]


def test_the_jobs_of_the_workflow_are_targets_that_together_do_what_make_test_does():
    jobs = re.findall(r"target: (\w+)", (ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    apart, together = [{line for name in names for line in commands(name)} for names in (jobs, ["test"])]
    [suite] = together - apart
    assert apart - together == {f"{suite} --ignore tests/browser", f"{suite}/browser"}
    assert suite == "$(PYTEST) tests"


def test_no_test_depends_on_the_folder_it_is_started_from():
    assert not Path.cwd().is_relative_to(ROOT)  # conftest moves to an empty folder, where no relative path leads on


def test_commands_of_the_makefile_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for module in re.findall(r"python -m ((?:dsa|course)[\w.]*)", makefile):
        assert find_spec(module), f"python -m {module}"
    for words in re.findall(r"\$\(BIN\)/dsa (.*)", makefile):
        assert isinstance(cli.find(words.split())[1], cli.Command), words
    for script in re.findall(r"python ([\w/]+\.py)", makefile):
        assert (ROOT / script).exists(), script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run is not executable"
