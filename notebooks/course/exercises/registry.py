"""Where exercises are found: a chapter's module beside this one holds `EXERCISES`, and its `check`."""

from collections.abc import Iterator
from importlib import import_module

from course.exercises.exercise import Exercise

CHAPTERS = (
    "latent_attention", "lightning_indexer", "selection", "indexer_kl", "sparse_training", "fp8_scales",
    "tiled_attention", "costs", "attention_flops", "moe_parallelism", "policy_gradient", "sparse_variants",
)  # fmt: skip


def chapter_exercises(module: str) -> tuple[Exercise, ...]:
    """The exercises of one chapter, in order."""
    # imported when asked for: a chapter pays for its own checkers only
    return tuple(import_module(f"course.exercises.{module}").EXERCISES)


def all_exercises() -> Iterator[Exercise]:
    """Every exercise of the course."""
    for module in CHAPTERS:
        yield from chapter_exercises(module)


def find_exercise(place: str) -> Exercise:
    """The exercise at MODULE.FUNCTION, such as "selection.my_select"; ValueError if there is none."""
    module, _, name = place.partition(".")
    known = {exercise.name: exercise for exercise in chapter_exercises(module)} if module in CHAPTERS else {}
    if name not in known:
        names = ", ".join(f"{module}.{name}" for name in known) or f"modules {', '.join(CHAPTERS)}"
        raise ValueError(f"there is no exercise {place!r}; these are known: {names}")
    return known[name]
