"""What was tried on the processor and did not help, as a picture: times the path in use, and page faults."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course.ui.style import COLOURS

Row = Mapping[str, Any]


def rows_by_variant(record: Mapping[str, Any], attention: str) -> dict[str, Row]:
    """A record's rows for "sparse" or "dense" attention, by what was tried; ValueError if it has none."""
    rows = {row["tried"]: row for row in record["rows"] if row["attention"] == attention}
    if not rows:
        raise ValueError(
            f"the record has no rows for attention={attention!r}: "
            "make it with python -m course.experiments.rejected_variants"
        )
    return rows


def draw_rejected_variants(record: Mapping[str, Any]) -> tuple[Figure, str]:
    """A bar for each idea, its length the time in multiples of ours, and its page faults beside it."""
    kinds = {kind: list(rows_by_variant(record, kind).values()) for kind in ("sparse", "dense")}
    heights = [len(rows) for rows in kinds.values()]
    fig, axes = plt.subplots(2, 1, figsize=(7.2, 4.6), sharex=True, height_ratios=heights)
    for number, (ax, (kind, rows)) in enumerate(zip(axes, kinds.items(), strict=True)):
        _bars(ax, rows, COLOURS[1 - number], "/\\"[number] * 2)
        ax.set_title(f"{kind} attention, recorded", fontsize=9, loc="left")
    axes[-1].set_xlabel("times ours (one: as fast)")
    return fig, " ".join(f"{kind.capitalize()}: {_in_words(rows)}." for kind, rows in kinds.items())


def _bars(ax: Axes, rows: Sequence[Row], colour: str, hatch: str) -> None:
    places = range(len(rows), 0, -1)
    ax.barh(places, [row["times"] for row in rows], 0.6, color=colour, hatch=hatch, alpha=0.7)
    for place, row in zip(places, rows, strict=True):
        counted = f", {row['faults']:,} page faults" if row["faults"] else ""
        ax.text(max(row["times"], 1) * 1.04, place, f"{row['times']:.2f}{counted}", va="center", fontsize=8)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set(xscale="log", xlim=(0.5, 120), yticks=list(places))
    ax.set_yticklabels([row["tried"] for row in rows], fontsize=8)
    ax.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    ax.minorticks_off()


def _in_words(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row['tried']} {row['times']:.2f}" for row in rows[1:]) + " times ours"
