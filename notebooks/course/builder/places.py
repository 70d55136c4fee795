"""Where in the course something is: which cell proves a claim, and which cells speak of a word.

Links into notebooks are never written by hand. A cell's id changes when a cell is added before it; what stays is the
claim's id and the word itself, so tables name these, and this module finds the cells in the notebooks as they lie
there. The address `NAME.ipynb#cell-id=ID` opens a notebook at that cell in JupyterLab, and the course's pages have the
same marks (`book`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbformat import NotebookNode

Pages = Mapping[str, NotebookNode]  # notebooks by name, in the order of the course
LINKED = re.compile(r"\[[^]]*\]\([^)]*\)")
UNREAD = re.compile(r"<details>.*?</details>|```.*?```|\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SET_OFF = re.compile(r"\*\*(?=\S)([^*]{1,60}?)\*\*|(?<!\*)\*(?=\S)([^*]{1,60}?)\*(?!\*)")
EXERCISE = re.compile(r"e\d+-\d+_")


class Place(NamedTuple):
    """One cell of one notebook."""

    notebook: str
    cell: str

    @property
    def chapter(self) -> str:
        """The number in front of the notebook's name."""
        return self.notebook[:2]

    @property
    def address(self) -> str:
        """Where it is, seen from another notebook."""
        return f"{self.notebook}.ipynb#cell-id={self.cell}"

    def link(self, text: str) -> str:
        """A link to it in Markdown."""
        return f"[{text}]({self.address})"


Prose = Mapping[Place, str]  # the words of cells, in the order of the course


class Mention(NamedTuple):
    """A cell that speaks of a word; `marked` where the word is set off: in a heading, bold or in italics."""

    place: Place
    marked: bool


def read_pages(folder: Path) -> Pages:
    """The executed notebooks of a folder."""
    return {path.stem: nbformat.read(path, as_version=4) for path in sorted(folder.glob("*.ipynb"))}


def proven(pages: Pages) -> dict[str, Place]:
    """Every claim that the notebooks have printed, and the cell that proves it."""
    return {
        output.metadata.claim.id: Place(name, cell.id)
        for name, notebook in pages.items()
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "claim" in output.get("metadata", {})
    }


def claim_links(ids: str, found: Mapping[str, Place]) -> str:
    """The claims named in `ids` as links to their cells."""
    return ", ".join(found[id].link(id) for id in ids.split())


def unproven(ids: str, found: Mapping[str, Place]) -> Iterator[str]:
    """A complaint for each claim named in `ids` that no notebook proves."""
    yield from (f"no notebook proves claim {id}" for id in ids.split() if id not in found)


def prose(source: str) -> str:
    """The words of a Markdown cell: without links, code, formulas, and what is folded away."""
    return LINKED.sub(" ", UNREAD.sub(" ", source))


def pattern(forms: Sequence[str]) -> re.Pattern[str]:
    """What finds a word in any of its forms, with a plural s; a form without capital or backtick in any case."""
    exact = [form != form.lower() or "`" in form for form in forms]
    parts = [f"(?-i:{re.escape(form)})" if same else re.escape(form) for form, same in zip(forms, exact, strict=True)]
    return re.compile(rf"(?<![\w-])(?:{'|'.join(parts)})(?:e?s)?(?![\w-])", re.IGNORECASE)


def read_prose(pages: Pages) -> Prose:
    """The words of every Markdown cell."""
    return {
        Place(name, cell.id): prose(cell.source)
        for name, notebook in pages.items()
        for cell in notebook.cells
        if cell.cell_type == "markdown"
    }


def mentions(texts: Prose, forms: Sequence[str]) -> list[Mention]:
    """The cells that speak of a word, in the order of the course."""
    word = pattern(forms)
    return [
        Mention(place, not EXERCISE.match(place.cell) and _sets_off(text, word))
        for place, text in texts.items()
        if word.search(text)
    ]


def _sets_off(text: str, word: re.Pattern[str]) -> bool:
    """Whether the word is in a heading, or stands alone in bold letters or italics."""
    alone = [" ".join((mark[1] or mark[2]).split()) for mark in SET_OFF.finditer(text)]
    return any(word.search(found[1]) for found in HEADING.finditer(text)) or any(map(word.fullmatch, alone))


def introduced(found: Sequence[Mention]) -> Place:
    """The first cell that sets the word off; if none does, the first that has it."""
    return next((mention.place for mention in found if mention.marked), found[0].place)


def elsewhere(found: Sequence[Mention], home: Place) -> list[Place]:
    """One cell of each other chapter that has the word: the one that sets it off, or the first."""
    chapters = groupby(found, key=lambda mention: mention.place.notebook)
    return [introduced(list(own)) for name, own in chapters if name != home.notebook]


def section(pages: Pages, place: Place, word: re.Pattern[str]) -> str:
    """The heading under which a cell first has a word."""
    before = ""
    for cell in pages[place.notebook].cells:
        if cell.id == place.cell:
            end = found.end() if (found := word.search(cell.source)) else len(cell.source)
            before += "\n" + cell.source[: cell.source.find("\n", end) if "\n" in cell.source[end:] else None]
            break
        before += "\n" + cell.source if cell.cell_type == "markdown" else ""
    last = HEADING.findall(before)[-1]
    return re.sub(r"[*`$]|^\d\d ", "", last).partition(":")[0].strip()
