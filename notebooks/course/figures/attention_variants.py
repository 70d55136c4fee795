"""Chapter 12's pictures: what each design chooses, how well it recalls, and what it costs.

The bench for choices needs no training. A dense model reads some needles once; queries, keys and attention of every
layer are kept, and each design then says what it would have read. Two numbers judge the answer: is the needle among
the chosen, and how much of the attention do they hold? `oracle`, the best possible choice, and `random` frame them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from course.experiments import variant_bench
from course.experiments.attention_variants.selective_attention import Budget, SelectiveAttention
from course.experiments.variant_costs import DESIGNS, token_cost
from course.ui.panel import Draw
from course.ui.style import COLOURS, MARKERS, provenance
from dsa.datasets.recall_tasks import Episodes
from dsa.kernels import ops
from dsa.model import baselines
from dsa.model.attention import Attention, IndexFactors
from dsa.model.config import Config
from dsa.model.transformer import Transformer
from dsa.training import evaluate

NAMES = {
    "dense": "dense", "window": "window", "sinks": "sinks + window", "moba": "MoBA", "quest": "Quest", "nsa": "NSA",
    "sparq": "SparQ", "msa": "MSA", "dsa": "DSA", "delta": "Gated DeltaNet 3:1", "oracle": "oracle", "random": "random",
}  # fmt: skip
CHOOSERS = ("oracle", "dsa", "sparq", "msa", "quest", "moba", "sinks", "window", "random")
GROUPS = {
    "no choice": ("dense", "delta", "sinks", "window"),
    "blocks": ("msa", "quest", "moba", "nsa"),
    "tokens": ("dsa", "sparq"),
}
LENGTHS = tuple(2**n for n in range(10, 21))
SHADES = {
    "dense": "#000000", "delta": COLOURS[2], "sinks": "#999999", "window": "#666666", "dsa": COLOURS[0],
    "sparq": COLOURS[5], "msa": COLOURS[4], "quest": COLOURS[3], "moba": COLOURS[1], "nsa": "#8C6BB1",
}  # fmt: skip
LOOKS = {name: {"color": SHADES[name], "marker": MARKERS[n % 8]} for n, name in enumerate(SHADES)}
DISTINCT = ("dense", "delta", "dsa", "quest", "moba", "window")  # others lie on one of these: see the words


@dataclass(frozen=True)
class Layer:
    """What one layer's attention had before it: absorbed queries, latents, index factors, and the mass it gave."""

    config: Config
    q: Tensor  # (B, T, H, C + R)
    kv: Tensor  # (B, S, C + R)
    index: IndexFactors
    attention_probs: Tensor  # (B, T, S)

    def chosen(self, who: str, budget: Budget) -> Tensor:
        """The keys that one of CHOOSERS would read: (B, T, K), -1 for empty."""
        B, T, S = self.attention_probs.shape
        if who in ("window", "random"):
            return getattr(baselines, who)(B, T, S, budget.keys)
        if who == "oracle":
            return baselines.oracle(self.attention_probs, budget.keys)
        if who == "dsa":
            return ops.index_topk(*self.index, budget.keys)
        design = variant_bench.CONVERTED[who](self.config, 0, budget)  # type: ignore[call-arg]
        assert isinstance(design, SelectiveAttention)
        return design.choose(self.q, self.kv, self.index)


@torch.no_grad()
def read_layers(model: Transformer, tokens: Tensor) -> list[Layer]:
    """Read tokens (B, T) with dense attention and keep what each layer's choosers need; the model has an indexer."""
    found = []
    attentions = [layer.get_submodule("self_attn") for layer in model.model.layers]
    with evaluate.set_to(model, "dense"):
        seen = variant_bench.record_attention(model, attentions, tokens)
    for attention, (x, context, _) in zip(attentions, seen, strict=True):
        assert isinstance(attention, Attention) and attention.indexer is not None
        q, latent = attention.queries(x, context.rope)
        kv = attention.compress_kv(x, context.rope)
        index = attention.indexer(x, latent, context.rope)
        found.append(Layer(model.config, attention.absorb_query(q), kv, index, attention.attention_probs(q, kv)))
    return found


def evaluate_chooser(layer: Layer, episodes: Episodes, who: str, budget: Budget) -> tuple[float, float]:
    """How many far needles one chooser finds, and what share of attention it keeps, rows with a real choice only."""
    chosen, far = layer.chosen(who, budget), episodes.distance > evaluate.HIT_FAR
    hits = evaluate.hit(chosen, episodes)[far].float().mean().item()
    return hits, baselines.attention_recall(layer.attention_probs, chosen)[:, budget.keys :].mean().item()


def draw_choices(layers: Sequence[Layer], episodes: Episodes) -> Draw:
    """The panel: `draw(keys, block, layer)` judges every chooser under one budget."""

    def draw(keys: int, block: int, layer: int) -> tuple[Figure, str]:
        budget = Budget(keys=keys, block=block)
        found = {who: evaluate_chooser(layers[layer], episodes, who, budget) for who in CHOOSERS}
        fig, axes = plt.subplots(1, 2, figsize=(7.4, 2.9), sharey=True)
        for ax, part, title in zip(axes, (0, 1), ("far needles found", "attention kept"), strict=True):
            _bars(ax, {NAMES[who]: both[part] for who, both in found.items()}, title)
        axes[0].invert_yaxis()  # of both, which share it
        words = ", ".join(f"{NAMES[who]} {hits:.0%} and {kept:.0%}" for who, (hits, kept) in found.items())
        return fig, f"Layer {layer}, {keys} keys, blocks of {block}; far needles and attention: {words}."

    return draw


