"""Claims: sentences of the course that a cell has just proved.

A textbook states; a notebook can prove. `claim` asserts its condition and prints one line, and that printed
line *is* the record: there is no list of claims kept anywhere on the side that could disagree with it. nbval
compares the line whenever the notebook is run as a test, and the builder reads it to fill the placeholders
`{claim:kept-by-16}` of the prose, so a number in a paragraph cannot differ from the number that was measured.

A claim is *live* when its cell computes what it asserts (one seed, a wide margin), and *recorded* when it
asserts what a stored measurement says (several seeds, kept under data/ with the command that makes it anew).
"""

import re
from contextlib import suppress
from typing import Any, Literal

from course.ui.output import publish

Kind = Literal["live", "recorded"]
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class ClaimError(ValueError):
    """The claim itself is badly put: its name, its words or its condition cannot be used."""


def claim(name: str, condition: Any, words: str, kind: Kind = "live", value: str | None = None) -> None:
    """Assert `condition` and print it as one line such as `✓ [live] the top 16 keep 93 % of the mass`.

    `name` is words joined by hyphens, and no other claim's; `condition` one truth value (bool, NumPy bool or a tensor
    with one element); `words` one line with few digits, since outputs are compared between processors; `value` the part
    of `words` that `{claim:NAME}` stands for in prose (all of them when it is not given). Raises AssertionError with
    name and words when the condition is false, ClaimError when the claim is badly put.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ClaimError(f"claim name {name!r} is not words joined by hyphens: write for example 'kept-by-16'")
    if not isinstance(words, str) or not words.strip() or "\n" in words:
        raise ClaimError(f"{name}: its words are {words!r}, and must be one line that says what is claimed")
    if kind not in ("live", "recorded"):
        raise ClaimError(f"{name}: kind {kind!r} is unknown: use 'live' or 'recorded'")
    if value is not None and (not value or value not in words):
        raise ClaimError(f"{name}: the value {value!r} must be part of the words, {words!r}, which tests compare")
    if not _strict_bool(name, condition):
        raise AssertionError(f"{name} does not hold: {words}")
    record = {"name": name, "kind": kind, "words": words, "value": words if value is None else value}
    # the record travels in the output's metadata: nbval compares the text alone, the builder reads both
    publish({"text/plain": f"✓ [{kind}] {words}"}, metadata={"claim": record})


def _strict_bool(name: str, condition: Any) -> bool:
    """One truth value, and nothing that merely counts as true: a string would make every claim hold."""
    truth = condition
    if hasattr(condition, "item"):  # a tensor or NumPy value
        with suppress(RuntimeError, ValueError):  # more than one element
            truth = condition.item()
    if not isinstance(truth, bool):
        raise ClaimError(f"{name}: its condition is of type {type(condition).__name__}, and must be one truth value")
    return truth
