"""The paper index: an equation, section, figure or table -> the code that computes it, a test of that code, a cell.

`data/paper_index.csv` has a row for each: which report (`work`), which `item` of it, what it `says` in our words, and
then `functions` (dotted names), `tests` (file::function) and `claims`; a row that lacks one of these has a `note` that
says why. Complaints go both ways: a row whose function, test or claim does not exist, an equation whose code does not
cite it, and an equation, section or figure that is cited anywhere in `dsa/` or in a notebook and has no row.

A citation is read as a person would read it: "Eq. 3 and 4" are two, "Eq. 1 to 5" are five, and they belong to the
report named just before, or else to the one that the course is about.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc import locate
from typing import NamedTuple

from course.builder.ledger import Row, markdown
from course.builder.places import Pages, Place, claim_links, unproven

PROJECT = Path(__file__).resolve().parents[3]
HOME = "V3.2-Exp"  # the report that "the report" means
KINDS = {"eq": "Eq.", "se": "Section", "fi": "Fig.", "ta": "Table", "ap": "App."}
NUMBER = r"\d+(?:\.\d+)*"
CITED = re.compile(
    rf"\b(Eqs?\.|[Ee]quations?|[Ss]ections?|[Ss]ecs?\.|[Ff]ig(?:ures?|s?\.)|[Tt]able|App(?:endix|\.))\s+"
    rf"({NUMBER}(?:(?:,| and| or| to)\s+{NUMBER})*|[A-Z]\b)"
)
WORKS = re.compile(r"(?P<V3>V3(?:'s)? report)|(?P<V2>V2(?:'s)? report)|(?P<YaRN>Peng et al\. 2023)|(?P<home>[Rr]eport)")
HEAD = ("item", "what it says", "code, *what is tested*", "shown by")
CLAUSE = 50  # letters before a citation in which the report it belongs to may be named
TITLES = {
    HOME: "DeepSeek-V3.2-Exp",
    "V3": "DeepSeek-V3 (arXiv 2412.19437)",
    "V2": "DeepSeek-V2 (arXiv 2405.04434)",
    "YaRN": "Peng et al. 2023, YaRN (arXiv 2309.00071)",
}


class Item(NamedTuple):
    """One numbered thing in one report, such as ("V3", "Eq. 21")."""

    work: str
    name: str


def numbered(text: str, work: str | None = None) -> Iterator[tuple[int, Item]]:
    """Every equation, section, figure and table that a text cites, and at which letter."""
    for cited in CITED.finditer(text):
        kind = KINDS[cited[1][:2].lower()]
        for number in _numbers(cited[2]):
            yield cited.start(), Item(work or _work(text[: cited.start()]), f"{kind} {number}")


def _numbers(text: str) -> list[str]:
    """The numbers of "3 and 4", of "21, 22", and of "1 to 5" with those between."""
    found = re.findall(rf"{NUMBER}|[A-Z]$", text)
    return [str(n) for n in range(int(found[0]), int(found[1]) + 1)] if " to " in text else found


def _work(before: str) -> str:
    """Which report is meant after these words: the last one named in the clause."""
    clause = re.split(r"[()]", before)[-1][-CLAUSE:]
    named = [found.lastgroup for found in WORKS.finditer(clause)]
    return HOME if not named or named[-1] in (None, "home") else str(named[-1])


def citations(root: Path, pages: Pages) -> Iterator[tuple[str, Item]]:
    """Everything cited in the package and in the notebooks, and by whom."""
    texts = {str(path.relative_to(root)): path.read_text("utf-8") for path in sorted((root / "dsa").rglob("*.py"))}
    texts |= {f"{name}, cell {cell.id}": cell.source for name, page in pages.items() for cell in page.cells}
    for where, text in texts.items():
        yield from ((where, item) for _, item in numbered(flat(text)))


def flat(text: str) -> str:
    """A text as one line: without line ends, and without the signs that begin comments, headings and quotations."""
    return re.sub(r"[\s#>]+", " ", text)


def items(row: Row) -> list[Item]:
    """What a row is about; "Eq. 1 to 5" are five."""
    return [item for _, item in numbered(row["item"], row["work"])]


def index_faults(index: list[Row], root: Path, pages: Pages, found: Mapping[str, Place]) -> Iterator[str]:
    """Complaints about the index: what it names and is not there, and what is cited and not in it."""
    known = [item for row in index for item in items(row)]
    for row in index:
        for fault in (*_row_faults(row, root), *unproven(row["claims"], found)):
            yield f"{row['work']} {row['item']}: {fault}"
    for twice in sorted({item for item in known if known.count(item) > 1}):
        yield f"{twice.work} {twice.name} stands there more than once"
    for where, item in citations(root, pages):
        if item not in known:
            yield f"{where} cites {item.name} of {item.work}, which data/paper_index.csv does not have"


def _row_faults(row: Row, root: Path) -> Iterator[str]:
    if not items(row):
        yield "its item is no equation, section, figure or table with a number"
    if row["work"] not in TITLES:
        yield f"the work {row['work']!r} is unknown: use {', '.join(TITLES)}"
    if not row["note"] and not all(row[column] for column in ("functions", "tests", "claims")):
        yield "it names no function, no test or no claim: its note must say why"
    for name in row["functions"].split():
        if not exists(name):
            yield f"there is no {name}"
        elif row["item"].startswith("Eq.") and not {*items(row)} <= {*_cited_with(name)}:
            yield f"the module of {name} does not cite it"
    for test in row["tests"].split():
        if not has_test(root, test):
            yield f"there is no test {test}"


def home(name: str) -> Path:
    """The folder in which the package of a dotted name lies."""
    return PROJECT / "notebooks" if name.startswith("course.") else PROJECT


def file_of(name: str) -> Path | None:
    """The file of the module that a dotted name begins with, or None; nothing is imported."""
    parts = name.split(".")
    files = [home(name).joinpath(*parts[:end]).with_suffix(".py") for end in range(len(parts), 0, -1)]
    return next((file for file in files if file.is_file()), None)


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something that its module has."""
    file = file_of(name)
    return file is not None and (
        file == home(name).joinpath(*name.split(".")).with_suffix(".py") or locate(name) is not None
    )


