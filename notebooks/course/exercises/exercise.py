"""Exercises from one source: the solution is a real function, and everything a reader sees comes from it.

The stub shown in the notebook is the solution's signature and docstring with the body taken out, and the
solution folded away below it is the function's own source: neither can be out of date. The checker is a
function too, and it is tested like one, because a checker that accepts everything teaches nothing: each
exercise names at least three wrong answers that somebody might well give, and a test holds the checker to
refusing every one of them.

A refusal is a sentence, never a traceback. A stub that was not touched is not a mistake, so that a notebook
runs from top to bottom, unsolved, without an error.
"""

import ast
import inspect
import linecache
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

Answer = Callable[..., Any]


class Refused(AssertionError):
    """A checker's reason why an answer is wrong: one helpful sentence to the reader."""


class NotTried(Exception):
    """The answer is still the stub."""


def require(condition: Any, reason: str) -> None:
    """What checkers are made of: refuse the answer with `reason` unless `condition` holds."""
    if not condition:
        raise Refused(reason)


@dataclass(frozen=True)
class Exercise:
    """One exercise. `task` and the three `hints` are Markdown; `check(answer)` raises `Refused` when it is
    wrong.

    `wrong` holds at least three plausible wrong answers; the docstring of each says in one line what is wrong
    with it.
    """

    title: str
    difficulty: Literal[1, 2, 3]
    minutes: int
    task: str
    hints: tuple[str, str, str]
    solution: Answer
    wrong: tuple[Answer, ...]
    check: Callable[[Answer], None]

    def __post_init__(self) -> None:
        """Refuse an exercise that misses something a reader needs."""
        errors = {
            "difficulty must be 1, 2 or 3": self.difficulty in (1, 2, 3),
            "minutes must be positive": self.minutes > 0,
            "there must be exactly three hints": len(self.hints) == 3 and all(h.strip() for h in self.hints),
            "the solution needs a docstring: it is all that the stub says": bool(self.solution.__doc__),
            "there must be at least three wrong answers": len(self.wrong) >= 3,
            "each wrong answer needs a docstring: its reason": all(w.__doc__ for w in self.wrong),
        }
        for error, fine in errors.items():
            if not fine:
                raise ValueError(f"exercise {self.name}: {error}")

    @property
    def name(self) -> str:
        """The function that the reader writes."""
        return self.solution.__name__

    @property
    def source(self) -> str:
        """The solution as it is written here, without indentation."""
        return textwrap.dedent(inspect.getsource(self.solution)).strip()

    @property
    def stub(self) -> str:
        """The solution's signature and docstring, with `return ...` for a body."""
        docstring = ast.parse(self.source).body[0].body[0]  # type: ignore[attr-defined]
        head = self.source.splitlines()[: docstring.end_lineno]
        return "\n".join([*head, "    return ...  # your code"])


@dataclass(frozen=True)
class Verdict:
    """What came of an answer, and the line that says so."""

    state: Literal["right", "untried", "refused"]
    words: str


def judge(exercise: Exercise, answer: Answer) -> Verdict:
    """Check an answer without ever raising because of it."""
    if not callable(answer):
        return Verdict(
            "refused", f"✗ this is a {type(answer).__name__}; hand over the function itself: {exercise.name}"
        )
    try:
        exercise.check(_guarded(answer))
    except NotTried:
        todo = f"replace `return ...` in `{exercise.name}` and run both cells"
        return Verdict("untried", f"not tried yet: {todo}")
    except AssertionError as refusal:
        return Verdict("refused", f"✗ {refusal}")
    except Exception as error:  # the checker could not use what it was given
        return Verdict("refused", f"✗ your result cannot be used: {_describe(error)}")
    return Verdict("right", f"✓ {exercise.title}")


def checker(*exercises: Exercise) -> Callable[[Answer], None]:
    """A chapter's `check`: it prints whether a function solves the exercise that asks for one of its name."""
    known = {exercise.name: exercise for exercise in exercises}

    def check(answer: Answer) -> None:
        """Print `✓`, a sentence that helps, or `not tried yet`."""
        name = getattr(answer, "__name__", None)
        if name in known:
            print(judge(known[name], answer).words)
        else:
            what = f"no exercise asks for {name}" if name else f"this is a {type(answer).__name__}"
            print(f"✗ {what}: hand over one of the functions {', '.join(known)}")

    return check


def _guarded(answer: Answer) -> Answer:
    """The answer, with its untouched stub, a forgotten `return` and its exceptions told apart from wrong results."""

    @wraps(answer)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            result = answer(*arguments, **named)
        except Exception as error:
            # `from None`: the reader is told the line, not the checker's traceback
            raise Refused(f"your code raised {_describe(error)}{_error_location(error, answer)}") from None
        if result is ...:  # the stub's own `return ...`
            raise NotTried
        if result is None:
            raise Refused("your function returned None: is a `return` missing?")
        return result

    return call


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _error_location(error: Exception, answer: Answer) -> str:
    """The line of the reader's own code in which it went wrong, if it got that far."""
    code = getattr(answer, "__code__", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    if not frames:
        return ""
    number = frames[-1].lineno or 0
    # IPython registers each cell with linecache under the file name of its code
    return f" in line {number}: `{linecache.getline(frames[-1].filename, number).strip()}`"
