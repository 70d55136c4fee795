"""From a source in percent format to the cells of a notebook: exercises expanded, every cell named.

A Markdown cell that says only `{exercise:selection.my_select}` becomes the exercise. A cell is named after the first
claim or exercise in it, so that links to it stay right while a chapter grows; any other by its section's heading and
its place among the unnamed ones there (`how-the-indexer-chooses_3`), so that a comparison of two versions shows the
edit.
"""

import json
import re
from collections import Counter
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jupytext
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course.exercises.exercise import Exercise
from course.exercises.registry import find_exercise

UNNAMED = "unnamed"
EXERCISE = re.compile(r"\{exercise:([\w.]+)\}")
CLAIM = re.compile(r"\bclaim\(\s*\"([\w-]+)\"")
METADATA = MappingProxyType(
    {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"file_extension": ".py", "name": "python", "pygments_lexer": "ipython3"},
    }
)


class BuildError(Exception):
    """What a source does that no notebook can be made of."""


def metadata() -> dict[str, Any]:
    """The metadata of every notebook: which kernel, and nothing about the machine it ran on."""
    return json.loads(json.dumps(dict(METADATA)))


def parse_source(source: Path) -> NotebookNode:
    """The notebook of a source: exercises expanded, cells named, nothing executed, no placeholder filled."""
    parsed = jupytext.reads(source.read_text("utf-8"), fmt="py:percent")
    cells = [piece for cell in parsed.cells for piece in _expand_exercise(cell)]
    _assign_ids(cells)
    for twice, count in Counter(cell.id for cell in cells).items():
        if count > 1:
            raise BuildError(f"{count} cells are called {twice}: rename a claim, or reword a heading")
    return new_notebook(cells=cells, metadata=metadata())


def _expand_exercise(cell: NotebookNode) -> list[NotebookNode]:
    """One cell of the source as cells of the notebook; only exercises have their ids already."""
    tags = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
    if cell.cell_type == "code":
        return [new_code_cell(cell.source, id=UNNAMED, metadata=tags)]
    if asked := EXERCISE.fullmatch(cell.source.strip()):
        try:
            return exercise_cells(find_exercise(asked[1]))
        except ValueError as unknown:
            raise BuildError(f"{asked[0]}: {unknown}") from None
    return [new_markdown_cell(cell.source, id=UNNAMED, metadata=tags)]


def exercise_cells(exercise: Exercise) -> list[NotebookNode]:
    """Task, stub, check, and one cell with three hints and the solution, each folded."""
    slug = _slug(exercise.name)
    stars = "★" * exercise.difficulty + "☆" * (3 - exercise.difficulty)
    title = f"### Exercise: {exercise.title} {stars} ({exercise.minutes} minutes)"
    hints = [_details(f"Hint {number}", hint) for number, hint in enumerate(exercise.hints, 1)]
    solution = _details("Solution", f"```python\n{exercise.source}\n```")
    return [
        new_markdown_cell(f"{title}\n\n{exercise.task.strip()}", id=f"{slug}_task"),
        new_code_cell(exercise.stub, id=f"{slug}_stub"),
        new_code_cell(f"check({exercise.name})", id=f"{slug}_check"),
        new_markdown_cell("\n\n".join([*hints, solution]), id=f"{slug}_hints"),
    ]


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{content.strip()}\n\n</details>"


def _assign_ids(cells: list[NotebookNode]) -> None:
    """Give each cell an id: its first claim's name, or its section's heading and its place there."""
    section, place, used = "start", 0, Counter[str]()
    for cell in cells:
        if cell.cell_type == "code" and (made := CLAIM.search(cell.source)):
            cell.id = made[1]
        heading = re.match(r"#+ (.+)", cell.source) if cell.cell_type == "markdown" else None
        if heading and cell.id == UNNAMED:
            section, place = _slug(heading[1]), 0
            used[section] += 1
            section += f"_again{used[section]}" if used[section] > 1 else ""
        if cell.id == UNNAMED:
            cell.id = f"{section}_{place}" if place else section
            place += 1


def _slug(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))[:40].strip("-") or "section"
