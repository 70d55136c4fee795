"""Costs as published: the curves of the report's Figure 3, dollars per million tokens by a token's position.

They are kept as the corner points of piecewise linear curves (data/published/costs.csv), so what stands between two
corners is interpolated, as the figure draws it. They are prices of one deployment that nobody outside can repeat:
to be shown beside counts and measurements, as published, and never mixed with them.
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


def read_costs(path: str | Path) -> dict[tuple[str, str], Curve]:
    """Read costs.csv: (phase, model) -> its curve. Lines that begin with # are its provenance."""
    lines = [line for line in Path(path).read_text("utf-8").splitlines() if not line.startswith("#")]
    corners: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in csv.DictReader(lines):
        corner = int(row["position"]), float(row["usd_per_million"])
        corners.setdefault((row["phase"], row["model"]), []).append(corner)
    return {key: Curve(*zip(*sorted(found), strict=True)) for key, found in corners.items()}


def crossing(dense: Curve, sparse: Curve) -> float:
    """Position from which the sparse curve, dearer at first, is the cheaper one. Raises ValueError if it never is."""
    places = sorted({*dense.positions, *sparse.positions})
    gaps = [(place, dense.at(place) - sparse.at(place)) for place in places]
    for (left, before), (right, after) in pairwise(gaps):
        if before <= 0 < after:
            return left - before * (right - left) / (after - before)
    raise ValueError(f"the curves do not cross between positions {places[0]} and {places[-1]}")
