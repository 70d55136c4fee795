"""Pictures of a comparison: who chooses what attention wanted, and which form of Eq. 1 learns to.

Each function that draws gets the numbers, asks nothing of a model, and returns a figure with the sentence that says
what it shows.
Numbers of several choosers are keyed (who, layer, K), those of the recorded sweep are the runs of its file.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from course.ui.style import COLOURS, MARKERS
from dsa.datasets.recall_tasks import Episodes
from dsa.training.evaluate import hit

FORMS = {"relu": "ReLU", "none": "no activation", "softmax": "softmax over heads"}
HATCHES = ("", "//", "..")
Drawn = tuple[Figure, str]
Key = tuple[str, int, int]
Keyed = Mapping[Key, float]
Choosers = Callable[[int, int], Mapping[str, Tensor]]


def draw_attention(probs: Tensor, answer: int) -> Drawn:
    """Attention of one token to the others, layer by layer (layers, T); a line marks where the `answer` stands."""
    fig, axes = plt.subplots(len(probs), 1, figsize=(6.6, 2.5), sharex=True)
    words = []
    for n, (ax, row) in enumerate(zip(axes, probs, strict=True)):
        ax.plot(row, marker="")
        ax.axvline(answer, color="#888888", linewidth=0.8, marker="")
        ax.set(ylabel=f"layer {n}")
        words.append(f"layer {n}: most, {float(row.max()):.0%}, on token {int(row.argmax())}")
    axes[-1].set(xlabel="key position (the line: where the answer stands)")
    return fig, f"Attention of the last of {probs.shape[1]} tokens. {'; '.join(words)}."


def draw_distances(curves: Mapping[str, Sequence[float]], near: int, far: int) -> Drawn:
    """Mean index scores by distance, for each way of rotating; the words set `near` ones against all from `far` on."""
    fig, ax = plt.subplots(figsize=(6.4, 2.5))
    words = []
    for name, curve in curves.items():
        ax.plot(curve, ms=3, label=name)
        ahead = mean(curve[:near]) - mean(curve[far:])
        words.append(f"rotated as {name}, the last {near} tokens score {ahead:.0f} higher than those further back")
    ax.set(xlabel="tokens back", ylabel="mean index score")
    ax.legend(title="rotated as")
    return fig, f"One layer's scores with the same weights: {'; '.join(words)}."


def draw_weights(weights: Tensor) -> Drawn:
    """How the head weights (layers, T, J) are distributed over the tokens, layer by layer."""
    fig, axes = plt.subplots(1, len(weights), figsize=(8.2, 2.4), sharey=True)
    for n, ax in enumerate(axes):
        for j, values in enumerate(weights[n].T):
            ax.hist(values, bins=16, alpha=0.7, hatch=HATCHES[j % len(HATCHES)], label=f"head {j}")
        ax.axvline(0, color="#444444", linewidth=0.8)
        ax.set(title=f"layer {n}", xlabel="weight w[t, j]")
    axes[0].set(ylabel="tokens")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    means = "; ".join(f"layer {n}: " + " and ".join(f"{m:+.2f}" for m in row.tolist())
                      for n, row in enumerate(weights.mean(1)))  # fmt: skip
    return fig, f"Weights of the index heads, over {weights.shape[1]} tokens. Means: {means}."


def draw_ratio(ratio: Keyed, at: int) -> Drawn:
    """The share of the oracle's mass that each chooser keeps, over K, by layer; the words are for K = `at`."""
    who, layers, sizes = _names(ratio)
    fig, axes = plt.subplots(1, len(layers), figsize=(7.6, 2.7), sharey=True)
    for n, ax in zip(layers, axes, strict=True):
        for i, name in enumerate(who):
            line = [ratio[name, n, k] for k in sizes]
            ax.plot(sizes, line, color=COLOURS[i], marker=MARKERS[i], label=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(k) for k in sizes])
        ax.set(title=f"layer {n}", xlabel="K")
    axes[0].set(ylabel="mass kept / oracle's", ylim=(0, 1.05))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(who))
    said = "; ".join(f"{name} " + ", ".join(f"{ratio[name, n, at]:.0%}" for n in layers) for name in who[1:])
    return fig, f"With K = {at} in layers {', '.join(map(str, layers))}, of the {who[0]}'s mass: {said}."


