"""Inside one index score: what each head finds, what its weight makes of it, and whether attention agrees.

An index score is a short sum, and every term of it can be looked at: the product q . k of a head, cut at zero by the
ReLU, times the head's signed weight. `Factors` keeps these terms for a whole text, read once with dense attention, so
that moving a slider recomputes a few hundred numbers.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from course.experiments.activation import indexers, teacher_batches
from course.ui.panel import Draw
from course.ui.reading import checked_int
from course.ui.style import COLOURS, MARKERS
from dsa.datasets import byte_tokenizer
from dsa.kernels import ops
from dsa.model import baselines
from dsa.model.transformer import Transformer

ACTIVATIONS = ("ReLU", "none")


@dataclass(frozen=True)
class Factors:
    """The factors of Eq. 1 in every layer for one text, and what they are to rank like.

    Attributes:
        ids: the T tokens.
        q: index queries (layers, T, J, W).
        k: index keys (layers, T, W).
        w: signed head weights (layers, T, J).
        attention_probs: dense attention, all heads together (layers, T, T); rows sum to 1.
    """

    ids: list[int]
    q: Tensor
    k: Tensor
    w: Tensor
    attention_probs: Tensor

    def products(self, layer: int, t: int) -> Tensor:
        """Each head's q . k for the keys that query t sees: (J, t + 1)."""
        return self.q[layer, t] @ self.k[layer, : t + 1].T

    def shares(self, layer: int, t: int, activation: str) -> Tensor:
        """What each head adds to the scores of query t: (J, t + 1); the sum over heads is I[t, s] (Eq. 1)."""
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is unknown: use one of {', '.join(ACTIVATIONS)}")
        found = self.products(layer, t)
        return self.w[layer, t][:, None] * (found.relu() if activation == "ReLU" else found)


@torch.no_grad()
def factors(model: Transformer, ids: Tensor) -> Factors:
    """Read tokens (T,) with dense attention and keep the factors of Eq. 1. ValueError for a model without indexers."""
    if model.config.index_topk is None:
        raise ValueError("this model is dense and has no indexer: load 'warmed' or 'sparse' to look into one")
    teacher = teacher_batches(model, ids[None])
    made = [
        indexer(layer.x, layer.query_latent, layer.rope)
        for indexer, layer in zip(indexers(model), teacher, strict=True)
    ]
    q, k, w = (torch.cat(parts) for parts in zip(*made, strict=True))
    return Factors(ids.tolist(), q, k, w, torch.cat([layer.attention_probs for layer in teacher]))


def draw_heads(found: Factors, top_k: int = 16) -> Draw:
    """Make a panel's callback: draw(layer, back, activation) -> (figure, sentence); the query stands `back` tokens
    before the last one.
    """
    layers, T = len(found.q), len(found.ids)

    def draw(layer: int, back: int, activation: str) -> tuple[Figure, str]:
        checked_int("layer", layer, 0, layers - 1, f"the model has {layers} layers, the first is 0")
        checked_int("token", back, 0, T - 1, f"the text has {T} tokens, the last is 0")
        t = T - 1 - back
        shares, probs = found.shares(layer, t, activation), found.attention_probs[layer, t, : t + 1]
        kept = _chosen(shares.sum(0), top_k)
        fig = _figure(found.products(layer, t), shares, probs, kept)
        fig.suptitle(f"Layer {layer}, token {t} ({_piece(found, t)}), activation: {activation}", fontsize=11)
        return fig, _sentence(found, layer, t, shares, kept)

    return draw


def _chosen(scores: Tensor, top_k: int) -> list[int]:
    """The best visible keys of one row of scores (t + 1,)."""
    row = ops.select(scores[None, None], top_k)[0, 0]
    return sorted(int(s) for s in row if s >= 0)


def _piece(found: Factors, t: int) -> str:
    return byte_tokenizer.token_labels([found.ids[t]])[0]


def _figure(products: Tensor, shares: Tensor, probs: Tensor, kept: list[int]) -> Figure:
    fig = plt.figure(figsize=(6.8, 3.3))
    grid = fig.add_gridspec(3, 2, width_ratios=[1.5, 1])
    rows = [fig.add_subplot(grid[row, 0]) for row in range(3)]
    _draw_heads(rows[0], products, "q·k")
    _draw_heads(rows[1], shares, "w·act(q·k)")
    rows[0].legend(ncols=8, loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8, borderpad=0)
    _draw_score(rows[2], shares.sum(0), kept)
    _draw_agreement(fig.add_subplot(grid[:, 1]), shares.sum(0), probs, kept)
    for ax in rows[:2]:
        ax.tick_params(labelbottom=False)
    return fig


def _draw_heads(ax: Axes, values: Tensor, label: str) -> None:
    ax.axhline(0, color="#444444", linewidth=0.8, marker="")
    for j, row in enumerate(values):
        colour, marker = COLOURS[j % len(COLOURS)], MARKERS[j % len(MARKERS)]
        ax.plot(row, color=colour, marker=marker, markersize=2.4, linewidth=0, label=f"head {j}")
    ax.set(ylabel=label, xlim=(-1, values.shape[1]))


def _draw_score(ax: Axes, scores: Tensor, kept: list[int]) -> None:
    ax.axhline(0, color="#444444", linewidth=0.8, marker="")
    ax.plot(scores, color="#8a8a8a", marker="o", markersize=2.4, linewidth=0)
    ax.plot(kept, scores[kept], color=COLOURS[3], marker="s", markersize=3.5, linestyle="")
    ax.set(ylabel="score I", xlabel="key position", xlim=(-1, len(scores)))


def _draw_agreement(ax: Axes, scores: Tensor, probs: Tensor, kept: list[int]) -> None:
    dropped = sorted({*range(len(scores))} - {*kept})
    ax.plot(scores[dropped], probs[dropped], "o", color="#8a8a8a", mfc="none", markersize=3.5, label="dropped")
    ax.plot(scores[kept], probs[kept], "s", color=COLOURS[3], markersize=4.5, label="kept")
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set(xlabel="index score I", ylabel="attention", ylim=(-2e-4, 1.5))
    ax.set_title("Does it rank like attention?", fontsize=10)
    ax.legend(loc="upper left", fontsize=8)


def _sentence(found: Factors, layer: int, t: int, shares: Tensor, kept: list[int]) -> str:
    """What the picture shows, in words."""
    scores, probs = shares.sum(0), found.attention_probs[layer, t, : t + 1]
    weights = ", ".join(f"{float(w):+.2f}" for w in found.w[layer, t])
    cut = float((found.products(layer, t) < 0).float().mean())
    first, most = int(scores.argmax()), int(probs.argmax())
    best = baselines.attention_recall(probs[None, None], torch.tensor([[_chosen(probs, len(kept))]]))
    return (
        f"Token {t} ({_piece(found, t)}) gives its heads in layer {layer} the weights {weights}; {cut:.0%} of the "
        f"products are negative. Highest score: token {first} ({_piece(found, first)}); most attention: token {most} "
        f"({_piece(found, most)}), {float(probs[most]):.0%}. The {len(kept)} kept hold {float(probs[kept].sum()):.0%} "
        f"of the attention, the best {len(kept)} would hold {float(best):.0%}."
    )
