"""How much rounding a ranking survives: small number formats, blocks that share a scale, and the sets then chosen.

A rounded score is not judged by its error but by what it changes: which K tokens are chosen. So everything here rounds
the indexer's queries and keys, scores them in fp32, chooses, and compares the sets. The outlier of the panel is made on
purpose: one number of every key times a factor, the same number of every query divided by it. Each product stays as it
was, and in fp32 so does each choice; what differs is the rounding alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from course.ui.panel import Draw
from course.ui.reading import checked_int
from course.ui.style import COLOURS
from dsa.kernels import fp8, ops, reference
from dsa.model.indexer import Indexer
from dsa.model.transformer import Transformer

Factors = tuple[Tensor, Tensor, Tensor]  # q (B, T, J, W), k (B, S, W), w (B, T, J)
ALL = 10**9  # a block of so many rows or columns holds everything


@dataclass(frozen=True)
class Format:
    """A small number format: how many bits, its largest number, and how scaled numbers are rounded to it."""

    bits: int
    largest: float
    round: Callable[[Tensor], Tensor]


def _float(bits: int, fraction_bits: int, least_exponent: int, largest: float) -> Format:
    rounding = partial(fp8.round_to, fraction_bits=fraction_bits, least_exponent=least_exponent, largest=largest)
    return Format(bits, largest, rounding)


def _whole(bits: int) -> Format:
    largest = 2 ** (bits - 1) - 1
    return Format(bits, largest, lambda x: x.round().clamp(-largest, largest))


FORMATS = MappingProxyType(
    {
        "bf16": _float(16, 7, -100, 3e38),  # the limits are far from any index vector: only its 7 bits matter
        "int8": _whole(8),
        "e4m3": _float(8, 3, -6, 448.0),  # the variant without infinities, whose top exponent is in use
        "e5m2": _float(8, 2, -14, 57344.0),
        "e3m2": _float(6, 2, -2, 28.0),
        "int4": _whole(4),
        "e2m1": _float(4, 1, 0, 6.0),
        "int2": _whole(2),
    }
)
"""Formats by name: eEmF has E exponent and F fraction bits."""

BLOCKS = MappingProxyType({"8 numbers": (1, 8), "a row": (1, ALL), "128 rows": (128, ALL), "everything": (ALL, ALL)})
"""What may share a scale."""


def rounded(x: Tensor, name: str, block: tuple[int, int] = (1, ALL)) -> Tensor:
    """What a format leaves of x (..., M, N), a plain fp32 scale for each block; bf16 needs none."""
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is unknown: use one of {', '.join(FORMATS)}")
    form = FORMATS[name]
    if form.bits == 16:
        return form.round(x)
    block = min(block[0], x.shape[-2]), min(block[1], x.shape[-1])
    amax = fp8.block_amax(x, block).clamp(min=fp8.MIN_AMAX)
    scale = fp8.expand_scale(amax / form.largest, x.shape, block)
    return form.round(x / scale) * scale


def round_factors(factors: Factors, name: str, block: tuple[int, int] = (1, ALL), turn: bool = False) -> Factors:
    """Round index queries and keys, after a Hadamard transform if `turn`; the head weights stay."""
    q, k, w = factors
    if turn:
        q, k = fp8.hadamard(q), fp8.hadamard(k)
    flat = rounded(q.flatten(1, 2), name, block)  # rows of one query head each: (B, T * J, W)
    return flat.view_as(q), rounded(k, name, block), w


@torch.no_grad()
def index_factors(model: Transformer, tokens: Tensor) -> list[Factors]:
    """Each layer's factors of Eq. 1 in full precision, for tokens (B, T), under the model's own attention."""
    found: list[Factors] = []
    hooks = [
        module.register_forward_hook(lambda indexer, inputs, output: found.append(output))
        for module in model.modules()
        if isinstance(module, Indexer)
    ]
    before = model.index_precision
    model.index_precision = "full"
    try:
        model(tokens, trace=True)  # traced, so that the indexer runs whoever chooses
    finally:
        model.index_precision = before
        for hook in hooks:
            hook.remove()
    return found


def overlap(a: Tensor, b: Tensor, first: int = 0) -> float:
    """The share of tokens that two selections (B, T, K) have in common, over the queries from `first` on."""
    S = int(max(a.max(), b.max())) + 1
    mine, other = (reference.selection_mask(x, S)[:, first:] for x in (a, b))
    return float((mine & other).sum() / mine.sum())


def ranks_of_newcomers(scores: Tensor, chosen: Tensor, first: int = 0) -> Tensor:
    """Where the chosen tokens (B, T, K) that do not belong stood in the ranking of `scores` (B, T, S): places > K.

    A place is one more than the number of larger scores, so equal scores share theirs.
    """
    K, descending = chosen.shape[-1], scores[:, first:].sort(dim=-1, descending=True).values
    mine = scores[:, first:].gather(-1, chosen[:, first:].long())
    # searchsorted wants rising rows; it finds how many scores are larger
    places = torch.searchsorted((-descending).contiguous(), (-mine).contiguous()) + 1  # (B, T - first, K)
    return places[places > K]


def rank_quantile(places: Tensor, share: float = 0.95) -> int:
    """The place that `share` of `places` do not exceed."""
    return int(places.float().quantile(share, interpolation="higher"))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """How far `found` is off, as a share: |found - exact| / |exact| over all finite entries."""
    real = exact.isfinite()
    return float((found - exact)[real].norm() / exact[real].norm())


def with_outlier(factors: Factors, size: float, place: int = 0) -> Factors:
    """One number of each key times `size`, the same of each query divided by it: every score stays."""
    q, k, w = factors
    factor = torch.ones(k.shape[-1])
    factor[place] = size
    return q / factor, k * factor, w


def draw_outlier(factors: Factors, top_k: int = 16, first: int = 64) -> Draw:
    """Make a panel's callback: draw(outlier, block, format) -> (figure, sentence); the outlier is a power of two.

    Left: the magnitudes of one key, exact and rounded. Right: how many chosen tokens stay, for every outlier. Scores
    are summed in fp64, so that only this rounding decides, and not the order in which some kernel adds.
    """
    exact = ops.index_topk(*factors, top_k)

    @lru_cache(maxsize=512)
    def kept(power: int, block: str, name: str, turn: bool) -> float:
        changed = round_factors(with_outlier(factors, 2.0**power), name, BLOCKS[block], turn)
        q, k, w = (x.double() for x in changed)
        return overlap(ops.index_topk(q, k, w, top_k), exact, first)

    def draw(outlier: int, block: str, format: str) -> tuple[Figure, str]:
        checked_int("outlier", outlier, 0, 12, "the factor is 2 to this power")
        if block not in BLOCKS or format not in FORMATS:
            raise ValueError(f"{block!r}, {format!r}: use one of {', '.join(BLOCKS)}; and of {', '.join(FORMATS)}")
        fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 2.9), width_ratios=[1, 1.25])
        _draw_key(left, with_outlier(factors, 2.0**outlier)[1], 2**outlier, format, BLOCKS[block])
        powers = range(0, 13, 2)
        for turn, marker, colour in ((False, "o", COLOURS[0]), (True, "s", COLOURS[1])):
            label = "after Hadamard" if turn else "as they are"
            right.plot(powers, [kept(p, block, format, turn) for p in powers], marker=marker, color=colour, label=label)
        right.axvline(outlier, color="#444444", linewidth=0.8)
        right.set(xlabel="outlier, 2 to the power of", ylabel="share that stays", ylim=(0, 1.05))
        right.set_title("Chosen tokens that stay chosen")
        right.legend(loc="lower left")
        plain, turned = (kept(outlier, block, format, turn) for turn in (False, True))
        words = (
            f"With {format}, one scale for {block} and an outlier of {2**outlier:,}: {plain:.0%} of the chosen tokens "
            f"stay, after a Hadamard transform {turned:.0%}."
        )
        return fig, words

    return draw


def _draw_key(ax: Axes, k: Tensor, size: int, name: str, block: tuple[int, int]) -> None:
    """The magnitudes of one key before and after rounding."""
    before, after = k[0, -1].abs(), rounded(k, name, block)[0, -1].abs()
    places = range(len(before))
    ax.plot(places, before, linestyle="", marker="o", mfc="none", color="#8a8a8a", markersize=7, label="exact")
    ax.plot(places, after, linestyle="", marker="x", color=COLOURS[0], label=name)
    smallest = max(float(before[before > 0].min()), 1e-4)
    ax.set_yscale("symlog", linthresh=smallest)
    ax.set_ylim(-0.4 * smallest, 4 * float(before.max()))
    ax.set(title=f"One key, its number 0 times {size:,}", xlabel="number", ylabel="magnitude")
    ax.legend(loc="upper right", fontsize=8, ncols=2)
