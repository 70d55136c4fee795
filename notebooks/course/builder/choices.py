"""The register of choices: what the report does not say, what this course does instead, and where that can be seen.

`data/choices.csv` has a row for each choice, in the order of the chapters: its `topic`, what the report is `silent`
about, what was `chosen`, `where` in the code, and the `claims` that show it or, where no cell can, a `note`. Each
chapter closes with a paragraph on the same matter. The two are held together by `closing`: words of that paragraph
(several passages are divided by bars), so that no item of a closing is missing here, and nothing is quoted that a
closing no longer says.
"""

import re
from collections.abc import Iterator, Mapping

from course.builder.ledger import Row, markdown
from course.builder.papers import code_links, exists
from course.builder.places import Pages, Place, claim_links, unproven

CLOSING = re.compile(
    r"\*\*What the (?:report does|sources do) not say, and what we chose\.\*\*(.*?)(?:\n\n|\Z)", re.DOTALL
)
ENDS = re.compile(r"(?<=[.?!])\s+(?=[A-Z])|;\s+(?![^(]*\))")  # of a sentence; or a semicolon outside brackets


def closings(pages: Pages) -> dict[str, str]:
    """What each chapter says about the matter in its closing, by the chapter's number."""
    found = {}
    for name, notebook in pages.items():
        text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        if said := CLOSING.search(text):
            found[name[:2]] = " ".join(said[1].split())
    return found


def passages(row: Row) -> list[str]:
    """The words of the chapter's closing that a row is about."""
    return [words.strip() for words in row["closing"].split(" | ") if words.strip()]


def choice_faults(choices: list[Row], pages: Pages, found: Mapping[str, Place]) -> Iterator[str]:
    """Complaints: code or claims that do not exist, and closings that say more or less than the register."""
    said = closings(pages)
    for row in choices:
        for fault in (*_row_faults(row, said.get(row["chapter"], "")), *unproven(row["claims"], found)):
            yield f"chapter {row['chapter']}, {row['topic']}: {fault}"
    for chapter, text in said.items():
        quoted = [words for row in choices if row["chapter"] == chapter for words in passages(row)]
        for sentence in ENDS.split(text):
            if not any(words in sentence for words in quoted):
                yield f"chapter {chapter} closes with {sentence[:60]!r}…, which data/choices.csv does not have"


def _row_faults(row: Row, said: str) -> Iterator[str]:
    for name in row["where"].split():
        if not exists(name):
            yield f"there is no {name}"
    if not row["where"] or not (row["claims"] or row["note"]):
        yield "it needs a place in the code, and claims or a note that show it"
    for words in passages(row):
        if words not in said:
            yield f"the chapter's closing does not say {words!r}"


def choices_table(choices: list[Row], found: Mapping[str, Place]) -> str:
    """The register in Markdown."""
    lines = [
        (
            f"**{row['chapter']} {row['topic']}**: {row['silent']}",
            row["chosen"],
            "<br>".join(filter(None, (code_links(row["where"]), claim_links(row["claims"], found), row["note"]))),
        )
        for row in choices
    ]
    return markdown(("not said", "chosen", "see"), *lines)
