"""The tables of the reference chapter, drawn from four CSV files in `data/`, and the check that their links lead home.

* `ledger.csv`: how each statement of the article and the report (`published/statements.csv`) fares here.
* `paper_index.csv`: an equation, section, figure or table -> the code that computes it, a test of it, a cell.
* `choices.csv`: what the report leaves open, and what was chosen.
* `glossary.csv`: what a word means, and the cell that introduces it.

A row names claims, dotted names of functions, tests as `folder/test_file.py::test_name` and cells as `NOTEBOOK#CELL`.
Each of them must exist, or the table is refused: a verdict cannot outlive its evidence, nor an entry what it points to.
A claim lies in the cell that makes it; as a cell is named after its first claim or exercise (`source`), links stay
right while a chapter grows around them.
"""

import ast
import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc import locate

import nbformat
from nbformat import NotebookNode

from course.builder.prose import claim_records

Row = dict[str, str]
PROVEN = ("reproduced", "in part", "modelled", "contradicted")  # verdicts that need claims
EXPLAINED = ("in part", "published", "not testable")  # verdicts whose notes say what is missing, or why
VERDICTS = ("reproduced", "in part", "modelled", "contradicted", "published", "not testable")
WORKS = {
    "V3.2-Exp": "DeepSeek-V3.2-Exp",
    "V3": "DeepSeek-V3 (arXiv 2412.19437)",
    "V2": "DeepSeek-V2 (arXiv 2405.04434)",
    "YaRN": "Peng et al. 2023, YaRN (arXiv 2309.00071)",
}


class CellIndex:
    """What links can lead to: claims and cells of executed notebooks, code and tests of the project."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.errors: list[str] = []
        self.cells: dict[str, set[str]] = {}
        self.claim_cells: dict[str, str] = {}  # claim -> NOTEBOOK#CELL
        for path in sorted((root / "notebooks").glob("*.ipynb")):
            notebook = nbformat.read(path, as_version=4)
            self.cells[path.stem] = {cell.id for cell in notebook.cells}
            for cell in notebook.cells:
                for made in claim_records(NotebookNode(cells=[cell])):
                    self.require(made.name not in self.claim_cells, f"{made.name} is claimed in {path.stem} and before")
                    self.claim_cells[made.name] = f"{path.stem}#{cell.id}"

    def rows(self, name: str) -> list[Row]:
        """The rows of a CSV file of data/ by column name."""
        with (self.root / "data" / name).open(encoding="utf-8", newline="") as file:
            return [{key: (value or "").strip() for key, value in row.items() if key} for row in csv.DictReader(file)]

    def require(self, condition: object, error: str) -> bool:
        """Note an error unless the condition holds; all are collected, so that one build names every dead link."""
        if not condition:
            self.errors.append(error)
        return bool(condition)

    def cell(self, cell_ref: str, text: str, of: str) -> str:
        """A link to a cell, NOTEBOOK#CELL."""
        notebook, _, cell = cell_ref.partition("#")
        self.require(cell in self.cells.get(notebook, ()), f"{of}: there is no cell {cell_ref}")
        return f"[{text}]({notebook}.ipynb#cell-id={cell})"

    def claims(self, names: str, of: str) -> str:
        """Links to the cells that make these claims, named by chapter."""
        links = []
        for name in names.split():
            if self.require(name in self.claim_cells, f"{of}: no cell claims {name}"):
                cell_ref = self.claim_cells[name]
                links.append(self.cell(cell_ref, f"{cell_ref.partition('_')[0]} {name}", of))
        return ", ".join(links)

    def code(self, names: str, of: str) -> str:
        """Links to the files of functions, classes or modules, named without their room."""
        notebooks, links = self.root / "notebooks", []
        for name in names.split():
            file = source_file(self.root, name)
            if self.require(file, f"{of}: there is no {name}") and file:
                inside = file.is_relative_to(notebooks)  # links are followed from the notebooks' folder
                target = file.relative_to(notebooks) if inside else f"../{file.relative_to(self.root)}"
                links.append(f"[`{'.'.join(name.split('.')[2:])}`]({target})")
        return ", ".join(links)

    def tests(self, names: str, of: str) -> str:
        """Links to the files of tests, whose names are sentences."""
        pairs = [name.split("::") for name in names.split()]
        for file, function in pairs:
            path = self.root / "tests" / file
            # parsed, not imported: a test module's imports may take seconds
            tree = ast.parse(path.read_text("utf-8") if path.is_file() else "")
            there = any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)
            self.require(there, f"{of}: there is no test {file}::{function}")
        said = [f"[{function.removeprefix('test_').replace('_', ' ')}](../tests/{file})" for file, function in pairs]
        return f"*{'; '.join(said)}*" if said else ""


