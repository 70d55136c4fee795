"""What is measured: a trial has contenders, the first of them ours, and perhaps a goal.

A goal has two marks, the figure to reach and the least that counts, in one of four units:

* "TFLOP/s" of ours;
* "of bandwidth": the bytes that ours must move a second, over those that a plain copy moves beside it;
* "ms" of ours, where less is better;
* "times": how many times as long the quickest contender named "dense ..." takes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsa.bench.gpu.inputs import Inputs

COPY = "copy of as many bytes"


@dataclass(frozen=True)
class Contender:
    """One way to compute the answer.

    Args:
        call: from the number of a set of inputs to the answer.
        wrong: how far an answer to set 0 is from what the fp32 reference gives.
        allowed: how far it may be.
        flop, bytes: what the work needs at least, counted.
        counted: the share of its time that counts, where it does more than is asked.
        short: it takes less time than Python to start it, and is replayed as a graph.
    """

    call: Callable[[int], Any]
    wrong: Callable[[Any], float]
    allowed: float = 2e-2
    flop: float = 0
    bytes: float = 0
    counted: float = 1
    short: bool = False


Contenders = dict[str, Contender]


@dataclass(frozen=True)
class Goal:
    """A figure to reach and the least that counts; `dense` is what the dense contender itself must reach, TFLOP/s."""

    unit: str
    goal: float
    least: float
    dense: float = 0

    def verdict(self, figure: float) -> str:
        """Which mark a figure reaches: "goal", "least" or "missed"."""
        sign = -1 if self.unit == "ms" else 1
        return (
            "goal" if sign * figure >= sign * self.goal else "least" if sign * figure >= sign * self.least else "missed"
        )


@dataclass(frozen=True)
class Trial:
    """Contenders for one job at one size.

    Args:
        name: what it is called in the record.
        build: makes inputs and contenders; the first is ours.
        goal: None where only the machine or a course over lengths is wanted.
        sets: how many sets of inputs are rotated; one is enough if it is far larger than the cache on the chip.
        phase, keys, tokens: of a layer, from which seconds a token follow.
    """

    name: str
    build: Callable[[Inputs], Contenders]
    goal: Goal | None = None
    sets: int = 3
    phase: str = ""
    keys: int = 0
    tokens: int = 1


def milliseconds(row: Mapping[str, Any]) -> float:
    """What a contender's two medians come to: their mean, of which only a share may count."""
    return sum(row["milliseconds"]) / 2 * row.get("counted", 1)


def quickest(rows: Mapping[str, Mapping[str, Any]], prefix: str) -> Mapping[str, Any] | None:
    """The contender that took the least time of those whose names begin so; None if none was timed."""
    timed = [row for name, row in rows.items() if name.startswith(prefix) and "milliseconds" in row]
    return min(timed, key=milliseconds, default=None)


def figure(goal: Goal, rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The figure that the goal speaks of, from the rows of a trial; None if what it needs was not timed."""
    ours = next(iter(rows.values()), {})
    if "milliseconds" not in ours:
        return None
    if goal.unit == "ms":
        return milliseconds(ours)
    if goal.unit == "TFLOP/s":
        return ours["tflops"]
    if goal.unit == "of bandwidth":
        copied = rows.get(COPY, {})
        return ours["gigabytes_per_second"] / copied["gigabytes_per_second"] if "milliseconds" in copied else None
    dense = quickest(rows, "dense")
    return milliseconds(dense) / milliseconds(ours) if dense else None


def judged(goal: Goal, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The goal, the figure, and which mark it reaches; a ratio counts only over a dense contender that is quick."""
    found = figure(goal, rows)
    verdict = "not measured" if found is None else goal.verdict(found)
    dense = quickest(rows, "dense")
    if found is not None and goal.dense and (dense is None or dense["tflops"] < goal.dense):
        verdict = f"missed: dense reaches less than {goal.dense:g} TFLOP/s"
    return {"unit": goal.unit, "goal": goal.goal, "least": goal.least, "figure": found, "verdict": verdict}
