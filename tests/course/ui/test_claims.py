"""A claim that holds prints its record; one that does not, or is badly put, is an error that names it."""

import numpy as np
import pytest
import torch

from course.ui.claims import ClaimError, claim


@pytest.mark.parametrize("true", [True, np.True_, torch.tensor(True), torch.tensor([True])])
def test_a_claim_that_holds_prints_one_line(true, capsys):
    claim("kept-by-16", true, "the top 16 keep 93 % of the mass")
    assert capsys.readouterr().out == "✓ [live] the top 16 keep 93 % of the mass\n"


def test_a_recorded_claim_says_so(capsys):
    claim("three-seeds", True, "3 of 3 seeds agree", kind="recorded")
    assert "[recorded]" in capsys.readouterr().out


@pytest.mark.parametrize("false", [False, np.False_, torch.tensor(False)])
def test_a_claim_that_does_not_hold_names_itself(false, capsys):
    with pytest.raises(AssertionError, match=r"kept-by-16 does not hold: the top 16 keep 93 %"):
        claim("kept-by-16", false, "the top 16 keep 93 %")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["kept by 16", "Kept", "kept-", "kept--by", "kept_by", "", None])
def test_a_malformed_name_is_refused(name):
    with pytest.raises(ClaimError, match="words joined by hyphens"):
        claim(name, True, "words")


@pytest.mark.parametrize("condition", ["kept > 0.9", 1, None, (True, "x"), torch.ones(3) > 0, np.ones(2)])
def test_what_merely_counts_as_true_is_no_proof(condition):
    with pytest.raises(ClaimError, match="one truth value"):
        claim("kept-by-16", condition, "words")


@pytest.mark.parametrize("words", ["", "  ", "two\nlines", None])
def test_words_are_one_line(words):
    with pytest.raises(ClaimError, match="one line"):
        claim("kept-by-16", True, words)


def test_the_value_must_be_among_the_words_that_are_compared():
    with pytest.raises(ClaimError, match="94 %"):
        claim("kept-by-16", True, "the top 16 keep 93 %", value="94 %")
    with pytest.raises(ClaimError, match="guessed"):
        claim("kept-by-16", True, "words", kind="guessed")


@pytest.mark.parametrize(("value", "stored"), [("93 %", "93 %"), (None, "they keep 93 %")])
def test_in_a_notebook_the_record_travels_with_the_line(value, stored, monkeypatch):
    published = []
    monkeypatch.setattr("course.ui.claims.publish", lambda bundle, metadata: published.append((bundle, metadata)))
    claim("kept-by-16", True, "they keep 93 %", value=value)
    assert published == [
        (
            {"text/plain": "✓ [live] they keep 93 %"},
            {"claim": {"name": "kept-by-16", "kind": "live", "words": "they keep 93 %", "value": stored}},
        )
    ]