def draw_hits(hits: Keyed, at: int) -> Drawn:
    """The share of far needles that each chooser puts among K = `at` tokens, by layer; the words are for the last."""
    who, layers, _ = _names(hits)
    fig, ax = plt.subplots(figsize=(7, 2.3))
    for n in layers:
        places = [i + 0.27 * (n - 1) for i in range(len(who))]
        bars = [hits[name, n, at] for name in who]
        ax.bar(places, bars, width=0.25, label=f"layer {n}", hatch=HATCHES[n % len(HATCHES)])
    ax.set_xticks(range(len(who)), who)
    ax.set(ylabel=f"hit rate, K = {at}", ylim=(0, 1.05))
    ax.legend(loc="upper right")
    said = ", ".join(f"{name} {hits[name, layers[-1], at]:.0%}" for name in who)
    return fig, f"Far needles among the {at} chosen in layer {layers[-1]}: {said}."


def draw_forms(runs: Sequence[Mapping[str, Any]]) -> Drawn:
    """The recorded sweep: KL and the share of the oracle's mass for each form of Eq. 1, a mark for each run."""
    groups = sorted({(run["heads"], run["width"]) for run in runs})
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 2.6))
    for ax, measure in zip(axes, ("kl", "of_oracle"), strict=True):
        for i, (form, label) in enumerate(FORMS.items()):
            mine = [run for run in runs if run["form"] == form]
            places = [groups.index((run["heads"], run["width"])) + 0.22 * (i - 1) for run in mine]
            ax.plot(places, [run[measure] for run in mine], MARKERS[i], mfc="none", markersize=7, label=label)
        ax.set_xticks(range(len(groups)), [f"J = {heads}, W = {width}" for heads, width in groups])
        ax.set_xlim(-0.5, len(groups) - 0.5)
    axes[0].set(title="recorded: KL, less is better")
    axes[1].set(title="recorded: mass kept / oracle's", ylim=(0.9, 1))
    axes[1].legend(loc="lower left")
    said = "; ".join(f"{label}: KL {_of(runs, form, 'kl').mean():.2f}, kept {_of(runs, form, 'of_oracle').mean():.1%}"
                     for form, label in FORMS.items())  # fmt: skip
    return fig, f"Means over {len(runs) // len(FORMS)} runs each, recorded. {said}."


def compare(
    chosen_by_all: Choosers,
    probs_by_layer: Sequence[Tensor],
    episodes: Episodes,
    sizes: Sequence[int] = (4, 8, 16, 32, 64),
) -> tuple[dict[Key, float], dict[Key, float]]:
    """Measure choosers by (who, layer, K): the mass that they keep, and their share of the answers over 64 tokens back.

    `chosen_by_all(layer, K)` gives each chooser's selection (B, T, K), `probs_by_layer` holds attention (B, T, S). Mass
    is the mean over the queries from the 64th on, since earlier ones hardly have a choice.
    """
    kept, hits, far = {}, {}, episodes.distance > 64
    for n, probs in enumerate(probs_by_layer):
        for k in sizes:
            for who, chosen in chosen_by_all(n, k).items():
                at = probs.gather(-1, chosen.clamp(min=0)) * (chosen >= 0)  # (B, T, K)
                kept[who, n, k] = float(at.sum(-1)[:, 64:].mean())
                hits[who, n, k] = float(hit(chosen, episodes)[far].float().mean())
    return kept, hits


def by_form(runs: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Tensor]:
    """A measure of the recorded sweep: one number a run, for each form of Eq. 1."""
    return {form: _of(runs, form, measure) for form in FORMS}


def _of(runs: Sequence[Mapping[str, Any]], form: str, measure: str) -> Tensor:
    return torch.tensor([run[measure] for run in runs if run["form"] == form])


def _names(numbers: Keyed) -> tuple[list[str], list[int], list[int]]:
    """Choosers, layers and K, in the order in which they were given."""
    who, layers, sizes = (list(dict.fromkeys(parts)) for parts in zip(*numbers, strict=True))
    if len(numbers) != len(who) * len(layers) * len(sizes):
        raise ValueError(f"{len(numbers)} numbers for {len(who)} choosers, {len(layers)} layers and {len(sizes)} K: "
                         "give one for each combination")  # fmt: skip
    return who, layers, sizes
