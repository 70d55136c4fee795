"""The ledger: what the article and the report say, statement by statement, and what this course makes of each.

`data/published/statements.csv` holds the statements, in our words; `data/ledger.csv` says for each one how it stands:
*reproduced* (cells of the course measure it), *in part* (they measure some of it, or find it weaker than said; its
note says what), *modelled* (it follows from counts or from a fitted model, which cells assert), *published* (we can
only show the published figure) or *not testable* (nothing outside can decide it), and *contradicted* where a
measurement or the published figure itself says otherwise. All but published and not testable need claims that executed
notebooks have printed, so a verdict cannot outlive its evidence. What is drawn from the two files is a table in the
README, between two marks, and one in the last chapter's closing (`tables`), whose links lead to the cells;
`--check` complains when either side has changed.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from course.builder.places import Place, proven, read_pages

BEGIN, END = "<!-- ledger: written by python -m course.builder -->", "<!-- end of ledger -->"
PROVEN = ("reproduced", "in part", "modelled", "contradicted")
VERDICTS = (*PROVEN, "published", "not testable")
EXPLAINED = ("in part", "published", "not testable")  # their notes say what is missing, or why
Row = dict[str, str]


def rows(path: Path) -> list[Row]:
    """The rows of a CSV file by column name, cells stripped."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: (value or "").strip() for key, value in row.items() if key} for row in csv.DictReader(file)]


def ledger_faults(statements: list[Row], verdicts: list[Row], known: Mapping[str, Place]) -> Iterator[str]:
    """Complaints: a statement without a verdict, a verdict without a statement, a proof that no cell gives."""
    said, judged = [row["id"] for row in statements], [row["id"] for row in verdicts]
    for id in sorted({*said} - {*judged}):
        yield f"statement {id} has no verdict in data/ledger.csv"
    for id in sorted({*judged} - {*said}):
        yield f"verdict {id} is about no statement of data/published/statements.csv"
    for id in sorted({id for id in (*said, *judged) if said.count(id) > 1 or judged.count(id) > 1}):
        yield f"{id} stands there more than once"
    for row in verdicts:
        if row["verdict"] not in VERDICTS:
            yield f"{row['id']}: the verdict {row['verdict']!r} is unknown: use {', '.join(VERDICTS)}"
        if row["verdict"] in PROVEN and not row["claims"]:
            yield f"{row['id']} is {row['verdict']} by no claim: name claims, or call it published or not testable"
        if row["verdict"] in EXPLAINED and not row["note"]:
            yield f"{row['id']} is {row['verdict']}: its note must say why"
        for claim in row["claims"].split():
            if claim not in known:
                yield f"{row['id']}: no notebook proves claim {claim}"


def markdown(*lines: tuple[str, ...]) -> str:
    """A table in Markdown; the first line has the columns' names."""
    head, *body = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
    return "\n".join([head.replace("|  |", "| |"), f"|{' --- |' * len(lines[0])}", *body])


def of_notebook(place: Place) -> str:
    """How the README points at a cell: by its notebook, which is all that GitHub can open."""
    return f"notebooks/{place.notebook}.ipynb"


def ledger_table(
    statements: list[Row],
    verdicts: list[Row],
    found: Mapping[str, Place],
    address: Callable[[Place], str] = of_notebook,
) -> str:
    """The table in Markdown: statement, verdict, the claims with links to where they are proven."""
    judged, lines = {row["id"]: row for row in verdicts}, [("", "it is said that", "here", "shown by")]
    for row in statements:
        verdict = judged[row["id"]]
        links = [f"[{claim}]({address(found[claim])})" for claim in verdict["claims"].split()]
        shown = "; ".join(part for part in (", ".join(links), verdict["note"]) if part)
        lines.append((row["id"], row["statement"], f"**{verdict['verdict']}**", shown))
    return markdown(*lines)


def summary(verdicts: list[Row]) -> str:
    """How many statements stand how, as one sentence."""
    counts = [(sum(row["verdict"] == verdict for row in verdicts), verdict) for verdict in VERDICTS]
    return f"{len(verdicts)} statements: " + ", ".join(f"{number} {verdict}" for number, verdict in counts if number)


def folded_ledger(root: Path, found: Mapping[str, Place], address: Callable[[Place], str] = of_notebook) -> str:
    """The ledger as it is now, folded below its summary. ValueError says what is wrong with it."""
    statements, verdicts = rows(root / "data/published/statements.csv"), rows(root / "data/ledger.csv")
    if complaints := list(ledger_faults(statements, verdicts, found)):
        raise ValueError("; ".join(complaints))
    table = ledger_table(statements, verdicts, found, address)
    return f"<details><summary>{summary(verdicts)}</summary>\n\n{table}\n\n</details>"


def with_ledger(text: str, root: Path) -> tuple[str, list[str]]:
    """The README's text with the ledger as it is now, and what there is to complain about in it."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        return text, [f"the README needs the marks {BEGIN} and {END} once each"]
    try:
        folded = folded_ledger(root, proven(read_pages(root / "notebooks")))
    except ValueError as complaints:
        return text, str(complaints).split("; ")
    return text[: text.index(BEGIN)] + f"{BEGIN}\n{folded}\n{END}" + text[text.index(END) + len(END) :], []
