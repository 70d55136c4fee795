"""The reference page: index, register and glossary name what exists, miss nothing, and every link leads to its cell."""

import json
import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course.builder.choices import choice_faults, choices_table, closings
from course.builder.glossary import glossary_faults, glossary_table
from course.builder.ledger import rows
from course.builder.papers import HOME, Item, exists, index_faults, index_table, items, numbered
from course.builder.places import Place, elsewhere, introduced, mentions, proven, read_prose
from course.builder.tables import TABLES, chapters, table
from project import ROOT

REPORT = [  # everything in the report on V3.2-Exp that has a number
    *("Section 1", "Section 2", "Section 2.1", "Section 2.2", "Section 3", "App. A", "Table 1"),
    *(f"Eq. {n}" for n in (1, 2, 3, 4)),
    *(f"Fig. {n}" for n in (1, 2, 3, 4)),
]
LINK = re.compile(r"\[([^]]+)\]\((\w+)\.ipynb#cell-id=([\w-]+)\)")


@pytest.fixture(scope="module")
def pages():
    return chapters(ROOT)


def cells_of(name):
    """Cells by id, read without the builder."""
    return {cell["id"]: cell for cell in json.loads((ROOT / f"notebooks/{name}.ipynb").read_text("utf-8"))["cells"]}


# The files of the course


def test_the_index_is_sound_and_everything_cited_is_in_it(pages):
    index = rows(ROOT / "data/paper_index.csv")
    assert list(index_faults(index, ROOT, pages, proven(pages))) == []
    assert {*REPORT} <= {item.name for row in index for item in items(row) if item.work == HOME}


def test_the_register_is_sound_and_holds_every_closing(pages):
    assert list(choice_faults(rows(ROOT / "data/choices.csv"), pages, proven(pages))) == []
    assert set(closings(pages)) == {name[:2] for name in pages} - {"00"}


def test_the_glossary_is_sound_and_holds_every_list_of_symbols(pages):
    terms = rows(ROOT / "data/glossary.csv")
    assert list(glossary_faults(terms, pages)) == []
    assert all(row["meaning"].endswith(".") and row["meaning"].count(". ") < 2 for row in terms)


@pytest.mark.parametrize("name", ["12_beyond", "13_reference"])
def test_every_link_leads_to_a_cell_that_has_what_it_promises(name):
    notebooks, count = {}, 0
    for cell in cells_of(name).values():
        for text, target, id in LINK.findall("".join(cell["source"])):
            found = notebooks.setdefault(target, cells_of(target))[id]
            if re.fullmatch(r"C\d+\.\d+", text):
                printed = [output.get("metadata", {}).get("claim", {}).get("id") for output in found["outputs"]]
                assert text in printed, f"{target}, cell {id} does not prove {text}"
            count += 1
    assert count > 60


def test_each_term_occurs_in_every_cell_it_links_to():
    lines = next(cell for cell in cells_of("13_reference").values() if "| term |" in "".join(cell["source"]))["source"]
    forms = {
        row["term"]: [form.lower() for form in row["forms"].split("|")] for row in rows(ROOT / "data/glossary.csv")
    }
    seen = set()
    for line in lines:
        if (term := line.split(" | ")[0].removeprefix("| ")) in forms:
            seen.add(term)
            for _, target, id in LINK.findall(line):
                source = "".join(cells_of(target)[id]["source"]).lower()
                assert any(form in " ".join(source.split()) for form in forms[term]), f"{term}: {target}, cell {id}"
    assert seen == set(forms)


def test_a_table_nobody_draws_is_named():
    with pytest.raises(ValueError, match=r"is unknown: use one of ledger, papers, choices, glossary"):
        table("sky", ROOT)
    assert list(TABLES) == ["ledger", "papers", "choices", "glossary"]


