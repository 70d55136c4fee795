"""Numbers in prose: filled in from what a cell has proven or a file records, never typed.

`{claim:kept-by-16}` stands for the value of that claim, which a cell of the same notebook printed when it ran;
`{source:report.tokens}` for the entry "tokens" of data/**/report.json (a recorded command names modules by where they
are now); `{table:glossary}` for a table that is drawn from data and all notebooks (`reference_tables`). A placeholder
that nothing stands behind is an error, so a sentence cannot outlive its evidence.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nbformat import NotebookNode

from dsa.record import as_of_today

PLACEHOLDER = re.compile(r"\{((?:claim|source|table|exercise):[\w.-]*)\}")


class PlaceholderError(ValueError):
    """Why nothing stands behind a placeholder."""


def fill_placeholders(notebook: NotebookNode, data: Path, table: Callable[[str], str]) -> list[str]:
    """Fill the placeholders of the prose in place; returns one complaint for each that nothing stands behind.

    `table` draws the table of a name; its ValueError says why it cannot.
    """
    proven, complaints = {made.name: made.value for made in claim_records(notebook)}, list[str]()

    def value(key: str) -> str:
        kind, _, rest = key.partition(":")
        if kind == "table":
            return table(rest)
        if kind == "source":
            return recorded_value(rest, data)
        if kind == "exercise":  # `source` has expanded those that stand alone
            raise PlaceholderError("must stand alone in its Markdown cell, and name a module and a function")
        if rest not in proven:
            raise PlaceholderError("is made by no cell of this notebook")
        return proven[rest]

    def text(placeholder: re.Match[str], cell_id: str) -> str:
        try:
            return value(placeholder[1])
        except ValueError as reason:  # it stays as it is, so that the page shows where something is missing
            complaints.append(f"cell {cell_id}: {placeholder[0]} {reason}")
            return placeholder[0]

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = PLACEHOLDER.sub(partial(text, cell_id=cell.id), cell.source)
    return complaints


def claim_records(notebook: NotebookNode) -> list[NotebookNode]:
    """The record of each claim that an executed notebook printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.metadata.claim for output in outputs if "claim" in output.get("metadata", {})]


def recorded_value(key: str, data: Path) -> str:
    """The value of `report.training.tokens`: in the one data/**/report.json, itself or an entry's "value"."""
    stem, *steps = key.split(".")
    files = sorted(data.rglob(f"{stem}.json"))
    if len(files) != 1:
        raise PlaceholderError(f"needs one {stem}.json in the data folder, and there are {len(files)}")
    entry = json.loads(files[0].read_text("utf-8"))
    for step in steps:
        if not isinstance(entry, dict) or step not in entry:
            raise PlaceholderError(f"is not in {files[0].name}: there is no {step!r}")
        entry = entry[step]
    value = entry.get("value") if isinstance(entry, dict) else entry  # {"value": ..., "from": "report, section 2"}
    if not isinstance(value, (str, int, float)):
        raise PlaceholderError(f"is not one value in {files[0].name}, nor an entry with a 'value'")
    return as_of_today(str(value)) if steps[-1:] == ["command"] else str(value)
