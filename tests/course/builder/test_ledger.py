"""Every statement of the article and the report has a verdict, and every verdict stands on what a cell has proven."""

import pytest

from course.builder.ledger import BEGIN, END, VERDICTS, ledger_faults, ledger_table, rows, summary, with_ledger
from course.builder.places import Place, proven, read_pages
from project import ROOT

STATEMENTS = [{"id": "A01", "statement": "it is cheaper"}, {"id": "R01", "statement": "Eq. 1 | a sum"}]
VERDICT = {"id": "A01", "verdict": "modelled", "claims": "C1.9 C1.25", "note": "from 10 thousand tokens on"}
OTHER = {"id": "R01", "verdict": "published", "claims": "", "note": "nobody outside can measure it"}
KNOWN = {"C1.9": Place("01_attention", "one-pair_3"), "C1.25": Place("01_attention", "bytes")}


def complaints(*verdicts, statements=STATEMENTS):
    return list(ledger_faults(statements, list(verdicts), KNOWN))


def test_the_course_s_ledger_is_complete_and_proven():
    statements, verdicts = rows(ROOT / "data/published/statements.csv"), rows(ROOT / "data/ledger.csv")
    assert len(statements) == 50
    assert list(ledger_faults(statements, verdicts, proven(read_pages(ROOT / "notebooks")))) == []


def test_the_readme_holds_it_as_it_is_now():
    text = (ROOT / "README.md").read_text("utf-8")
    assert with_ledger(text, ROOT) == (text, [])


def test_a_good_ledger_is_accepted():
    assert complaints(VERDICT, OTHER) == []


@pytest.mark.parametrize(
    ("verdicts", "reason"),
    [
        ((VERDICT,), "R01 has no verdict"),
        ((VERDICT, OTHER, OTHER | {"id": "R99"}), "R99 is about no statement"),
        ((VERDICT, VERDICT, OTHER), "more than once"),
        ((VERDICT | {"verdict": "true"}, OTHER), "'true' is unknown"),
        ((VERDICT | {"claims": ""}, OTHER), "by no claim"),
        ((VERDICT, OTHER | {"note": ""}), "must say why"),
        ((VERDICT | {"verdict": "in part", "note": ""}, OTHER), "must say why"),
        ((VERDICT | {"claims": "C1.9 C9.99"}, OTHER), "no notebook proves claim C9.99"),
    ],
)
def test_what_does_not_stand_is_complained_about(verdicts, reason):
    found = complaints(*verdicts)
    assert len(found) == 1
    assert reason in found[0]


def test_the_table_links_each_claim_to_its_notebook_and_survives_bars():
    table = ledger_table(STATEMENTS, [VERDICT, OTHER], KNOWN)
    assert "[C1.25](notebooks/01_attention.ipynb); from 10 thousand tokens on |" in table
    assert r"Eq. 1 \| a sum" in table
    assert len(table.splitlines()) == 2 + len(STATEMENTS)
    inside = ledger_table(STATEMENTS, [VERDICT, OTHER], KNOWN, lambda place: place.address)
    assert "[C1.9](01_attention.ipynb#cell-id=one-pair_3)" in inside
    assert summary([VERDICT, OTHER]) == "2 statements: 1 modelled, 1 published"
    assert len(set(VERDICTS)) == len(VERDICTS)


def test_a_readme_without_its_marks_is_left_alone():
    for text in ("no marks", f"{BEGIN}{BEGIN}{END}"):
        assert with_ledger(text, ROOT)[0] == text
        assert "once each" in with_ledger(text, ROOT)[1][0]