def source_file(root: Path, name: str) -> Path | None:
    """The file of a module, or of the module that has what a dotted name says; None if there is no such thing."""
    folder = root / "notebooks" if name.startswith("course.") else root
    parts = name.split(".")
    for end in range(len(parts), 0, -1):  # the longest prefix that is a module; what is left are attributes of it
        file = folder.joinpath(*parts[:end]).with_suffix(".py")
        if file.is_file():
            return file if end == len(parts) or locate(name) is not None else None
    return None


def markdown(*lines: tuple[str, ...]) -> str:
    """A table in Markdown; the first line has the columns' names."""
    head, *body = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
    return "\n".join([head.replace("|  |", "| |"), f"|{' --- |' * len(lines[0])}", *body])


def _joined(*parts: str, by: str = "<br>") -> str:
    return by.join(filter(None, parts))


def ledger(index: CellIndex) -> str:
    """What is said, and what stands: statement, verdict, evidence; folded below a count of the verdicts."""
    judged = {row["id"]: row for row in index.rows("ledger.csv")}
    statements = index.rows("published/statements.csv")
    said = [row["id"] for row in statements]
    index.require(sorted(said) == sorted(judged), "data/ledger.csv: its ids are not those of published/statements.csv")
    lines = [("", "it is said that", "here", "shown by")]
    for row in statements:
        own = judged.get(row["id"], {"verdict": "", "claims": "", "note": ""})
        of, verdict = f"statement {row['id']}", own["verdict"]
        index.require(verdict in VERDICTS, f"{of}: the verdict {verdict!r} is unknown: use {', '.join(VERDICTS)}")
        index.require(own["claims"] or verdict not in PROVEN, f"{of} is {verdict} by no claim")
        index.require(own["note"] or verdict not in EXPLAINED, f"{of} is {verdict}: its note must say why")
        shown = _joined(index.claims(own["claims"], of), own["note"], by="; ")
        lines.append((row["id"], row["statement"], f"**{verdict}**", shown))
    counts = [f"{n} {verdict}" for verdict in VERDICTS if (n := sum(r["verdict"] == verdict for r in judged.values()))]
    summary = f"{len(statements)} statements: {', '.join(counts)}"
    return f"<details><summary>{summary}</summary>\n\n{markdown(*lines)}\n\n</details>"


def papers(index: CellIndex) -> str:
    """Equation, section, figure -> function -> test -> cell: a table for each report."""
    lines: dict[str, list[tuple[str, ...]]] = {work: [] for work in WORKS}
    for row in index.rows("paper_index.csv"):
        of = f"{row['work']} {row['item']}"
        if not index.require(row["work"] in WORKS, f"{of}: the work is unknown: use {', '.join(WORKS)}"):
            continue
        whole = all(row[column] for column in ("functions", "tests", "claims"))
        index.require(whole or row["note"], f"{of} names no function, no test or no claim: its note must say why")
        code = _joined(index.code(row["functions"], of), index.tests(row["tests"], of))
        shown = _joined(index.claims(row["claims"], of), row["note"], by="; ")
        lines[row["work"]].append((row["item"], row["says"], code, shown))
    head = ("item", "what it says", "code, *what is tested*", "shown by")
    return "\n\n".join(f"**{WORKS[work]}**\n\n{markdown(head, *body)}" for work, body in lines.items())


def choices(index: CellIndex) -> str:
    """What the report does not say, and what was chosen."""
    lines = [("not said", "chosen", "see")]
    for row in index.rows("choices.csv"):
        of = f"choice {row['topic']!r}"
        index.require(row["where"] and (row["claims"] or row["note"]), f"{of} needs code, and a claim or a note")
        see = _joined(index.code(row["where"], of), index.claims(row["claims"], of), row["note"])
        lines.append((f"**{row['topic']}**: {row['silent']}", row["chosen"], see))
    return markdown(*lines)


def glossary(index: CellIndex) -> str:
    """Every term, with a link to the cell that introduces it."""
    terms = index.rows("glossary.csv")
    names = [row["term"] for row in terms]
    for twice in sorted({name for name in names if names.count(name) > 1}):
        index.require(False, f"the glossary has {twice} more than once")
    lines = [("term", "in plain words", "introduced")]
    for row in terms:
        of = f"the glossary's {row['term']}"
        index.require(row["meaning"], f"{of} has no meaning")
        chapter = row["cell"].partition("#")[0].replace("_", " ")  # in words: "04 token selection"
        lines.append((row["term"], row["meaning"], index.cell(row["cell"], chapter, of)))
    return markdown(*lines)


TABLES: Mapping[str, Callable[[CellIndex], str]] = {
    "ledger": ledger, "papers": papers, "choices": choices, "glossary": glossary,
}  # fmt: skip


def table(name: str, root: Path) -> str:
    """A table in Markdown. ValueError says which name is unknown, or which links lead nowhere."""
    if name not in TABLES:
        raise ValueError(f"is unknown: use one of {', '.join(TABLES)}")
    index = CellIndex(root)
    drawn = TABLES[name](index)
    if index.errors:
        raise ValueError("; ".join(index.errors))
    return drawn
