"""What a long context costs, to play with: FLOPs of a token and bytes of its cache, by length, top-k, heads, precision.

All of it is counted from sizes (`dsa.analysis`), so every line is drawn as modelled. The real model's sizes are the
start; the controls change what a designer could have chosen otherwise.
"""

import math

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from course.figures.flop_counts import LENGTHS, work_lines
from course.ui.panel import Draw
from course.ui.reading import checked_int
from course.ui.style import COLOURS
from dsa.analysis.flops import FlopCount, crossover, decode_traffic, token_flops
from dsa.analysis.memory import PRECISIONS, cache_bytes
from dsa.bench.timing import cpu_seconds
from dsa.kernels import ops
from dsa.model.config import Config

UNIT = 1024  # tokens that one step of the length slider adds


def draw_context_cost(config: Config) -> Draw:
    """Make a panel's callback: draw(length, top_k, heads, precision) -> (figure, sentence).

    `length` counts units of 1,024 tokens. Raises ValueError for what the model cannot have.
    """
    longest = config.max_position_embeddings

    def draw(length: int, top_k: int, heads: int, precision: str) -> tuple[Figure, str]:
        checked_int("length", length, 1, longest // UNIT, f"the model reads {longest:,} tokens, {UNIT:,} in a unit")
        checked_int("top-k", top_k, 1, longest, f"the model reads {longest:,} tokens")
        checked_int("heads", heads, 1, 1024, "the published model has 128")
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
        chosen = config.replace(index_topk=top_k, num_attention_heads=heads)
        fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), width_ratios=[1.25, 1])
        _draw_flops(left, chosen, length * UNIT)
        _draw_bytes(right, chosen, length * UNIT, precision)
        return fig, _sentence(chosen, length * UNIT, precision)

    return draw


def token_gain(keys: int) -> tuple[float, float]:
    """How many times faster than a dense token a sparse one is decoded that sees `keys` keys: (measured, counted).

    One layer of a small size with the real model's proportions: H 8, C 128, R 16, J 4, W 32, K 64, so a pair costs 17
    times the indexer's.
    """
    generator = torch.Generator().manual_seed(3)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    q, kv = random(1, 1, 8, 144), random(1, keys, 144)  # (B, T, H, C + R), (B, S, C + R)
    index_q, index_k, w = random(1, 1, 4, 32), random(1, keys, 32), random(1, 1, 4)
    shared = kv[:, :, None]  # (B, S, 1, C + R)
    calls = {
        "dense": lambda: ops.dense_attention(q, shared, shared, 0.1),
        "sparse": lambda: ops.sparse_attention(q, kv, ops.index_topk(index_q, index_k, w, 64), 0.1, 128),
    }
    seconds = cpu_seconds(calls, repeats=9)
    return seconds["dense"] / seconds["sparse"], 17 * keys / (keys + 17 * min(keys, 64))


def _draw_flops(ax: Axes, config: Config, keys: int) -> None:
    """Work per token over length, with the present length and the crossovers marked."""
    work_lines(ax, config)
    for phase, colour in (("prefill", COLOURS[0]), ("decode", COLOURS[1])):
        meet = crossover(config, phase)
        if meet <= LENGTHS[-1]:
            cost = token_flops(config, max(1, round(meet)), "sparse", phase).total / 1e9
            ax.plot([meet], [cost], marker="o", markersize=11, fillstyle="none", color=colour, linestyle="")
    ax.axvline(keys, color="#444444", linewidth=0.8)
    ax.set(ylim=(50, 5000), title="work; circles mark the crossovers")


def _draw_bytes(ax: Axes, config: Config, keys: int, precision: str) -> None:
    """Cache held and cache read for one decoded token, latents and index keys apart."""
    names, latents, index_keys = [], [], []
    for attention in ("dense", "sparse"):
        bare, whole = (keys * cache_bytes(config, precision, indexer=kind) for kind in (False, True))
        read = decode_traffic(config, keys, attention, precision)
        names += [f"{attention}\nholds", f"{attention}\nreads"]
        latents += [bare / 1e9, read.latents / 1e9]
        index_keys += [(whole - bare) / 1e9 if attention == "sparse" else 0, read.index_keys / 1e9]
    ax.bar(names, latents, width=0.6, label="latents", color=COLOURS[2])
    ax.bar(names, index_keys, width=0.6, bottom=latents, label="index keys", color=COLOURS[3], hatch="//")
    ax.set(ylabel="GB", title=f"cache, {precision}")
    ax.margins(y=0.3)
    ax.legend(loc="upper right", fontsize=8, ncols=2)


def _sentence(config: Config, keys: int, precision: str) -> str:
    dense = [token_flops(config, keys, "dense", phase).total / 1e9 for phase in ("prefill", "decode")]
    sparse = token_flops(config, keys, "sparse", "decode")
    meets = [_from_length(crossover(config, phase)) for phase in ("prefill", "decode")]
    held, bare = (keys * cache_bytes(config, precision, indexer=kind) / 1e9 for kind in (True, False))
    read = decode_traffic(config, keys, "sparse", precision)
    return (
        f"A token that sees {keys:,} takes {dense[0]:,.0f} GFLOP dense in prefill, {dense[1]:,.0f} dense in decode and "
        f"{sparse.total / 1e9:,.0f} sparse, {scoring_share(sparse):.0%} of it scoring; sparse is cheaper {meets[0]} in "
        f"prefill and {meets[1]} in decode. Its sequence holds {held:.2f} GB of cache, {bare:.2f} without index keys; "
        f"decoding one token reads {read.cache / 1e9:.2f} GB of it, dense {bare:.2f}."
    )


def scoring_share(work: FlopCount) -> float:
    """What share of a pass is index scoring."""
    return work.scoring / work.total


def _from_length(keys: float) -> str:
    return "at no length" if keys == math.inf else f"above {keys:,.0f} tokens"
