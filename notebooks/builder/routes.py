"""Three ways through the course: 15 minutes, 2 hours, 2 days.

Whoever has two days reads everything. In the sources a cell tagged `route-2h` is on the way of two hours too, one
tagged `route-15m` on all three: a tag names the shortest route that a cell is on. `taken` is a notebook with only the
cells of a route. It starts from a cold kernel and prints what the whole notebook prints: `gaps` tells without
running it which cell is missing, and nbval runs it.

How long a route takes is estimated, not measured: so many words, lines of code, figures and panels at the rates below,
the minutes that an exercise names, and for each notebook the seconds that it may compute.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from types import MappingProxyType

from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from builder.names import needs_and_gives
from builder.prose import claims

ROUTES = MappingProxyType({"15m": 15, "2h": 120, "2d": 2 * 9 * 60})  # minutes, from the shortest to the longest
NAMES = MappingProxyType({"15m": "15 minutes", "2h": "2 hours", "2d": "2 days"})
SECONDS = 30  # that a notebook of a shorter route may compute, with its kernel's start
WORDS, LINES = 200, 30  # read in a minute: prose and printed words; lines of code but imports
FIGURE, PANEL = 0.25, 1.0  # minutes for looking, for playing

FOLDED = re.compile(r"<details>.*?</details>", re.DOTALL)
EXERCISE = re.compile(r"### Exercise E.*\((\d+) minutes\)")
SECTION = re.compile(r"\n\n(?=#+ )")
CLAIM = re.compile(r"\bC\d+\.\d+\b")
CHAPTER = re.compile(r"\]\((\d\d_\w+)\.ipynb")


def is_on(cell: NotebookNode, route: str) -> bool:
    """Whether a cell is on a route."""
    shortest = [tag.removeprefix("route-") for tag in cell.metadata.get("tags", []) if tag.startswith("route-")]
    order = list(ROUTES)
    return order.index(route) >= min((order.index(name) for name in shortest), default=order.index("2d"))


def along(notebook: NotebookNode, route: str) -> list[NotebookNode]:
    """The cells of a notebook that are on a route. Where text ends one section and begins another, its halves go with
    the cells around it: a half whose neighbour is left out is cut off."""
    on = [is_on(cell, route) for cell in notebook.cells]
    around = zip(notebook.cells, on, [True, *on], [*on[1:], True], strict=False)
    return [_cut(cell, before, after) for cell, here, before, after in around if here]


def _cut(cell: NotebookNode, before: bool, after: bool) -> NotebookNode:
    """A copy of a cell, without the end of a section that is left out, and without the beginning of one."""
    cell, halves = deepcopy(cell), SECTION.split(cell.source)
    if cell.cell_type == "markdown" and len(halves) > 1:
        begin = 0 if before else 1
        end = None if after or begin == len(halves) - 1 else -1
        cell.source = "\n\n".join(halves[begin:end])
    return cell


def minutes(cells: list[NotebookNode]) -> float:
    """How long reading, looking, playing and solving takes."""
    return sum(map(_minutes, cells))


def _minutes(cell: NotebookNode) -> float:
    """One cell. An exercise's own minutes count for all its cells; what is folded away is not read."""
    if cell.cell_type == "markdown":
        asked = EXERCISE.match(cell.source)
        return float(asked[1]) if asked else len(FOLDED.sub("", cell.source).split()) / WORDS
    if cell.id.endswith(("_stub", "_check")):
        return 0.0
    lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
    return len(lines) / LINES + sum(map(_looking, cell.get("outputs", [])))


def _looking(output: NotebookNode) -> float:
    """One output: a panel is a cell's value, every other picture is shown."""
    data = output.get("data", {})
    if "image/png" in data or "text/html" in data:
        return PANEL if output.output_type == "execute_result" else FIGURE
    return len((output.get("text") or data.get("text/plain", "")).split()) / WORDS


def gaps(notebook: NotebookNode) -> Iterator[str]:
    """Complaints: a cell on a shorter route that needs, or announces, what only a cell left out gives."""
    for route in list(ROUTES)[:-1]:
        for fault in (*_missing_names(notebook.cells, route), *_missing_cells(notebook, route)):
            yield f"on the route of {NAMES[route]} cell {fault}"


