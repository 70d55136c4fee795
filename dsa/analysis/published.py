"""What the report publishes: the cost curves of its Figure 3, and the benchmarks of its Table 1.

The curves are dollars per million tokens by a token's position. They are kept as the corner points of piecewise linear
curves (data/published/costs.csv), so what stands between two corners is interpolated, as the figure draws it. They are
prices of one deployment that nobody outside can repeat: to be shown beside counts and measurements, as published, and
never mixed with them.

The benchmarks (data/published/benchmarks.csv) come without any error. What chance alone can do follows from the number
of questions, which is public for most of them: :meth:`Benchmark.noise_margin`.
"""

import csv
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """Piecewise linear: USD per million tokens at token positions, which increase."""

    positions: tuple[int, ...]
    dollars: tuple[float, ...]

    def at(self, position: float) -> float:
        """USD per million tokens at a position between the first and the last corner. Raises ValueError outside."""
        corners = list(zip(self.positions, self.dollars, strict=True))
        for (left, low), (right, high) in pairwise(corners):
            if left <= position <= right:
                return low + (high - low) * (position - left) / (right - left)
        raise ValueError(f"position {position} is not on the curve: choose {self.positions[0]} to {self.positions[-1]}")

    def total(self, start: float, end: float) -> float:
        """USD for one token at each position from start up to end: the curve's integral. Raises ValueError outside."""
        if end < start:
            raise ValueError(f"from {start} to {end} is backwards: start at or before the end")
        places = [start, *(place for place in self.positions if start < place < end), end]
        return sum((b - a) * (self.at(a) + self.at(b)) / 2e6 for a, b in pairwise(places))


@dataclass(frozen=True)
class Benchmark:
    """One line of Table 1: percent right of V3.1-Terminus (``dense``) and V3.2-Exp (``sparse``), or a rating.

    ``questions`` is the size of the public set, None where it is not known or the number is no share.
    """

    name: str
    dense: float
    sparse: float
    questions: int | None

    @property
    def difference(self) -> float:
        """Points that the sparse model is ahead."""
        return round(self.sparse - self.dense, 4)

    def noise_margin(self) -> float | None:
        """Half width, in points, of the 95 % interval of the difference of two equal models; None without a size.

        Each model answers every question once and by itself. Models that fail at the same questions differ less by
        chance, and so does an average of several runs, so this is the generous end.
        """
        if self.questions is None:
            return None
        p = (self.dense + self.sparse) / 200
        return 100 * 1.96 * (2 * p * (1 - p) / self.questions) ** 0.5


def read_benchmarks(path: str | Path) -> list[Benchmark]:
    """Read benchmarks.csv, in the order of the table."""
    return [
        Benchmark(
            row["benchmark"], float(row["V3.1-Terminus"]), float(row["V3.2-Exp"]), int(row["questions"] or 0) or None
        )
        for row in csv.DictReader(_lines(path))
    ]


def read_costs(path: str | Path) -> dict[tuple[str, str], Curve]:
    """Read costs.csv: (phase, model) -> its curve. Lines that begin with # are its provenance."""
    corners: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in csv.DictReader(_lines(path)):
        corner = int(row["position"]), float(row["usd_per_million"])
        corners.setdefault((row["phase"], row["model"]), []).append(corner)
    return {key: Curve(*zip(*sorted(points), strict=True)) for key, points in corners.items()}


def _lines(path: str | Path) -> list[str]:
    return [line for line in Path(path).read_text("utf-8").splitlines() if not line.startswith("#")]


def crossing(dense: Curve, sparse: Curve) -> float:
    """Position from which the sparse curve, dearer at first, is the cheaper one. Raises ValueError if it never is."""
    places = sorted({*dense.positions, *sparse.positions})
    gaps = [(place, dense.at(place) - sparse.at(place)) for place in places]
    for (left, before), (right, after) in pairwise(gaps):
        if before <= 0 < after:
            return left - before * (right - left) / (after - before)
    raise ValueError(f"the curves do not cross between positions {places[0]} and {places[-1]}")
