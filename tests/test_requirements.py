"""What is installed is exactly what was tested, and everything that is imported is installed."""

import ast
import platform
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions, version

import pytest

from project import ROOT

HERE = {"sys_platform": sys.platform, "platform_machine": platform.machine()}


BESIDE_US = {"transformers": "dsa/bench/beside_transformers.py"}  # only timed there, and asked for by name
ELSEWHERE = set() if HERE == {"sys_platform": "linux", "platform_machine": "x86_64"} else {"triton"}


def meant_for_this_machine(line):
    """Whether a line's conditions hold, such as `; sys_platform == "linux"`."""
    conditions = re.findall(r'(\w+) == "(\w+)"', line.partition(";")[2])
    return all(HERE[name] == value for name, value in conditions)


PINS = [
    (name, line.split(";")[0].strip())
    for name in ("requirements.txt", "tests/requirements.txt")
    for line in (ROOT / name).read_text("utf-8").splitlines()
    if line.strip() and not line.startswith(("#", "-e")) and meant_for_this_machine(line)
]
OURS = {"dsa", "course"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}


@pytest.mark.parametrize(("file", "line"), PINS)
def test_every_pin_is_exact(file, line):
    assert re.fullmatch(r"[A-Za-z0-9_.-]+==\d+(\.\d+)+", line), f"{file}: {line}"


@pytest.mark.parametrize(("file", "line"), PINS)
def test_what_is_installed_is_what_is_pinned(file, line):
    name, pinned = line.split("==")
    assert version(name).split("+")[0] == pinned


def test_what_a_commit_is_checked_with_is_what_is_pinned():
    used = re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert len(used) == 2 and set(used) <= {line for _, line in PINS}


def pinned(*files):
    return {line.split("==")[0].lower() for file, line in PINS if file in files}


@cache
def homes():
    """Module -> the distributions that provide it."""
    return packages_distributions()


def imported(path):
    """Top-level modules imported anywhere in a file, except for types only."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        yield from (name.split(".")[0] for name in names)


@pytest.mark.parametrize(
    ("files", "lists"),
    [
        (["dsa/**/*.py", "notebooks/course/*.py", "notebooks/course/[!b]*/**/*.py"], ["requirements.txt"]),
        (["tests/**/*.py", "notebooks/course/builder/*.py"], ["requirements.txt", "tests/requirements.txt"]),
    ],
    ids=["course", "tests"],
)
def test_every_import_is_pinned(files, lists):
    allowed = pinned(*lists)
    for path in sorted(path for pattern in files for path in ROOT.glob(pattern)):
        beside = {module for module, place in BESIDE_US.items() if path == ROOT / place}
        for module in set(imported(path)) - OURS - ELSEWHERE - beside - set(sys.stdlib_module_names):
            found = {name.lower() for name in homes().get(module, [module])}
            assert found & allowed, f"{path.relative_to(ROOT)} imports {module}, which {lists[-1]} does not pin"


def test_no_index_address_is_named():
    for name in ("requirements.txt", "tests/requirements.txt", "Makefile", "pyproject.toml"):
        assert "://" not in (ROOT / name).read_text("utf-8")