def _bars(ax: Axes, values: Mapping[str, float], title: str) -> None:
    bars = ax.barh(list(values), list(values.values()), color=COLOURS[0])
    ax.bar_label(bars, [f"{value:.0%}" for value in values.values()], padding=2, fontsize=8)
    ax.set(title=title, xlim=(0, 1.18))
    ax.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    ax.tick_params(axis="y", labelsize=8)


def draw_distances(runs: Sequence[dict[str, Any]], length: int, steps: int) -> tuple[Figure, str]:
    """Recorded recall over distance after equal training: the mean of seeds, with their range."""
    bins = [*variant_bench.BINS, length]
    fig, axes = plt.subplots(1, 3, figsize=(8.8, 2.8), sharey=True)
    words = []
    for ax, (title, designs) in zip(axes, GROUPS.items(), strict=True):
        for size, design in zip((8, 6, 4, 3), designs, strict=False):  # equal lines: the smaller mark lies on top
            seeds = [variant_bench.measure_by_seed(runs, design, f"to {end}", steps) for end in bins]
            mean = [sum(values) / len(values) for values in seeds]
            spread = [
                [m - min(v) for m, v in zip(mean, seeds, strict=True)],
                [max(v) - m for m, v in zip(mean, seeds, strict=True)],
            ]
            look = {**LOOKS[design], "markersize": size}
            ax.errorbar(range(4), mean, spread, label=NAMES[design], capsize=2, **look, **provenance("recorded"))
            words.append(f"{NAMES[design]} " + ", ".join(f"{m:.2f}" for m in mean))
        ax.set_xticks(range(4), [f"to {end}" for end in bins], fontsize=8)
        ax.set(title=title, xlabel="tokens back", ylim=(-0.04, 1.06), xlim=(-0.35, 3.35))
        ax.legend(fontsize=8, loc="lower left" if title == "tokens" else "best")
    axes[0].set(ylabel="recall, recorded")
    return fig, f"Recall of needles to {', '.join(map(str, bins))} tokens back, mean of seeds: {'; '.join(words)}."


def draw_token_costs(config: Config, designs: Sequence[str] = DISTINCT) -> tuple[Figure, str]:
    """FLOP of one token in one layer, and numbers stored, by length."""
    fig, axes = plt.subplots(1, 2, figsize=(8.8, 3.4))
    for design in designs:
        costs = [token_cost(design, config, keys) for keys in LENGTHS]
        look = {**LOOKS[design], **provenance("modelled"), "label": NAMES[design], "markersize": 4}
        axes[0].plot(LENGTHS, [one.flops / 1e6 for one in costs], **look)
        axes[1].plot(LENGTHS, [one.memory(n) / 1e6 for one, n in zip(costs, LENGTHS, strict=True)], **look)
    for ax, what in zip(axes, ("MFLOP for a token and layer", "million numbers stored a layer"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel="tokens in view", ylabel=what)
        ax.set_xticks([2**10, 2**13, 2**17, 2**20], ["1 Ki", "8 Ki", "128 Ki", "1 Mi"])
        ax.minorticks_off()
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    far = {design: token_cost(design, config, LENGTHS[-1]) for design in designs}
    words = ", ".join(f"{NAMES[d]} {b.flops / 1e6:,.0f} and {b.memory(LENGTHS[-1]) / 1e6:,.0f}" for d, b in far.items())
    return fig, f"At {LENGTHS[-1]:,} tokens, MFLOP and million numbers stored: {words}."


def draw_split(config: Config, keys: int) -> tuple[Figure, str]:
    """One token's cost at one length, proxy and attention apart; designs that attend to everything are left out."""
    costs = {NAMES[d]: token_cost(d, config, keys) for d in DESIGNS if d not in ("dense", "delta")}
    fig, ax = plt.subplots(figsize=(7.4, 2.7))
    start = [0.0] * len(costs)
    for part, colour, hatch in (("projections", 4, ".."), ("scoring", 1, "//"), ("attention", 0, "")):
        values = [getattr(one, part) / 1e6 for one in costs.values()]
        ax.barh(list(costs), values, left=start, label=part, color=COLOURS[colour], hatch=hatch)
        start = [a + b for a, b in zip(start, values, strict=True)]
    ax.set(xlabel=f"MFLOP for a token that sees {keys:,}, one layer, modelled")
    ax.invert_yaxis()
    ax.legend()
    # the proxy is whatever serves the choice alone: its matrices, and its products with every candidate
    shares = {name: (one.projections + one.scoring) / one.flops for name, one in costs.items()}
    words = ", ".join(f"{name} {shares[name]:.0%} of {one.flops / 1e6:,.0f}" for name, one in costs.items())
    return fig, f"The proxy's share of a token's MFLOP at {keys:,} tokens in view: {words}."