def _missing_names(cells: list[NotebookNode], route: str) -> Iterator[str]:
    """A name must come from the same cell as in the whole notebook: the last one before that gives it."""
    giver: dict[str, NotebookNode] = {}
    for cell in cells:
        if cell.cell_type == "code":
            needed, given = needs_and_gives(cell.source)
            for name in sorted(needed & set(giver)) if is_on(cell, route) else ():
                if not is_on(giver[name], route):
                    yield f"{cell.id} needs `{name}` of cell {giver[name].id}, which is left out: tag that one as well"
            giver |= dict.fromkeys(given, cell)


def _missing_cells(notebook: NotebookNode, route: str) -> Iterator[str]:
    """Text that ends with a colon announces the next cell."""
    following = dict(zip((cell.id for cell in notebook.cells), notebook.cells[1:], strict=False))
    for cell in along(notebook, route):
        if cell.source.endswith(":") and cell.id in following and not is_on(following[cell.id], route):
            yield f"{cell.id} ends with a colon, and what it announces, {following[cell.id].id}, is left out"


def tell(notebook: NotebookNode) -> None:
    """Put into the prose, in place of `{routes}`, what of a notebook is on which route."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("{routes}", summary(notebook))


def summary(notebook: NotebookNode) -> str:
    """How many cells are on each route, and how long they take."""
    parts = []
    for route, name in NAMES.items():
        cells = along(notebook, route)
        size = "all of it" if len(cells) == len(notebook.cells) else _cells(len(cells)) if cells else "nothing here"
        parts.append(f"{name}: {size}" + (f", {max(1, round(minutes(cells)))} min." if cells else "."))
    return " ".join(parts)


def taken(notebooks: dict[str, NotebookNode], route: str) -> dict[str, NotebookNode]:
    """The notebooks of a route by name: its cells with their outputs, numbered anew, and a word on what is left out."""
    chosen = {name: along(notebook, route) for name, notebook in notebooks.items()}
    names = [name for name, cells in chosen.items() if cells]
    written = {}
    for name, following in zip(names, [*names[1:], ""], strict=True):
        cells, whole = chosen[name], notebooks[name].cells
        _number(cells)
        _lead(cells, name, names)
        title = "" if cells[0].id == whole[0].id else whole[0].source.splitlines()[0] + "\n\n"
        first = new_markdown_cell(title + _notice(name, route, len(whole) - len(cells)), id="this-route")
        last = [new_markdown_cell(f"**Next**: [{following}]({following}.ipynb)", id="next")] if following else []
        written[name] = NotebookNode({**notebooks[name], "cells": [first, *cells, *last]})
    return written


def _notice(name: str, route: str, left: int) -> str:
    verb = "is" if left == 1 else "are"
    return f"*The route of {NAMES[route]}: {_cells(left)} of [{name}](../notebooks/{name}.ipynb) {verb} left out here.*"


def _cells(number: int) -> str:
    return "1 cell" if number == 1 else f"{number} cells"


def _number(cells: list[NotebookNode]) -> None:
    """Count the code cells anew."""
    for number, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), 1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number


def _lead(cells: list[NotebookNode], name: str, names: list[str]) -> None:
    """Links to a chapter that is not on the route, and claims of this one that are not, lead to the whole chapter."""
    proven = {claim.id for claim in claims(NotebookNode(cells=cells))}
    chapter = f"C{int(name[:2])}." if name[:2].isdigit() else "C"

    def linked(found: re.Match[str]) -> str:
        here = found[0] in proven or not found[0].startswith(chapter)
        return found[0] if here else f"[{found[0]}](../notebooks/{name}.ipynb)"

    for cell in cells:
        if cell.cell_type == "markdown":
            source = CHAPTER.sub(
                lambda link: link[0] if link[1] in names else f"](../notebooks/{link[1]}.ipynb", cell.source
            )
            cell.source = CLAIM.sub(linked, source)
