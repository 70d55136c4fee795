"""The pictures of chapter 07: each takes numbers that the notebook computed and returns (figure, sentence).

They hold what a reader need not see in order to follow the argument: axes, labels, and the words below. Nothing is
rounded or chosen here; `rounding` does that.
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from course.figures import rounding
from dsa.kernels import fp8

Drawn = tuple[Figure, str]


def draw_numbers(positive: Tensor, ends: Sequence[float] = (448, 16, 1 / 32)) -> Drawn:
    """The numbers of a format, `positive` and sorted, as strokes: one row for each part from 0 to an end."""
    fig, axes = plt.subplots(len(ends), 1, figsize=(7.5, 3.0))
    for ax, end in zip(axes, ends, strict=True):
        inside = positive[positive <= end]
        ax.vlines(inside.tolist(), 0, 1, linewidth=1)
        ax.set(xlim=(-0.01 * end, 1.01 * end), yticks=[], ylim=(0, 1))
        ax.set_title(f"0 to {end if end >= 1 else f'1/{1 / end:.0f}'}: {len(inside)} numbers", fontsize=9)
        ax.grid(False)
    gaps = positive.diff()
    return fig, (
        f"The numbers of e4m3. Neighbours lie {gaps[-1]:.0f} apart at the top and 2^{math.log2(gaps[0]):.0f} apart at "
        "zero: at each power of two the distance doubles."
    )


def draw_scales(x: Tensor) -> Drawn:
    """Scales of a matrix (M, N) in runs and in squares, side by side, and how many of them are 2 or more."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    touched = []
    for ax, block, name in zip(axes, (fp8.GROUP, fp8.BLOCK), ("runs of 128", "squares of 128 x 128"), strict=True):
        scale = fp8.quantize(x, block)[1]
        wide = fp8.expand_scale(scale, x.shape, block).log2()
        touched.append(int((wide >= 0).sum()))
        image = ax.imshow(wide.numpy(), aspect="auto", vmin=-8, vmax=1)
        ax.set(title=f"{name}: {scale.numel():,} scales", xlabel="column")
        ax.grid(False)
    axes[0].set_ylabel("row")
    fig.colorbar(image, ax=axes, label="scale, 2 to the power of")
    return fig, (
        f"Scales of a {x.shape[0]} x {x.shape[1]} matrix with one large band of columns and one single large number. "
        f"That number lifts the scale of {touched[0]:,} numbers to 1 or more with runs, of {touched[1]:,} with squares."
    )


def draw_lines(lines: Mapping[str, Mapping[str, float]], ylabel: str, lowest: float = 0.0) -> Figure:
    """Shares by format: lines[label][format], one line for each label."""
    fig, ax = plt.subplots(figsize=(7.5, 2.9))
    for label, shares in lines.items():
        ax.plot(list(shares), list(shares.values()), label=label)
    ax.set(xlabel="format of index queries and keys, from many bits to few", ylabel=ylabel, ylim=(lowest, 1.04))
    ax.legend(loc="lower left")
    return fig


def draw_newcomers(places: Mapping[str, Tensor], queries: int, top_k: int = 16, last: int = 64) -> Drawn:
    """How often a newcomer stood at which place of the exact ranking, a query: `places` by format."""
    fig, ax = plt.subplots(figsize=(7.5, 2.8))
    for name, at in places.items():
        count = torch.bincount(at, minlength=last + 1)[top_k + 1 : last + 1] / queries
        count[count == 0] = float("nan")  # a logarithm has no place for 0
        ax.plot(range(top_k + 1, last + 1), count.tolist(), label=name, markersize=3.5)
    ax.set(xlabel="place in the exact ranking", ylabel="newcomers a query", yscale="log", ylim=(1e-4, 1))
    ax.legend(loc="lower right", bbox_to_anchor=(1, 0.1))
    words = ", ".join(f"{name} {rounding.rank_quantile(at)}" for name, at in places.items())
    return fig, f"Where newcomers to the {top_k} stood in fp32. 95% of them stood no farther down than: {words}."


def draw_relative_errors(names: Sequence[str]) -> tuple[Figure, dict[str, float]]:
    """Worst relative error of rounding by magnitude, and for each format the size below which numbers vanish."""
    x = torch.logspace(-6, 0, 4000)  # as a share of the block's largest number
    fig, ax = plt.subplots(figsize=(7.5, 2.9))
    vanish = {}
    for name in names:
        left = rounding.rounded(x[None], name)[0]
        error = ((left - x) / x).abs().unflatten(0, (40, 100)).amax(-1)
        vanish[name] = float(x[(left == 0).sum()])
        ax.plot(x[50::100].tolist(), error.tolist(), label=name)
    ax.set(xscale="log", yscale="log", ylim=(1e-3, 2), ylabel="worst relative error")
    ax.set_xlabel("size of a number, as a share of the largest in its block")
    ax.legend(loc="lower left")
    return fig, vanish


def draw_pairs(errors: Mapping[str, tuple[float, float]]) -> Drawn:
    """Relative errors as they are and after a Hadamard transform, by case."""
    fig, ax = plt.subplots(figsize=(7.5, 2.9))
    for n, label in enumerate(("as they are", "after Hadamard")):
        places, heights = [at + 0.36 * n - 0.18 for at in range(len(errors))], [100 * p[n] for p in errors.values()]
        ax.bar(places, heights, width=0.34, label=label, hatch=("", "//")[n], edgecolor="white")
    ax.set_xticks(range(len(errors)), list(errors))
    ax.set(xlabel="outliers", ylabel="error of q . k in %")
    ax.legend(loc="upper left")
    words = "; ".join(f"{name} {a:.1%} without, {b:.1%} with" for name, (a, b) in errors.items())
    return fig, f"Relative error of q . k in e4m3, by outliers: {words}."


def draw_bytes(rows: Mapping[str, tuple[int, int, int]]) -> Drawn:
    """Stacked bytes of a cache: rows[kind] = (latent, rotary key, index key)."""
    fig, ax = plt.subplots(figsize=(7.5, 2.3))
    left = torch.zeros(len(rows))
    for n, part in enumerate(("latent", "rotary key", "index key")):
        sizes = [row[n] for row in rows.values()]
        ax.barh(range(len(rows)), sizes, left=left.tolist(), label=part, hatch=("", "//", "..")[n], edgecolor="white")
        left += torch.tensor(sizes)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.invert_yaxis()
    ax.set(xlabel="bytes for one token in one layer", xlim=(0, 1.3 * float(left.max())))
    ax.legend(loc="center right")
    words = "; ".join(f"{kind}: {sum(sizes):,}" for kind, sizes in rows.items())
    return fig, f"Cache of one token in one layer, in bytes. {words[0].upper()}{words[1:]}."
