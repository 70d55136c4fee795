"""The reference page: its tables name what exists, verdicts stand on evidence, and every link leads to its cell."""

import csv
import json
import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, writes

from course.builder.reference_tables import TABLES, CellIndex, source_file, table
from project import DATA, NOTEBOOKS, ROOT

REPORT = [  # everything in the report on V3.2-Exp that has a number
    *("Section 1", "Section 2", "Section 2.1", "Section 2.2", "Section 3", "App. A", "Table 1"),
    *(f"Eq. {n}" for n in (1, 2, 3, 4)),
    *(f"Fig. {n}" for n in (1, 2, 3, 4)),
]
LINK = re.compile(r"\[([^]]+)\]\((\w+)\.ipynb#cell-id=([\w-]+)\)")


# The tables of the course


@pytest.mark.parametrize("name", TABLES)
def test_it_is_drawn_and_every_name_in_it_leads_somewhere(name):
    assert table(name, ROOT).count("\n| ") > 20


def test_the_index_has_every_numbered_thing_of_the_report():
    rows = CellIndex(ROOT).rows("paper_index.csv")
    assert {*REPORT} <= {row["item"] for row in rows if row["work"] == "V3.2-Exp"}


def test_every_statement_is_judged():
    with (DATA / "published/statements.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 50 == len(CellIndex(ROOT).rows("ledger.csv"))


def test_a_link_to_a_claim_leads_to_the_cell_that_printed_it():
    cells, count = {}, 0
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        cells[notebook.stem] = {cell["id"]: cell for cell in json.loads(notebook.read_text("utf-8"))["cells"]}
    for cell in cells["13_reference"].values():
        for text, notebook, id in LINK.findall("".join(cell["source"])):
            found = cells[notebook][id]
            chapter, _, claim = text.partition(" ")
            if notebook.startswith(f"{chapter}_") and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", claim):
                printed = [output.get("metadata", {}).get("claim", {}).get("name") for output in found["outputs"]]
                assert claim in printed, f"{notebook}, cell {id} does not make the claim {claim}"
                count += 1
    assert count > 150


def test_a_table_nobody_draws_is_named():
    with pytest.raises(ValueError, match=r"is unknown: use one of ledger, papers, choices, glossary"):
        table("sky", ROOT)


# A small course, broken in many ways

PAPER = {
    "work": "V3.2-Exp", "item": "Eq. 1", "says": "a score | a sum", "functions": "dsa.kernels.loops.index_scores",
    "tests": "test_a.py::test_b", "claims": "first second", "note": "",
}  # fmt: skip
CHOICE = {"topic": "all", "silent": "much", "chosen": "some", "where": "dsa.kernels.loops", "claims": "", "note": "it"}
STATEMENT = {"id": "A01", "source": "article", "statement": "it is cheaper"}
VERDICT = {"id": "A01", "verdict": "modelled", "claims": "first", "note": "from 10 thousand tokens on"}
TERM = {"term": "tile", "meaning": "A part.", "cell": "04_x#start"}


def made(name):
    return new_output("display_data", data={"text/plain": "✓"}, metadata={"claim": {"name": name}})


@pytest.fixture
def house(tmp_path):
    """A project with one function, one test, and one chapter whose second cell makes two claims."""
    proof = new_code_cell("…", id="first", outputs=[made("first"), made("second")])
    cells = [new_markdown_cell("# Start", id="start"), proof]
    for file, text in {
        "dsa/kernels/loops.py": "",
        "tests/test_a.py": "def test_b():\n    pass\n",
        "notebooks/04_x.ipynb": writes(new_notebook(cells=cells)),
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


def drawn(house, name, **rows):
    """A table from these rows; what is wrong with it is the ValueError."""
    for file, given in rows.items():
        path = house / "data" / f"{file.replace('__', '/')}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as out:
            writer = csv.DictWriter(out, given[0])
            writer.writeheader()
            writer.writerows(given)
    return table(name, house)


def test_the_index_links_code_test_and_cell(house):
    text = drawn(house, "papers", paper_index=[PAPER])
    assert "| [`loops.index_scores`](../dsa/kernels/loops.py)<br>*[b](../tests/test_a.py)* |" in text
    assert "| [04 first](04_x.ipynb#cell-id=first), [04 second](04_x.ipynb#cell-id=first) |" in text
    assert r"a score \| a sum" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"functions": "dsa.kernels.loops.index_scoring"},
            "V3.2-Exp Eq. 1: there is no dsa.kernels.loops.index_scoring",
        ),
        ({"functions": "dsa.kernels.lost.index_scores"}, "there is no dsa.kernels.lost.index_scores"),
        ({"tests": "test_a.py::test_c"}, "there is no test test_a.py::test_c"),
        ({"tests": "test_c.py::test_b"}, "there is no test test_c.py::test_b"),
        ({"claims": "third"}, "no cell claims third"),
        ({"tests": ""}, "its note must say why"),
        ({"work": "V9"}, "the work is unknown: use V3.2-Exp"),
    ],
)
def test_what_the_index_lacks_is_complained_about(house, changes, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        drawn(house, "papers", paper_index=[PAPER | changes])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": "A02"}, "its ids are not those of published/statements.csv"),
        ({"verdict": "true"}, "the verdict 'true' is unknown"),
        ({"claims": ""}, "statement A01 is modelled by no claim"),
        ({"claims": "first third"}, "statement A01: no cell claims third"),
        ({"verdict": "published", "claims": "", "note": ""}, "its note must say why"),
        ({"verdict": "in part", "note": ""}, "its note must say why"),
    ],
)
def test_a_verdict_that_does_not_stand_is_complained_about(house, changes, reason):
    good = drawn(house, "ledger", ledger=[VERDICT], published__statements=[STATEMENT])
    assert "<summary>1 statements: 1 modelled</summary>" in good and "; from 10 thousand tokens on |" in good
    with pytest.raises(ValueError, match=re.escape(reason)):
        drawn(house, "ledger", ledger=[VERDICT | changes])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"where": "dsa.kernels.lost"}, "choice 'all': there is no dsa.kernels.lost"),
        ({"where": ""}, "needs code, and a claim or a note"),
        ({"note": ""}, "needs code, and a claim or a note"),
        ({"claims": "third"}, "no cell claims third"),
    ],
)
def test_a_choice_that_nothing_shows_is_complained_about(house, changes, reason):
    assert "| **all**: much | some | [`loops`](../dsa/kernels/loops.py)<br>it |" in drawn(
        house, "choices", choices=[CHOICE]
    )
    with pytest.raises(ValueError, match=re.escape(reason)):
        drawn(house, "choices", choices=[CHOICE | changes])


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ([TERM | {"cell": "04_x#end"}], "the glossary's tile: there is no cell 04_x#end"),
        ([TERM | {"cell": "05_x#start"}], "there is no cell 05_x#start"),
        ([TERM | {"meaning": ""}], "the glossary's tile has no meaning"),
        ([TERM, TERM], "the glossary has tile more than once"),
    ],
)
def test_a_term_without_meaning_or_place_is_complained_about(house, terms, reason):
    assert "| tile | A part. | [04 x](04_x.ipynb#cell-id=start) |" in drawn(house, "glossary", glossary=[TERM])
    with pytest.raises(ValueError, match=re.escape(reason)):
        drawn(house, "glossary", glossary=terms)


def test_a_claim_is_made_once_in_the_whole_course(house):
    again = new_notebook(cells=[new_code_cell("…", id="first", outputs=[made("first")])])
    (house / "notebooks/05_y.ipynb").write_text(writes(again))
    with pytest.raises(ValueError, match="first is claimed in 05_y and before"):
        drawn(house, "glossary", glossary=[TERM])


def test_modules_and_what_is_in_them_exist_and_nothing_else():
    assert source_file(ROOT, "dsa.kernels.triton.top_k") == ROOT / "dsa/kernels/triton/top_k.py"
    assert source_file(ROOT, "dsa.model.attention.Attention.absorb_query") == ROOT / "dsa/model/attention.py"
    assert source_file(ROOT, "course.figures.needle") == NOTEBOOKS / "course/figures/needle.py"
    assert source_file(ROOT, "dsa.model.attention.Attention.adsorb") is None
    assert source_file(ROOT, "dsa.kernels") is None
