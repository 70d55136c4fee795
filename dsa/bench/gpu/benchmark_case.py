"""What is measured: a case has candidates, the first of them ours, and perhaps a target.

A target has two marks, the figure to reach and the minimum that counts, in one of four units:

* "TFLOP/s" of ours;
* "of bandwidth": the bytes that ours must move a second, over those that a plain copy moves beside it;
* "ms" of ours, where less is better;
* "times": how many times as long the fastest candidate named "dense ..." takes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsa.bench.gpu.inputs import Inputs

COPY = "copy of as many bytes"


@dataclass(frozen=True)
class Candidate:
    """One way to compute the answer.

    Args:
        call: from the number of a set of inputs to the answer.
        error: how far an answer to set 0 is from what the fp32 reference gives.
        tolerance: how far it may be.
        flop, bytes: what the work needs at least, counted.
        counted: the share of its time that counts, where it does more than is asked.
        cuda_graph: it takes less time than Python needs to start it, so it is replayed as a CUDA graph.
    """

    call: Callable[[int], Any]
    error: Callable[[Any], float]
    tolerance: float = 2e-2
    flop: float = 0
    bytes: float = 0
    counted: float = 1
    cuda_graph: bool = False


Candidates = dict[str, Candidate]


@dataclass(frozen=True)
class Target:
    """A figure to reach and the minimum that counts; `dense` is what the dense candidate itself must reach, TFLOP/s."""

    unit: str
    value: float
    minimum: float
    dense: float = 0

    def verdict(self, figure: float) -> str:
        """Which mark a figure reaches: "target", "minimum" or "missed"."""
        sign = -1 if self.unit == "ms" else 1
        if sign * figure >= sign * self.value:
            return "target"
        return "minimum" if sign * figure >= sign * self.minimum else "missed"


@dataclass(frozen=True)
class BenchmarkCase:
    """Candidates for one job at one size.

    Args:
        name: what it is called in the record.
        build: makes inputs and candidates; the first is ours.
        target: None where only the machine or a course over lengths is wanted.
        sets: how many sets of inputs are rotated; one is enough if it is far larger than the cache on the chip.
        phase, keys, tokens: of a layer, from which seconds a token follow.
    """

    name: str
    build: Callable[[Inputs], Candidates]
    target: Target | None = None
    sets: int = 3
    phase: str = ""
    keys: int = 0
    tokens: int = 1


def milliseconds(row: Mapping[str, Any]) -> float:
    """What a candidate's two medians come to: their mean, of which only a share may count."""
    return sum(row["milliseconds"]) / 2 * row.get("counted", 1)


def fastest(rows: Mapping[str, Mapping[str, Any]], prefix: str) -> Mapping[str, Any] | None:
    """The candidate that took the least time of those whose names begin so; None if none was timed."""
    timed = [row for name, row in rows.items() if name.startswith(prefix) and "milliseconds" in row]
    return min(timed, key=milliseconds, default=None)


def figure(target: Target, rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The figure that the target speaks of, from the rows of a case; None if what it needs was not timed."""
    ours = next(iter(rows.values()), {})
    if "milliseconds" not in ours:
        return None
    if target.unit == "ms":
        return milliseconds(ours)
    if target.unit == "TFLOP/s":
        return ours["tflops"]
    if target.unit == "of bandwidth":
        copied = rows.get(COPY, {})
        return ours["gigabytes_per_second"] / copied["gigabytes_per_second"] if "milliseconds" in copied else None
    dense = fastest(rows, "dense")
    return milliseconds(dense) / milliseconds(ours) if dense else None


def judge(target: Target, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The target, the figure, and which mark it reaches; a ratio counts only over a dense candidate that is quick."""
    found = figure(target, rows)
    verdict = "not measured" if found is None else target.verdict(found)
    dense = fastest(rows, "dense")
    if found is not None and target.dense and (dense is None or dense["tflops"] < target.dense):
        verdict = f"missed: dense reaches less than {target.dense:g} TFLOP/s"
    return {"unit": target.unit, "target": target.value, "minimum": target.minimum, "figure": found, "verdict": verdict}
