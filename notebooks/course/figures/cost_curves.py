"""The published cost figure, what was said about it, what a model makes of it, and what stays unknown.

Every function returns a figure and the sentence that says what it shows, computed from the same numbers. The figure's
own curves are dotted, as published; what is computed from sizes and rates is dash-dotted, as modelled. What people
said stands as crosses and bands, since it is neither.
"""

import math
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course.ui.style import COLOURS, MARKERS, provenance
from dsa.analysis.flops import PHASES
from dsa.analysis.published import Curve, crossing
from dsa.analysis.roofline import DENSE, MAX_POSITION, SPARSE, Curves, relative_error

Drawn = tuple[Figure, str]
QUOTED_PRICES = {"V3.1-Terminus": ((32_000, 0.60), (128_000, 2.30)), "V3.2-Exp": ((32_000, 0.10), (128_000, 0.30))}
"""The article's prices: (tokens, USD per million)."""
QUOTED_SPEEDUPS = ((6.0, 7.0, 0, 6.1, "“6 to 7 times”"), (2.0, 3.0, 7000, 1.3, "“2 to 3 times” above 7,000"))
"""The article's ratios: from, to, above which position, and a label with its height."""


def at_least(dense: Curve, sparse: Curve, times: float) -> float:
    """Position from which dense costs `times` as much as sparse; infinity where it never does."""
    try:
        return crossing(dense, Curve(sparse.positions, tuple(times * usd for usd in sparse.dollars)))
    except ValueError:
        return math.inf


def power(curve: Curve, length: int) -> float:
    """With which power of its length the cost of a whole prompt grows from half of `length` to all of it."""
    return math.log2(curve.total(0, length) / curve.total(0, length / 2))


def ki_axis(ax: Axes) -> None:
    """Label positions in Ki tokens."""
    ax.set_xticks([0, 32_768, 65_536, 98_304, 131_072], ["0", "32", "64", "96", "128"])
    ax.set(xlabel="position, Ki tokens")


def draw_quoted(published: Curves) -> Drawn:
    """Both phases' curves with the article's prices on them, and the ratio with the article's ratios."""
    fig, axes = plt.subplots(1, 3, figsize=(8.4, 2.8), width_ratios=[1, 1, 1.15])
    for ax, phase in zip(axes[:2], PHASES, strict=True):
        for number, model in enumerate((DENSE, SPARSE)):
            curve = published[phase, model]
            look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], **provenance("published")}
            ax.plot(curve.positions, curve.dollars, label=model, **look)
            ax.plot(
                *zip(*QUOTED_PRICES[model], strict=True),
                "X",
                color=COLOURS[number],
                markersize=9,
                markeredgecolor="black",
            )
        ki_axis(ax)
        ax.set(title=phase, ylim=(0, 2.5), ylabel="$ per million tokens" if phase == "prefill" else "")
    axes[0].legend(title="crosses: as said", loc="upper left", fontsize=8, title_fontsize=8)
    _ratios(axes[2], published)
    return fig, _said_in_words(published)


def _ratios(ax: Axes, published: Curves) -> None:
    """Dense over sparse by position, and the bands of the article's claims."""
    places = np.linspace(0, MAX_POSITION, 400)
    for number, phase in enumerate(PHASES):
        ratio = [published[phase, DENSE].at(p) / published[phase, SPARSE].at(p) for p in places]
        look: dict[str, Any] = {"color": COLOURS[2 + number], "marker": MARKERS[2 + number], "markevery": 60}
        ax.plot(places, ratio, label=phase, **look | provenance("published"))
    for low, high, start, height, words in QUOTED_SPEEDUPS:
        ax.fill_between([start, MAX_POSITION], low, high, color="#bbbbbb", alpha=0.5, linewidth=0)
        ax.text(MAX_POSITION * 0.99, height, words, ha="right", va="bottom", fontsize=8)
    ax.axhline(1, color="black", linewidth=0.8)
    ki_axis(ax)
    ax.set(title="V3.1-Terminus / V3.2-Exp", ylim=(0, 9))
    ax.legend(loc="upper left", fontsize=8)


def _said_in_words(published: Curves) -> str:
    words = []
    for phase in PHASES:
        dense, sparse = published[phase, DENSE], published[phase, SPARSE]
        known = [f"{times} times from {at_least(dense, sparse, times) / 1000:.0f} thousand" for times in (2, 3)]
        start, end = (dense.at(place) / sparse.at(place) for place in (0, MAX_POSITION))
        ends = f"{start:.2f} at the start, {end:.2f} at the end"
        words.append(f"{phase} {ends}, 1 from {crossing(dense, sparse) / 1000:.1f} thousand, {', '.join(known)}")
    return f"Published cost of dense over sparse by position: {'; '.join(words)}."


def draw_fit(published: Curves, models: Mapping[str, Curves]) -> Drawn:
    """How far each model's curves are off the published ones, in per cent, at every position."""
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 3), sharey=True)
    for ax, phase in zip(axes, PHASES, strict=True):
        lines = [(name, made, model) for name, made in models.items() for model in (DENSE, SPARSE)]
        for number, (name, made, model) in enumerate(lines):
            theirs, ours = published[phase, model], made[phase, model]
            places = sorted({*ours.positions, *theirs.positions, *range(0, MAX_POSITION, 4096)})
            off = [100 * (ours.at(p) / theirs.at(p) - 1) for p in places]
            look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "markevery": (number, 8)}
            ax.plot(places, off, label=f"{model}, {name}", **look | provenance("modelled"))
        ax.axhspan(-10, 10, color="#eeeeee", zorder=0)
        ax.set(title=phase, ylim=(-12, 12), ylabel="model against figure, %" if phase == "prefill" else "")
        ki_axis(ax)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return fig, _fit_in_words(published, models)


def _fit_in_words(published: Curves, models: Mapping[str, Curves]) -> str:
    words = []
    for name, made in models.items():
        off = ", ".join(f"{phase} of {model} {relative_error(made[phase, model], curve):+.1%}"
                        for (phase, model), curve in published.items())  # fmt: skip
        words.append(f"{name}: {off}")
    return f"Largest distance from the figure at any position. {'. '.join(words)}."


def draw_ranges(ranges: Mapping[str, tuple[float, float, float]]) -> Drawn:
    """How far each rate can be moved alone: name -> (lowest, as assumed, highest), drawn as factors."""
    fig, ax = plt.subplots(figsize=(7, 3))
    names = list(ranges)[::-1]
    for row, name in enumerate(names):
        low, value, high = ranges[name]
        ax.plot([low / value, high / value], [row, row], marker="|", markersize=10, linewidth=4, color=COLOURS[0])
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_xscale("log")
    ax.set_xticks([0.125, 0.25, 0.5, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    ax.minorticks_off()
    ax.set(xlabel="times what is assumed, all four curves within 10 %", xlim=(0.1, 10))
    words = ", ".join(f"{n} {low / v:.2f} to {high / v:.2f}" for n, (low, v, high) in ranges.items())
    return fig, f"Each alone may be so many times what is assumed: {words}."
