"""All choices of one layer at once: who keeps whom, as a picture with a row for each query.

A window is a band along the diagonal, chance is an even mist, and what the indexer does is neither: columns where
a token matters to everyone after it, and single far points where one token matters to one other.
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dsa.show.figures import COLOURS
from dsa.show.panel import Draw
from dsa.show.reading import Reading, checked


def draw_choices(reading: Reading) -> Draw:
    """Make a panel's callback: draw(top_k, layer, who) -> (figure, sentence)."""
    T, layers = len(reading.ids), len(reading.mass)

    def draw(top_k: int, layer: int, who: str) -> tuple[Figure, str]:
        checked("top-k", top_k, 1, T, f"the text has {T} tokens")
        checked("layer", layer, 0, layers - 1, f"the model has {layers} layers, the first is 0")
        selected, kept = reading.chosen(who, layer, top_k), reading.kept(who, layer, top_k)
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
    best = reading.kept("oracle", layer, top_k)
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
