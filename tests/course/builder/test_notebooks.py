"""Every committed notebook is what its source gives and passes lint.

This looks at files only; `make test` also runs each notebook and compares its outputs (nbval), and what a notebook
lets a reader move is tested in a file of its own.
"""

import ast
import re
import sys
from functools import cache

import nbformat
import pytest

from course.builder.build import Course
from project import NOTEBOOKS

COURSE = Course(NOTEBOOKS)
ALLOWED = {"torch", "numpy", "matplotlib", "dsa", "course"}
LINK = re.compile(r"\]\(([^)#\s]+)(?:#cell-id=([\w-]+))?")
LOADED = re.compile(r"!\[[^]]*\]\(https?:|<(?:img|script|iframe|link)[^>]+https?:")

each = pytest.mark.parametrize("name", COURSE.names())


def prose(name):
    notebook = nbformat.read(COURSE.notebook_path(name), as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


@each
def test_it_is_built_and_passes_lint(name):
    assert list(COURSE.check(name)) == []


def test_every_notebook_has_a_source():
    assert COURSE.orphans() == []


@each
def test_it_imports_only_what_the_course_is_about(name):
    tree = ast.parse(COURSE.source_path(name).read_text("utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in found} <= ALLOWED | set(sys.stdlib_module_names)


@each
def test_its_links_lead_somewhere(name):
    """To a file, and where a cell of a notebook is named, to that cell."""
    targets = [(cell.id, *link) for cell in prose(name) for link in LINK.findall(cell.source) if "://" not in link[0]]
    dead = [target for target in targets if not (COURSE.folder / target[1]).exists()]
    assert dead == []
    for cell, file, wanted in targets:
        assert not wanted or wanted in cells_of(file), f"cell {cell} links to {file}, which has no cell {wanted}"


@cache
def cells_of(file):
    return {cell.id for cell in nbformat.read(COURSE.folder / file, as_version=4).cells}


@each
def test_it_loads_nothing_from_the_network(name):
    assert [cell.id for cell in prose(name) if LOADED.search(cell.source)] == []
