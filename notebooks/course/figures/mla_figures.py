"""The pictures of chapter 02: caches side by side, a query that drifts, two modes that cross, pairs, and YaRN's turns.

Each function that draws returns the figure with the sentence that describes it, ready for `show`. Most numbers are
counted or computed in the notebook's cells, where a reader can see how; here are those that take more than a cell: how
far the two modes are apart, in one layer and in a whole model, and how a score swings under each rotary convention.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from course.ui.style import COLOURS
from dsa.model.attention import Attention
from dsa.model.config import Config
from dsa.model.rope import Rope, frequencies
from dsa.model.transformer import Transformer

Picture = tuple[Figure, str]
Turn = Callable[[Tensor], Tensor]


@torch.no_grad()
def between_modes(config: Config, dtype: torch.dtype, tokens: int = 24) -> float:
    """Largest difference between both modes' outputs in a layer with random weights and `config`'s head sizes.

    The model's width does not matter to the modes, so a small one saves memory.
    """
    narrow = config.replace(hidden_size=64, q_lora_rank=64)
    torch.manual_seed(0)
    attention, x = Attention(narrow, 0).to(dtype), torch.randn(1, tokens, 64).to(dtype)  # (B, T, D)
    rope = Rope.at(narrow, 0, tokens)
    q, kv = attention.queries(x, rope)[0], attention.compress_kv(x, rope)
    return float((attention.attend_mha(q, kv) - attention.attend_mqa(q, kv)).abs().max())


@torch.no_grad()
def between_logits(model: Transformer, tokens: Tensor) -> float:
    """Largest difference of a logit between both modes: dense over tokens (B, T), and all T of them selected."""
    before = model.attention, model.top_k
    try:
        model.attention, model.top_k = "window", tokens.shape[1]
        mqa = model(tokens)
        model.attention = "dense"
        return float((model(tokens) - mqa).abs().max())
    finally:
        model.attention, model.top_k = before


def swings(config: Config, distance: int, positions: int = 128) -> dict[str, Tensor]:
    """Scores of the same two vectors, always `distance` tokens apart, along a text: by the conventions they meet in."""
    query, key = torch.randn(2, config.qk_rope_head_dim, generator=torch.Generator().manual_seed(4))
    rope = Rope.at(config, 0, positions)

    def scores(turn_query: Turn, turn_key: Turn) -> Tensor:
        late = turn_query(query.expand(1, positions, 1, -1))[0, distance:, 0]  # (T, R)
        early = turn_key(key.expand(1, positions, 1, -1))[0, : positions - distance, 0]
        return (late * early).sum(-1)

    return {
        "both neighbours": scores(rope.interleaved, rope.interleaved),
        "both halves": scores(rope.half_split, rope.half_split),
        "halves meet neighbours": scores(rope.half_split, rope.interleaved),
    }


def draw_caches(size: Mapping[str, int], tokens: int) -> Picture:
    """Bars of what a text of so many tokens takes, from bytes per token by kind of attention."""
    gigabytes = {kind: tokens * each / 1e9 for kind, each in size.items()}
    fig, ax = plt.subplots(figsize=(7, 2.5))
    bars = ax.barh(list(gigabytes), list(gigabytes.values()), color=COLOURS[: len(size)], height=0.6)
    ax.bar_label(bars, [f" {g:,.0f} GB" for g in gigabytes.values()])
    ax.set(xscale="log", xlabel=f"GB in bf16 for {tokens:,} tokens, all layers")
    ax.set_xlim(1, 5 * max(gigabytes.values()))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    found = ", ".join(f"{kind} {g:,.0f} GB" for kind, g in gigabytes.items())
    return fig, f"The cache of one text of {tokens:,} tokens (counted): {found}."


def draw_drift(alike: Tensor) -> Picture:
    """How far an absorbed query has turned away, by distance: cosines (S, H) beside that of distance 0."""
    fig, ax = plt.subplots(figsize=(7, 2.7))
    for head, cosines in enumerate(alike.T):
        ax.plot(cosines, markevery=4, label=f"head {head}")
    ax.axhline(0, color="#444444", linewidth=0.8, marker="")
    ax.set(xlabel="tokens back", ylabel="cosine", ylim=(-1.05, 1.6), yticks=[-1, -0.5, 0, 0.5, 1])
    ax.set_title("The absorbed query, beside that for distance 0")
    ax.legend(ncols=alike.shape[1], loc="upper right")
    lowest = ", ".join(f"head {head} {float(x):.1f}" for head, x in enumerate(alike.amin(0)))
    return fig, f"Lowest cosine within {len(alike)} tokens: {lowest}; 1 would be the same query."


def draw_crossing(cost: Callable[[int], tuple[int, int]], new: Sequence[int], crossing: int, cached: int) -> Picture:
    """What both modes cost for some numbers of new tokens: cost(n) gives FLOP in MHA and in MQA mode."""
    fig, ax = plt.subplots(figsize=(7, 2.9))
    for mode, name in enumerate(("MHA mode: expand", "MQA mode: absorb")):
        ax.plot(new, [cost(n)[mode] / 1e12 for n in new], label=name)
    ax.axvline(crossing, color="#444444", linewidth=0.8, marker="")
    ax.text(crossing * 1.1, min(cost(new[0])) / 1e12, f"{crossing} new tokens")
    ax.set_xscale("log", base=2)
    ax.set_xticks(new[::2], [f"{n:,}" for n in new[::2]])
    ax.set(yscale="log", xlabel="new tokens", ylabel="TFLOP a layer", title=f"Reading on after {cached:,} tokens")
    ax.legend()
    few, many = cost(new[0]), cost(new[-1])
    return fig, (
        f"Counted: for {new[0]} new token the MHA mode costs {few[0] / few[1]:.0f} times as much as the MQA mode, for "
        f"{new[-1]:,} the MQA mode {many[1] / many[0]:.1f} times as much as the MHA mode; they cross at {crossing}."
    )


def draw_pairs(width: int = 8) -> Picture:
    """The two rotary conventions: which of `width` numbers turn together."""
    if width < 2 or width % 2:
        raise ValueError(f"width={width} cannot be paired: give an even number of at least 2")
    half = width // 2
    conventions = {
        "neighbours: MLA": [(2 * i, 2 * i + 1) for i in range(half)],
        "halves: the indexer": [(i, i + half) for i in range(half)],
    }
    fig, axes = plt.subplots(1, 2, figsize=(8, 1.6))
    for ax, (title, pairs) in zip(axes, conventions.items(), strict=True):
        for number, pair in enumerate(pairs):
            _draw_pair(ax, pair, COLOURS[number % len(COLOURS)])
        ax.set(xlim=(-0.2, width + 0.2), ylim=(-0.1, 0.9 + 0.35 * half), title=title)
        ax.axis("off")
    found = "; ".join(f"{title}: " + ", ".join(f"{a}-{b}" for a, b in pairs) for title, pairs in conventions.items())
    return fig, f"Pairs of {width} numbers. {found}."


def _draw_pair(ax: Axes, pair: tuple[int, int], colour: str) -> None:
    for i in pair:
        ax.add_patch(Rectangle((i, 0), 0.9, 0.9, color=colour, alpha=0.5))
        ax.text(i + 0.45, 0.42, str(i), ha="center", va="center")
    a, b = pair
    bow = {"arrowstyle": "-", "connectionstyle": "arc3,rad=-0.5", "color": "#444444"}
    ax.annotate("", xy=(b + 0.45, 0.9), xytext=(a + 0.45, 0.9), arrowprops=bow)


def draw_swing(series: Mapping[str, Tensor], distance: int) -> Picture:
    """Scores of two vectors that keep their distance while they move along a text."""
    fig, ax = plt.subplots(figsize=(7, 2.9))
    for name, scores in series.items():
        ax.plot(scores, markevery=8, label=name)
    low, high = ax.get_ylim()
    ax.set(xlabel="position of the key", ylabel="score", ylim=(low, high + 0.3 * (high - low)))
    ax.set_title(f"The same two vectors, always {distance} tokens apart")
    ax.legend(ncols=len(series), loc="upper center", fontsize=8)
    swing = ", ".join(f"{name} by {float(x.max() - x.min()):.1f}" for name, x in series.items())
    return fig, f"How far the score swings along the text: {swing}."


def draw_turns(config: Config) -> Picture:
    """How often each rotary pair turns within a text, with and without YaRN."""
    if config.yarn is None:
        raise ValueError("this config has no YaRN, so nothing was stretched: use Config.v32_exp()")
    plain, yarn = (frequencies(config.qk_rope_head_dim, config.rope_theta, kind) for kind in (None, config.yarn))
    trained, longest = config.yarn.original_max_position_embeddings, config.max_position_embeddings
    fig, ax = plt.subplots(figsize=(7, 3.1))
    lines = (
        (f"in training, {trained:,} tokens", plain, trained),
        (f"at {longest:,}, as it was", plain, longest),
        (f"at {longest:,}, with YaRN", yarn, longest),
    )
    for number, (name, freq, length) in enumerate(lines):  # markers take turns, where lines lie on each other
        ax.plot(freq * length / (2 * math.pi), label=name, markevery=(number, 3))
    left = int((yarn == plain).sum())
    slowed = int(((yarn * config.yarn.factor / plain - 1).abs() < 1e-4).sum())
    ax.axhline(1, color="#444444", linewidth=0.8, marker="")
    ax.axvspan(left - 1, len(plain) - slowed, color="#e6e6e6", zorder=0)
    ax.set(yscale="log", xlabel="pair, from fast to slow", ylabel="full turns")
    ax.legend()
    return fig, (
        f"Full turns of each of the {len(plain)} pairs, computed from the published sizes: YaRN leaves {left} pairs "
        f"alone, slows {slowed} by {config.yarn.factor:.0f} and blends {len(plain) - left - slowed} in between "
        "(grey). The thin line is one full turn."
    )