def _cited_with(name: str) -> list[Item]:
    file = file_of(name)
    return [item for _, item in numbered(flat(file.read_text("utf-8")))] if file else []


def has_test(root: Path, name: str) -> bool:
    """Whether tests/FILE has a function of this name: "kernels/test_kernels.py::test_x"."""
    file, _, function = name.partition("::")
    path = root / "tests" / file
    if not path.is_file():
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in ast.parse(path.read_text()).body)


def code_links(names: str) -> str:
    """Functions as links to the files they are in, named without the room."""
    files = {name: file.relative_to(PROJECT) for name in names.split() if (file := file_of(name))}
    return ", ".join(f"[`{'.'.join(name.split('.')[2:])}`](../{file})" for name, file in files.items())


def links_to_tests(names: str) -> str:
    """Tests as links to their files: the functions' names, which are sentences, as such."""
    pairs = [name.split("::") for name in names.split()]
    said = [f"[{function.removeprefix('test_').replace('_', ' ')}](../tests/{file})" for file, function in pairs]
    return f"*{'; '.join(said)}*" if said else ""


def index_table(index: list[Row], found: Mapping[str, Place]) -> str:
    """The index in Markdown: a table for each report."""
    parts = []
    for work, title in TITLES.items():
        lines = [
            (
                row["item"],
                row["says"],
                "<br>".join(filter(None, (code_links(row["functions"]), links_to_tests(row["tests"])))),
                "; ".join(part for part in (claim_links(row["claims"], found), row["note"]) if part),
            )
            for row in index
            if row["work"] == work
        ]
        parts.append(f"**{title}**\n\n{markdown(HEAD, *lines)}")
    return "\n\n".join(parts)
