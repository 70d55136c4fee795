"""All choices of one layer at once: who keeps whom, as a picture with a row for each query.

A window is a band along the diagonal, chance is an even mist, and what the indexer does is neither: columns where
a token matters to everyone after it, and single far points where one token matters to one other.

That is the panel of chapter 04. Its other pictures are here too: what each way to choose keeps, head by head and for
every K, how often it finds an answer, and what selected attention costs in two forms.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from course.ui.panel import Draw
from course.ui.reading import Reading, checked_int
from course.ui.style import COLOURS, MARKERS

Drawn = tuple[Figure, str]


def draw_choices(reading: Reading) -> Draw:
    """Make a panel's callback: draw(top_k, layer, who) -> (figure, sentence)."""
    T, layers = len(reading.ids), len(reading.attention_probs)

    def draw(top_k: int, layer: int, who: str) -> tuple[Figure, str]:
        checked_int("top-k", top_k, 1, T, f"the text has {T} tokens")
        checked_int("layer", layer, 0, layers - 1, f"the model has {layers} layers, the first is 0")
        selected, kept = reading.select(who, layer, top_k), reading.attention_recall(who, layer, top_k)
        fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.7), width_ratios=[1, 1.2])
        _draw_matrix(left, selected, f"{who}, layer {layer}, top-k {top_k}")
        _draw_kept(right, reading, layer, top_k, kept)
        return fig, _sentence(selected, kept, who, top_k, layer)

    return draw


def _draw_matrix(ax: Axes, selected: Tensor, title: str) -> None:
    T = len(selected)
    rows, slots = (selected >= 0).nonzero(as_tuple=True)
    ax.plot(selected[rows, slots], rows, linestyle="", marker="s", markersize=1.1, color=COLOURS[0])
    ax.plot([0, T - 1], [0, T - 1], color="#b0b0b0", linewidth=0.8, marker="")
    ax.set(xlim=(-1, T), ylim=(T, -1), aspect="equal", xlabel="key position", ylabel="query position")
    ax.set_title(title, fontsize=10)
    ax.grid(visible=False)


def _draw_kept(ax: Axes, reading: Reading, layer: int, top_k: int, kept: Tensor) -> None:
    best = reading.attention_recall("oracle", layer, top_k)
    ax.plot(smooth(kept), color=COLOURS[1], marker="", linewidth=2.5, label="this choice")
    ax.plot(smooth(best), color="black", marker="", linewidth=1, linestyle="--", label="oracle")
    ax.set(xlabel="query position (mean of 32)", ylabel="share of attention kept", ylim=(0, 1.04))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def smooth(kept: Tensor, width: int = 32) -> Tensor:
    """The running mean over `width` queries: (T,) -> (T - width + 1,), or as it is if the text is shorter."""
    return kept.unfold(0, width, 1).mean(-1) if len(kept) >= width else kept


def _sentence(selected: Tensor, kept: Tensor, who: str, top_k: int, layer: int) -> str:
    T = len(selected)
    real = selected >= 0
    back = float((torch.arange(T)[:, None] - selected)[real].float().mean())
    return (
        f"In layer {layer} the {who} choice with top-k {top_k} keeps {int(real.sum()):,} of "
        f"{T * (T + 1) // 2:,} visible pairs and {float(kept.mean()):.0%} of the attention, over all queries, "
        f"also the early ones that keep all; a kept token is {back:.0f} back on average."
    )


def draw_curves(curve: Mapping[tuple[str, int], Sequence[float]], sizes: Sequence[int], at: int) -> Drawn:
    """The share of attention that each (chooser, layer) keeps with each K of `sizes`; the words are for K = `at`."""
    who, layers = (list(dict.fromkeys(names)) for names in zip(*curve, strict=True))
    fig, axes = plt.subplots(1, len(layers), figsize=(8.4, 2.9), sharey=True)
    for n, ax in zip(layers, axes, strict=True):
        for name in who:
            ax.plot(sizes, curve[name, n], label=name)
        ax.axvline(at, color="#444444", linewidth=0.8, marker="")
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes[::2], [str(k) for k in sizes[::2]])
        ax.set(title=f"layer {n}", xlabel="top-k")
    axes[0].set(ylabel="share of attention kept", ylim=(0, 1.03))
    axes[0].legend(loc="upper left", fontsize=8)
    place = sizes.index(at)
    words = "; ".join(f"layer {n}: " + ", ".join(f"{name} {curve[name, n][place]:.0%}" for name in who) for n in layers)
    return fig, f"Share of attention kept with {at} tokens. {words}."


def draw_own(kept: Tensor, best: Tensor) -> Drawn:
    """What each head keeps of its own attention under the shared choice, and could with its own: both (layers, H)."""
    fig, ax = plt.subplots(figsize=(7, 2.8))
    layers, heads = kept.shape
    for h in range(heads):
        at = [n + (h - (heads - 1) / 2) * 0.15 for n in range(layers)]
        look: dict[str, Any] = {"linestyle": "", "marker": MARKERS[h], "color": COLOURS[h]}
        ax.plot(at, best[:, h], **look, markersize=9, mfc="none")
        ax.plot(at, kept[:, h], **look, label=f"head {h}")
    ax.set_xticks(range(layers), [f"layer {n}" for n in range(layers)])
    ax.set(ylabel="share kept", ylim=(0, 1.05))
    ax.legend(ncols=heads, loc="lower right", title="filled: shared, hollow: own")
    lost = 100 * (best - kept).amax(1)
    words = "; ".join(f"layer {n}: {x:.0f}" for n, x in enumerate(lost))
    return fig, f"Points of its attention that the unluckiest head loses: {words}."


def draw_hits(distances: Sequence[str], shares: Mapping[str, Sequence[float]]) -> Drawn:
    """How often each chooser has the answer among its tokens, by how far back that stands."""
    fig, ax = plt.subplots(figsize=(7, 2.8))
    for who, share in shares.items():
        hollow: dict[str, Any] = {"mfc": "none", "markersize": 10, "linestyle": "--"} if who == "oracle" else {}
        ax.plot(distances, share, label=who, **hollow)
    ax.set(xlabel="tokens back", ylabel="hit rate", ylim=(-0.03, 1.05))
    ax.legend(loc="center left")
    words = "; ".join(f"{who} {', '.join(f'{x:.0%}' for x in share)}" for who, share in shares.items())
    return fig, f"Hit rate in layer 2, K = 16, from near to far: {words}."


def draw_growth(lengths: Sequence[int], cost: Mapping[str, Sequence[int]]) -> Drawn:
    """FLOP of one query over the length of the cache, for the forms of selected attention by name."""
    fig, ax = plt.subplots(figsize=(7, 2.8))
    for name, flops in cost.items():
        ax.plot(lengths, flops, label=f"{name}, K = 16")
    ax.set(xlabel="tokens in the cache", ylabel="FLOP for one query", xscale="log", yscale="log")
    ax.set_xscale("log", base=2)
    ax.legend()
    grown = {name: flops[-1] / flops[0] for name, flops in cost.items()}
    words = ", ".join(f"{name} {x:.0f}-fold" if x > 1 else f"{name} not at all" for name, x in grown.items())
    return fig, f"From {lengths[0]} to {lengths[-1]:,} tokens the cost grows: {words}."
