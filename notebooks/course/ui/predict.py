"""Predict, then run: commit to a number before you see it.

A surprise is remembered, but only by someone who expected something else. So the reader writes down a guess
in one cell, and a later cell reveals the measured answer, how far off the guess was, and why the answer is
what it is. The guess is an ordinary value that the first cell returns and the second one uses; nothing is
kept behind the scenes.
"""

from dataclasses import dataclass
from math import isfinite
from numbers import Real

from course.ui.style import wrap_lines


@dataclass(frozen=True)
class Guess:
    """What the reader committed to. `form` is the format in which its numbers are said, such as ".0%"."""

    question: str
    value: float
    form: str = ".0%"
    unit: str = ""

    def reveal(self, answer: float, why: str) -> None:
        """Print guess, answer, the error between them, and the reason `why`, which must not be empty."""
        if not why.strip():
            raise ValueError("reveal needs the reason why the answer is what it is: it is the point of guessing")
        guessed, measured = self._format(self.value), self._format(answer)
        if guessed == measured:  # as printed: nobody is told off for digits that are not shown
            error = "spot on"
        else:
            gap = abs(self.value - float(answer))
            # shares differ in percentage points: "10 % too low" could mean a tenth of the answer
            far = f"{100 * gap:.0f} percentage points" if self.form.endswith("%") else self._format(gap)
            error = f"{far} too {'low' if self.value < answer else 'high'}"
        print(f"You guessed {guessed}; it is {measured}: {error}.")
        print(wrap_lines(f"Why: {why}"))

    def _format(self, number: float) -> str:
        text = format(float(number), self.form)
        return f"{text} {self.unit}".strip()


def predict(
    question: str, guess: float, low: float = 0.0, high: float = 1.0, form: str = ".0%", unit: str = ""
) -> Guess:
    """Write down a guess between `low` and `high`, print it, and return it for a later `guess.reveal(answer,
    why)`.

    >>> guess = predict("How many times faster?", 5, low=1, high=100, form=".1f", unit="times")
    How many times faster? Your guess: 5.0 times
    """
    if isinstance(guess, bool) or not isinstance(guess, Real) or not isfinite(guess):
        raise ValueError(f"your guess {guess!r} is not a number: write one between {low:g} and {high:g}")
    if not low <= guess <= high:
        raise ValueError(f"your guess {guess:g} is out of range: write a number between {low:g} and {high:g}")
    committed = Guess(question, float(guess), form, unit)
    print(f"{question} Your guess: {committed._format(committed.value)}")
    return committed