# The paper index, broken


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(report Eq. 3 and 4)", [(HOME, "Eq. 3"), (HOME, "Eq. 4")]),
        ("DeepSeek-V3 report, Eq. 12 to 14", [("V3", "Eq. 12"), ("V3", "Eq. 13"), ("V3", "Eq. 14")]),
        ("DeepSeek-V3.2-Exp report, section 2, Eq. 1", [(HOME, "Section 2"), (HOME, "Eq. 1")]),
        ("(V3's report, sec. 2.2) and Figure 3", [("V3", "Section 2.2"), (HOME, "Fig. 3")]),
        ("Peng et al. 2023, section 3.2; App. A", [("YaRN", "Section 3.2"), ("YaRN", "App. A")]),
        ("Table 1 of the DeepSeek-V2 report; a table of 14", [(HOME, "Table 1")]),
        ("in equation 1, sections 2 and 3", [(HOME, "Eq. 1"), (HOME, "Section 2"), (HOME, "Section 3")]),
    ],
)
def test_citations_are_read_as_a_person_reads_them(text, found):
    assert [item for _, item in numbered(text)] == [Item(*pair) for pair in found]


ROW = {
    "work": HOME, "item": "Eq. 1", "says": "a score", "functions": "dsa.kernels.loops.index_scores",
    "tests": "test_a.py::test_b", "claims": "C3.2", "note": "",
}  # fmt: skip


@pytest.fixture
def house(tmp_path):
    """A project with one module that cites Eq. 1, and one test."""
    for file, text in {"dsa/a.py": '"""Eq. 1."""', "tests/test_a.py": "def test_b():\n    pass\n"}.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(text)
    return tmp_path


def index_complaints(house, *index, pages=None):
    return list(index_faults([ROW | row for row in index], house, pages or {}, {"C3.2": Place("03_x", "y")}))


def test_a_good_index_is_accepted(house):
    assert index_complaints(house, {}) == []


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (
            [{"functions": "dsa.kernels.loops.index_scoring"}],
            "V3.2-Exp Eq. 1: there is no dsa.kernels.loops.index_scoring",
        ),
        ([{"functions": "dsa.kernels.lost.index_scores"}], "there is no dsa.kernels.lost"),
        ([{"functions": "dsa.model.moe.route"}], "the module of dsa.model.moe.route does not cite it"),
        ([{"tests": "test_a.py::test_c"}], "there is no test test_a.py::test_c"),
        ([{"tests": "test_c.py::test_b"}], "there is no test test_c.py::test_b"),
        ([{"claims": "C3.3"}], "no notebook proves claim C3.3"),
        ([{"tests": ""}], "its note must say why"),
        ([{}, {}], "stands there more than once"),
        ([{}, {"work": "V9", "item": "Table 1"}], "the work 'V9' is unknown"),
        ([{}, {"item": "the abstract"}], "no equation, section, figure or table"),
        ([{"item": "Table 1"}], "dsa/a.py cites Eq. 1 of V3.2-Exp, which data/paper_index.csv does not have"),
    ],
)
def test_what_the_index_lacks_is_complained_about(house, index, reason):
    found = index_complaints(house, *index)
    assert len(found) == 1
    assert reason in found[0]


def test_an_equation_cited_in_a_notebook_must_be_in_the_index(house):
    page = new_notebook(cells=[new_markdown_cell("see Eq. 1 and Eq. 7", id="here")])
    assert index_complaints(house, {}, pages={"05_x": page}) == [
        "05_x, cell here cites Eq. 7 of V3.2-Exp, which data/paper_index.csv does not have"
    ]


def test_modules_and_what_is_in_them_exist_and_nothing_else():
    assert exists("dsa.kernels.triton.top_k")
    assert exists("dsa.model.attention.Attention.absorb")
    assert exists("dsa.kernels.loops.EMPTY")
    assert not exists("dsa.model.attention.Attention.adsorb")
    assert not exists("dsa.kernels")


def test_the_index_s_table_links_code_test_and_cell():
    drawn = index_table([ROW], {"C3.2": Place("03_x", "y")})
    assert "[`loops.index_scores`](../dsa/kernels/loops.py)<br>*[b](../tests/test_a.py)*" in drawn
    assert "[C3.2](03_x.ipynb#cell-id=y)" in drawn


# The register, broken

CLOSING = "**What the report does not say, and what we chose.** Ties: later (a; b). Slots: -1; no order.\n\nNext."
CHOICE = {
    "chapter": "04", "topic": "all", "silent": "much", "chosen": "some", "where": "dsa.kernels.loops.select",
    "claims": "", "note": "seen", "closing": "Ties: later | Slots | no order",
}  # fmt: skip


