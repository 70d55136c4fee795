"""Where exercises are found: one module per chapter, and one place that lists them.

A chapter's module holds `EXERCISES`, a tuple. It is imported when one of its exercises is first asked for, so
opening one chapter does not load the others.
"""

from collections.abc import Iterator
from importlib import import_module
from types import MappingProxyType
from typing import Any

from course.exercises.core import Exercise, judge

# chapter number -> module beside this one
CHAPTERS: MappingProxyType[str, str] = MappingProxyType(
    {
        "1": "roofline",
        "2": "latent",
        "3": "indexer",
        "4": "selection",
        "5": "fp8",
        "6": "teaching",
        "7": "adapting",
        "8": "tiles",
        "9": "full_model",
        "10": "post_training",
        "11": "costs",
        "12": "alternatives",
    }
)


def chapter(number: str) -> tuple[Exercise, ...]:
    """All exercises of one chapter, in order."""
    module = import_module(f"course.exercises.{CHAPTERS[number]}")
    return tuple(module.EXERCISES)


def all_exercises() -> Iterator[Exercise]:
    """Every exercise of the course."""
    for number in CHAPTERS:
        yield from chapter(number)


def find(id: str) -> Exercise:
    """The exercise called `id`, such as "E4.1"."""
    number = id.removeprefix("E").split(".")[0]
    known = chapter(number) if number in CHAPTERS else tuple(all_exercises())
    for exercise in known:
        if exercise.id == id:
            return exercise
    names = ", ".join(exercise.id for exercise in known) or "none"
    raise ValueError(f"there is no exercise {id!r}; these are known: {names}")


def check(exercise: str | Exercise, answer: Any) -> None:
    """Print whether `answer` solves the exercise: `✓`, a sentence that helps, or `not tried yet`."""
    found = find(exercise) if isinstance(exercise, str) else exercise
    print(judge(found, answer).words)
