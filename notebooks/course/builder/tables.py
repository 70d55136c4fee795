"""The tables that stand in notebooks and are written by nobody: `{table:NAME}` in a source.

Each is drawn from a file in data/ and from all notebooks, so a link always leads to where its claim or word now is. The
price: when a chapter gains or loses cells, the notebooks with tables must be laid out anew (`build` says so and does
it). The notebook with the glossary is not searched for its words.
"""

from collections.abc import Callable
from pathlib import Path

from course.builder.choices import choice_faults, choices_table
from course.builder.glossary import glossary_faults, glossary_table
from course.builder.ledger import folded_ledger, rows
from course.builder.papers import index_faults, index_table
from course.builder.places import Pages, proven, read_pages

REFERENCE = "13_reference"


def chapters(root: Path) -> Pages:
    """All notebooks but the one that only refers to others."""
    return {name: page for name, page in read_pages(root / "notebooks").items() if name != REFERENCE}


def table(name: str, root: Path) -> str:
    """A table in Markdown. ValueError says which name is unknown, or what is wrong with the data."""
    if name not in TABLES:
        raise ValueError(f"is unknown: use one of {', '.join(TABLES)}")
    return TABLES[name](root, chapters(root))


def ledger(root: Path, pages: Pages) -> str:
    """What is said, and what stands: as in the README, with links to cells."""
    return folded_ledger(root, proven(pages), lambda place: place.address)


def papers(root: Path, pages: Pages) -> str:
    """Equation, section, figure -> function -> test -> cell."""
    index, found = rows(root / "data/paper_index.csv"), proven(pages)
    return _sound(list(index_faults(index, root, pages, found))) or index_table(index, found)


def choices(root: Path, pages: Pages) -> str:
    """What the report does not say, and what was chosen."""
    register, found = rows(root / "data/choices.csv"), proven(pages)
    return _sound(list(choice_faults(register, pages, found))) or choices_table(register, found)


def glossary(root: Path, pages: Pages) -> str:
    """Every term, with links back."""
    terms = rows(root / "data/glossary.csv")
    return _sound(list(glossary_faults(terms, pages))) or glossary_table(terms, pages)


def _sound(complaints: list[str]) -> str:
    if complaints:
        raise ValueError("; ".join(complaints))
    return ""


TABLES: dict[str, Callable[[Path, Pages], str]] = {
    "ledger": ledger, "papers": papers, "choices": choices, "glossary": glossary,
}  # fmt: skip