def choice_complaints(**changes):
    page = new_notebook(cells=[new_markdown_cell(CLOSING)])
    return list(choice_faults([CHOICE | changes], {"04_x": page}, {}))


def test_a_good_register_is_accepted():
    assert choice_complaints() == []
    assert "| **04 all**: much | some | [`loops.select`](../dsa/kernels/loops.py)<br>seen |" in choices_table(
        [CHOICE], {}
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"closing": "Ties | Slots"}, "chapter 04 closes with 'no order.'"),
        ({"closing": "Ties | Slots | no order | Next"}, "the chapter's closing does not say 'Next'"),
        ({"where": "dsa.kernels.loops.selects"}, "there is no dsa.kernels.loops.selects"),
        ({"where": ""}, "needs a place in the code"),
        ({"note": ""}, "claims or a note"),
        ({"claims": "C4.1"}, "no notebook proves claim C4.1"),
    ],
)
def test_what_the_register_lacks_is_complained_about(changes, reason):
    found = choice_complaints(**changes)
    assert len(found) == 1
    assert reason in found[0]


# The glossary, small and broken

OPENING = "# 01 Starts: here\n\nComputing: **9 s**.\n\nLetters: `K` tokens. *Prefill* reads; **Words.**"
PAGES = {
    "01_starts": new_notebook(cells=[
        new_markdown_cell(OPENING, id="start"),
        new_markdown_cell("## Two\n\nA tile, and [latents](02_x.ipynb).\n\n<details>a latent</details>", id="two"),
        new_code_cell("# a latent", id="code"),
    ]),
    "02_goes-on": new_notebook(cells=[
        new_markdown_cell("### Exercise: tiles", id="e2-1_task"),
        new_markdown_cell("## More tiles\n\n`K` again; the **latent**.\n\n## Last\n\na pre-tile", id="more"),
    ]),
}  # fmt: skip
TERMS = [
    {"term": "`K`", "forms": "`K`", "meaning": "Kept."},
    {"term": "prefill", "forms": "prefill", "meaning": "Reading."},
    {"term": "tile", "forms": "tile", "meaning": "A part."},
]


def test_a_term_is_introduced_where_it_is_set_off():
    found = mentions(read_prose(PAGES), ["tile"])
    assert [mention.place.cell for mention in found] == ["two", "e2-1_task", "more"]
    assert introduced(found) == Place("02_goes-on", "more"), "neither plain nor in an exercise"
    assert elsewhere(found, introduced(found)) == [Place("01_starts", "two")]
    assert [mention.place.cell for mention in mentions(read_prose(PAGES), ["latent"])] == ["more"], (
        "no links, nothing folded, no code"
    )


def test_the_glossary_says_where():
    drawn = glossary_table(TERMS, PAGES).splitlines()
    assert (
        drawn[2] == "| `K` | Kept. | [01 Starts](01_starts.ipynb#cell-id=start) | [02](02_goes-on.ipynb#cell-id=more) |"
    )
    assert drawn[4].startswith("| tile | A part. | [02 More tiles](02_goes-on.ipynb#cell-id=more) |")


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        (TERMS[1:], "01_starts explains `K` at its start, and data/glossary.csv does not have it"),
        (TERMS[::2], "01_starts explains Prefill at its start"),
        ([*TERMS, TERMS[0]], "`K` stands there more than once"),
        ([*TERMS, {"term": "tie", "forms": "tie", "meaning": "Equal."}], "no chapter speaks of tie"),
        ([*TERMS[:2], TERMS[2] | {"meaning": ""}], "tile has no meaning"),
    ],
)
def test_what_the_glossary_lacks_is_complained_about(terms, reason):
    found = list(glossary_faults(terms, PAGES))
    assert len(found) == 1
    assert reason in found[0]
    assert list(glossary_faults(TERMS, PAGES)) == []


def test_claims_are_found_in_the_cells_that_printed_them():
    printed = new_output("display_data", data={"text/plain": "✓"}, metadata={"claim": {"id": "C1.1"}})
    page = new_notebook(cells=[new_code_cell("claim()", id="proof", outputs=[printed])])
    assert proven({"01_x": page}) == {"C1.1": Place("01_x", "proof")}
