"""How small may the latent be? A trained model with fewer numbers in its cache, and what that costs it.

Every head's keys and values are linear in the latent, so one matrix, `kv_b_proj`, holds all that MLA can read from it.
Replace that matrix by its nearest one of rank r (singular value decomposition) and it factors into two: C -> r -> all
heads. The cache may then hold the r numbers in the middle instead of the C before them, and nothing else changes. That
is not how a model of rank r would be made (it would be trained at that width), but it is what a reader can do to a
model that exists, and it shows the right thing: what the numbers in the cache are for.

What is measured is the model's *dense* attention: sparse attention would add a second effect, the indexer's choice.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from course.ui.panel import Draw
from course.ui.reading import checked_int
from course.ui.style import COLOURS
from dsa.datasets.recall_tasks import Episodes
from dsa.model.attention import Attention
from dsa.model.transformer import Transformer
from dsa.training.losses import bits_per_byte

ALL = "all layers"


@dataclass(frozen=True)
class Damage:
    """What a lower rank does to a model.

    Attributes:
        moved: share of the attention that goes elsewhere than before, a mean over layers and queries, in 0 ... 1.
        logits: largest change of a logit.
        bits: spent on each byte of a text.
        recall: share of needles answered right.
    """

    moved: float
    logits: float
    bits: float
    recall: float


def layer_choices(model: Transformer) -> tuple[str, ...]:
    """Where the rank can be cut: in all layers, or in one of them."""
    return (ALL, *(f"layer {number}" for number in range(model.config.num_hidden_layers)))


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factor the matrix of that rank which is nearest to weight (out, C): (out, rank) and (rank, C).

    Nearest by the sum of squared differences (Eckart and Young 1936).
    """
    checked_int("rank", rank, 1, min(weight.shape), f"the matrix is {weight.shape[0]} x {weight.shape[1]}")
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


@torch.no_grad()
def low_rank(model: Transformer, rank: int, where: str = ALL) -> Transformer:
    """Copy a model, with `kv_b_proj` of one layer or of all cut to a rank; the original is not changed."""
    if where not in layer_choices(model):
        raise ValueError(f"place {where!r} is unknown: use one of {', '.join(layer_choices(model))}")
    changed = copy.deepcopy(model)
    for attention in changed.modules():
        if isinstance(attention, Attention) and where in (ALL, f"layer {attention.layer}"):
            up, down = factors(attention.kv_b_proj.weight, rank)
            attention.kv_b_proj.weight.copy_(up @ down)
    changed.attention = "dense"
    return changed


@torch.no_grad()
def damage(model: Transformer, tokens: Tensor, episodes: Episodes) -> Callable[[Transformer], Damage]:
    """Make a function that compares a changed model with `model`: on a text, tokens (1, T), and on needles.

    Both attend densely; the model's own setting is restored.
    """
    before, model.attention = model.attention, "dense"
    try:
        right, was = model(tokens, trace=True)
    finally:
        model.attention = before

    @torch.no_grad()
    def compare(changed: Transformer) -> Damage:
        logits, now = changed(tokens, trace=True)
        # half the absolute difference: what leaves one key arrives at another and would count twice
        moved = [float((a.mass - b.mass).abs().sum(-1).mean()) / 2 for a, b in zip(was, now, strict=True)]
        spent, size = bits_per_byte(logits, tokens)
        recall = float(episodes.correct(changed(episodes.tokens)).float().mean())
        return Damage(sum(moved) / len(moved), float((logits - right).abs().max()), spent / size, recall)

    return compare


def draw_rank(model: Transformer, tokens: Tensor, episodes: Episodes, steps: int = 6) -> Draw:
    """Make a panel's callback: draw(rank, where) -> (figure, sentence).

    The curves are measured once for each place, at about `steps` ranks, and remembered.
    """
    C = model.config.kv_lora_rank
    ranks = sorted({1, 2, *(round(C * step / steps) for step in range(1, steps + 1))} - {0})

    compare = damage(model, tokens, episodes)

    @cache
    def measured(rank: int, where: str) -> Damage:
        return compare(low_rank(model, rank, where))

    def draw(rank: int, where: str = ALL) -> tuple[Figure, str]:
        checked_int("rank", rank, 1, C, f"the latent has {C} numbers, so that is the full rank")
        here = measured(rank, where)
        curve = {each: measured(each, where) for each in ranks}
        fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.9))
        _draw_shares(left, curve | {rank: here}, rank)
        _draw_bits(right, curve | {rank: here}, rank)
        return fig, _sentence(model, here, curve[C], rank, where)

    return draw


def _draw_shares(ax: Axes, curve: dict[int, Damage], rank: int) -> None:
    ranks = sorted(curve)
    ax.plot(ranks, [curve[r].recall for r in ranks], color=COLOURS[0], marker="o", label="needles found")
    ax.plot(ranks, [curve[r].moved for r in ranks], color=COLOURS[3], marker="s", label="attention moved")
    ax.set(xlabel=f"rank (the line: {rank})", ylabel="share", ylim=(-0.03, 1.05))
    ax.axvline(rank, color="#444444", linewidth=1)
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, fontsize=9)


def _draw_bits(ax: Axes, curve: dict[int, Damage], rank: int) -> None:
    ranks = sorted(curve)
    ax.plot(ranks, [curve[r].bits for r in ranks], color=COLOURS[2], marker="^")
    ax.set(xlabel=f"rank (the line: {rank})", ylabel="bits per byte", ylim=(0, 8), title="prose (8 bits: no idea)")
    ax.axvline(rank, color="#444444", linewidth=1)


def _sentence(model: Transformer, here: Damage, full: Damage, rank: int, where: str) -> str:
    C, R = model.config.kv_lora_rank, model.config.qk_rope_head_dim
    return (
        f"Rank {rank} of {C} in {where}: {2 * (rank + R)} bytes per token and layer in bf16 instead of {2 * (C + R)}; "
        f"{here.moved:.0%} of the attention moves, the largest change of a logit is {here.logits:.1f}, prose costs "
        f"{here.bits:.1f} bits per byte instead of {full.bits:.1f}, and {here.recall:.0%} of the needles are found."
    )
