"""Where exercises are found: a chapter's module beside this one holds `EXERCISES`, and its `check`."""

from collections.abc import Iterator
from importlib import import_module

from course.exercises.core import Exercise

CHAPTERS = (
    "latent", "indexer", "selection", "teaching", "adapting", "fp8", "tiles", "costs", "roofline", "full_model",
    "post_training", "alternatives",
)  # fmt: skip


def chapter(module: str) -> tuple[Exercise, ...]:
    """The exercises of one chapter, in order."""
    return tuple(import_module(f"course.exercises.{module}").EXERCISES)


def all_exercises() -> Iterator[Exercise]:
    """Every exercise of the course."""
    for module in CHAPTERS:
        yield from chapter(module)


def find(place: str) -> Exercise:
    """The exercise at MODULE.FUNCTION, such as "selection.my_select"; ValueError if there is none."""
    module, _, name = place.partition(".")
    known = {exercise.name: exercise for exercise in chapter(module)} if module in CHAPTERS else {}
    if name not in known:
        names = ", ".join(f"{module}.{name}" for name in known) or f"modules {', '.join(CHAPTERS)}"
        raise ValueError(f"there is no exercise {place!r}; these are known: {names}")
    return known[name]
