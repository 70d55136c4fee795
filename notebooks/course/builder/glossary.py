"""The glossary: each term in a sentence or two, with links back to the cells that introduce and use it.

`data/glossary.csv` has a row for each `term`: its `meaning`, and the `forms` in which chapters write it, divided by
bars. Where it is introduced and used nobody writes down: `places` looks it up in the notebooks. A chapter opens
with the letters and words it needs; none of these may be missing here.
"""

import re
from collections.abc import Iterator

from course.builder.ledger import Row, markdown
from course.builder.places import SET_OFF, Pages, elsewhere, introduced, mentions, pattern, read_prose, section

LETTER = re.compile(r"`([A-Za-z])`")


def forms(row: Row) -> list[str]:
    """How chapters write a term."""
    return row["forms"].split("|")


def opening_words(pages: Pages) -> Iterator[tuple[str, str]]:
    """The letters and words that each chapter explains at its start, below what it computes."""
    for name, notebook in pages.items():
        words = notebook.cells[0].source.partition("Computing:")[2].partition("\n\n")[2]
        yield from ((name, f"`{letter}`") for letter in LETTER.findall(words))
        marked = [" ".join((mark[1] or mark[2]).split()) for mark in SET_OFF.finditer(words)]
        yield from ((name, word) for word in marked if not word.endswith("."))  # which is a label, such as **Words.**


def glossary_faults(terms: list[Row], pages: Pages) -> Iterator[str]:
    """Complaints: terms that no chapter uses, without a meaning or twice there, and words that have no entry."""
    names = [row["term"] for row in terms]
    for twice in sorted({name for name in names if names.count(name) > 1}):
        yield f"{twice} stands there more than once"
    texts = read_prose(pages)
    for row in terms:
        if not mentions(texts, forms(row)):
            yield f"no chapter speaks of {row['term']}"
        if not row["meaning"]:
            yield f"{row['term']} has no meaning"
    known = pattern([part for row in terms for form in forms(row) for part in (form, form.split()[0])])  # or "dense"
    for name, word in opening_words(pages):
        if not known.fullmatch(word):
            yield f"{name} explains {word} at its start, and data/glossary.csv does not have it"


def glossary_table(terms: list[Row], pages: Pages) -> str:
    """The glossary in Markdown."""
    lines, texts = [("term", "in plain words", "introduced", "also in")], read_prose(pages)
    for row in terms:
        found = mentions(texts, forms(row))
        home = introduced(found)
        title = f"{home.chapter} {section(pages, home, pattern(forms(row)))}"
        others = ", ".join(place.link(place.chapter) for place in elsewhere(found, home))
        lines.append((row["term"], row["meaning"], home.link(title), others))
    return markdown(*lines)
