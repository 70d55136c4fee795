"""Your machine on the published figure, and what one GPU needs at least.

A laptop and an H800 differ in everything but the *shape* of the work. So measured seconds are put on the published
figure by one factor for each phase: the one that lays the measured dense line on the published dense line. Nothing is
fitted to the sparse measurements, so where they fall is a result.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from course.ui.style import COLOURS, MARKERS, provenance
from dsa.analysis import roofline
from dsa.analysis.flops import PHASES
from dsa.analysis.roofline import DENSE, SPARSE, Curves, Rates
from dsa.model.config import Config

Drawn = tuple[Figure, str]
Seconds = Mapping[int, tuple[float, float]]
"""Seconds for one token of one layer: visible keys -> (dense, sparse)."""


def dollars_per_second(seconds: Seconds, dense_slope: float) -> float:
    """The factor that gives measured dense seconds the published slope, by least squares through zero."""
    measured = sum(keys * dense for keys, (dense, _) in seconds.items())
    return dense_slope * sum(keys * keys for keys in seconds) / measured  # published slope / measured slope


def meeting(seconds: Seconds) -> float | None:
    """Keys at which measured dense and sparse meet, between two lengths by a straight line; None if they do not."""
    points = sorted((keys, dense - sparse) for keys, (dense, sparse) in seconds.items())
    for (left, before), (right, after) in pairwise(points):
        if before <= 0 < after:
            return left - before * (right - left) / (after - before)
    return None


def draw_machine(published: Curves, measured: Mapping[str, Seconds], kind: str = "measured") -> Drawn:
    """Measured (or recorded) seconds of each phase, rescaled onto the published curves."""
    fig, axes = plt.subplots(1, len(measured), figsize=(7.4, 2.6), squeeze=False)
    words: list[str] = []
    for ax, (phase, seconds) in zip(axes[0], measured.items(), strict=True):
        factor = dollars_per_second(seconds, roofline.slope(published[phase, DENSE]))
        longest = max(seconds)
        for number, model in enumerate((DENSE, SPARSE)):
            look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number]}
            known, keys = published[phase, model], sorted(seconds)
            ends = [0, *(p for p in known.positions if 0 < p < longest), longest - 1]
            ax.plot(ends, [known.at(p) for p in ends], label=f"{model}, published", **look | provenance("published"))
            mine = [known.dollars[0] + factor * seconds[n][number] for n in keys]
            label = f"{('dense', 'sparse')[number]}, {kind}"
            ax.plot(keys, mine, label=label, markersize=8, fillstyle="none", **look | provenance(kind))
        step = 2 ** math.ceil(math.log2(longest / 5))
        ax.set_xticks(range(0, longest + 1, step), [f"{n / 1024:g}" for n in range(0, longest + 1, step)])
        ax.set(
            title=phase,
            ylim=(0, None),
            xlabel="position, Ki tokens",
            ylabel="$ per million tokens" if not words else "",
        )
        words.append(_machine_in_words(phase, seconds))
    axes[0][0].legend(fontsize=8)
    return fig, f"One layer{' on this machine' * (kind == 'measured')}, {kind}: {'; '.join(words)}."


def _machine_in_words(phase: str, seconds: Seconds) -> str:
    meet, longest = meeting(seconds), max(seconds)
    place = f"they meet at {meet:,.0f} keys" if meet else "they do not meet"
    dense, sparse = seconds[longest]
    return f"{phase}: {place}, and at {longest:,} dense takes {dense / sparse:.1f} times as long as sparse"


# one GPU --------------------------------------------------------------------------------------------------------------


def floors(config: Config, phase: str, keys: int, rates: Rates = roofline.H200) -> dict[str, float]:
    """Microseconds that one query needs at least in one layer: dense attention; scoring; attention to K keys."""
    micro = 1e6 / config.num_hidden_layers
    return {
        "dense": micro * keys * roofline.dense_seconds(config, phase, rates),
        "scoring": micro * keys * roofline.scoring_seconds(config, phase, rates),
        "selected": micro * min(keys, config.index_topk or keys) * roofline.sparse_seconds(config, phase, rates),
    }


def records(folder: str | Path, kind: str) -> list[dict[str, Any]]:
    """Recorded measurements of layers on a "cpu" or "gpu", `KIND_*.json`, by name; an empty list if there are none."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(Path(folder).glob(f"{kind}_*.json"))]


def layer_seconds(record: Mapping[str, Any]) -> dict[str, dict[int, tuple[float, float]]]:
    """Seconds of one token in one layer from a record's rows of phase, attention, keys and seconds.

    Rows of another kind, and lengths at which only one kind of attention was measured, are left out.
    """
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in record.get("rows", []):
        if not {"phase", "attention", "keys", "seconds"} <= set(row) or row["phase"] not in PHASES:
            continue
        found.setdefault((row["phase"], row["keys"]), {})[row["attention"]] = row["seconds"]
    pairs: dict[str, dict[int, tuple[float, float]]] = {}
    for (phase, keys), times in sorted(found.items(), key=lambda item: (PHASES.index(item[0][0]), item[0][1])):
        if {"dense", "sparse"} <= set(times):
            pairs.setdefault(phase, {})[keys] = (times["dense"], times["sparse"])
    return pairs


def draw_floors(config: Config, lengths: Sequence[int], rates: Rates = roofline.H200) -> Drawn:
    """For each phase and length the floor of dense attention beside that of scoring and selected keys."""
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 2.7))
    words = []
    for ax, phase in zip(axes, PHASES, strict=True):
        found = [floors(config, phase, n, rates) for n in lengths]
        places = range(len(lengths))
        scoring = [f["scoring"] for f in found]
        ax.bar([x - 0.2 for x in places], [f["dense"] for f in found], 0.36, label="dense", color=COLOURS[0])
        ax.bar([x + 0.2 for x in places], scoring, 0.36, label="scoring, top-k", color=COLOURS[3], hatch="//")
        selected = [f["selected"] for f in found]
        ax.bar([x + 0.2 for x in places], selected, 0.36, bottom=scoring, label="selected keys", color=COLOURS[1])
        ax.set_xticks(list(places), [f"{n // 1024} Ki" for n in lengths])
        ax.set(title=phase, ylabel="microseconds, modelled" if phase == "prefill" else "")
        ax.legend(fontsize=8)
        ratios = [f["dense"] / (f["scoring"] + f["selected"]) for f in found]
        words.append(f"{phase} {', '.join(f'{r:.1f} at {n:,}' for r, n in zip(ratios, lengths, strict=True))}")
    return fig, f"Dense over sparse, if every kernel ran at its floor: {'; '.join(words)}."
