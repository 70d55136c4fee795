"""A guess is a number in range; revealing it says the answer, how far off, in which direction, and why."""

import pytest

from course.ui.predict import predict


def test_a_share_is_revealed_with_its_error_in_points(capsys):
    guess = predict("How much do 16 keys keep?", 0.5)
    guess.reveal(0.93, "attention is peaked")
    assert capsys.readouterr().out.splitlines() == [
        "How much do 16 keys keep? Your guess: 50%",
        "You guessed 50%; it is 93%: 43 percentage points too low.",
        "Why: attention is peaked",
    ]


def test_other_numbers_have_their_own_form_and_unit(capsys):
    predict("How many times?", 8, low=1, high=100, form=".1f", unit="times").reveal(5.5, "bandwidth")
    assert "You guessed 8.0 times; it is 5.5 times: 2.5 times too high." in capsys.readouterr().out


def test_a_guess_that_reads_like_the_answer_is_spot_on(capsys):
    predict("How much?", 0.93).reveal(0.9312, "you knew")
    assert "spot on" in capsys.readouterr().out


@pytest.mark.parametrize("guess", ["half", None, True, float("nan"), float("inf")])
def test_a_guess_must_be_a_number(guess):
    with pytest.raises(ValueError, match="is not a number: write one between 0 and 1"):
        predict("How much?", guess)


@pytest.mark.parametrize("guess", [-0.1, 50])
def test_a_guess_must_be_in_range(guess):
    with pytest.raises(ValueError, match=f"{guess:g} is out of range: write a number between 0 and 1"):
        predict("How much?", guess)


def test_an_answer_without_a_reason_teaches_nothing():
    with pytest.raises(ValueError, match="reason"):
        predict("How much?", 0.5).reveal(0.9, " ")
