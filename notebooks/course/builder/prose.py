"""Numbers in prose: filled in from what a cell has proven or a file records, never typed.

`{claim:kept-by-16}` stands for the value of that claim, which a cell of the same notebook printed when it ran;
`{source:report.tokens}` for the entry "tokens" of data/**/report.json (a recorded command names modules by where they
are now); `{table:glossary}` for a table that is drawn from data and all notebooks (`tables`). A placeholder that
nothing stands behind is an error, so a sentence cannot outlive its evidence.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from nbformat import NotebookNode

from dsa.record import as_of_today

PLACEHOLDER = re.compile(r"\{((?:claim|source|table|exercise):[\w.-]*)\}")


class Unproven(ValueError):
    """Why nothing stands behind a placeholder."""


def fill(notebook: NotebookNode, data: Path, table: Callable[[str], str]) -> list[str]:
    """Fill the placeholders of the prose in place; returns one complaint for each that nothing stands behind.

    `table` draws the table of a name; its ValueError says why it cannot.
    """
    proven, complaints = {made.name: made.value for made in claims(notebook)}, list[str]()

    def value(key: str) -> str:
        kind, _, rest = key.partition(":")
        return table(rest) if kind == "table" else _value(key, proven, data)

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _filled(cell, value, complaints)
    return complaints


def claims(notebook: NotebookNode) -> list[NotebookNode]:
    """The record of each claim that an executed notebook printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.metadata.claim for output in outputs if "claim" in output.get("metadata", {})]


def _filled(cell: NotebookNode, value: Callable[[str], str], complaints: list[str]) -> str:
    """The text of one cell; what cannot be filled stays as it is and is complained about."""

    def text(found: re.Match[str]) -> str:
        try:
            return value(found[1])
        except ValueError as reason:
            complaints.append(f"cell {cell.id}: {found[0]} {reason}")
            return found[0]

    return PLACEHOLDER.sub(text, cell.source)


def _value(key: str, proven: dict[str, str], data: Path) -> str:
    kind, _, rest = key.partition(":")
    if kind == "source":
        return sourced(rest, data)
    if kind == "exercise":
        raise Unproven("must stand alone in its Markdown cell, and name a module and a function")
    if rest not in proven:
        raise Unproven("is made by no cell of this notebook")
    return proven[rest]


def sourced(key: str, data: Path) -> str:
    """The value of `report.training.tokens`: in the one data/**/report.json, itself or an entry's "value"."""
    stem, *steps = key.split(".")
    files = sorted(data.rglob(f"{stem}.json"))
    if len(files) != 1:
        raise Unproven(f"needs one {stem}.json in the data folder, and there are {len(files)}")
    found = json.loads(files[0].read_text("utf-8"))
    for step in steps:
        if not isinstance(found, dict) or step not in found:
            raise Unproven(f"is not in {files[0].name}: there is no {step!r}")
        found = found[step]
    found = found.get("value") if isinstance(found, dict) else found
    if not isinstance(found, (str, int, float)):
        raise Unproven(f"is not one value in {files[0].name}, nor an entry with a 'value'")
    return as_of_today(str(found)) if steps[-1:] == ["command"] else str(found)
