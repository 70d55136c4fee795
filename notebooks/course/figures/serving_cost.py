"""What serving costs, as pictures: who pays for what, what matters most, and a calculator to move.

Two kinds of bill stand beside each other and must not be mixed: the *list*, what a user pays for tokens, and *GPU
time*, what it costs to compute them. The list is published; GPU time is modelled (:mod:`dsa.analysis.roofline`), except
where a picture says that it comes from the published figure.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from course.figures.cost_curves import ki_axis
from course.ui.reading import checked_int
from course.ui.style import COLOURS, MARKERS, provenance
from dsa.analysis.pricing import (
    LIST_PRICES,
    Bar,
    Bill,
    Conversation,
    Prices,
    Request,
    gpu_time_bill,
    list_price_bill,
    published_gpu_bills,
)
from dsa.analysis.published import crossing
from dsa.analysis.roofline import DENSE, H800, MAX_POSITION, SPARSE, Curves, base_costs, modelled_curves
from dsa.model.config import Config

Drawn = tuple[Figure, str]
UNIT = 1024  # tokens that one step of the length slider adds
ANSWER = 1000  # tokens that the calculator's request writes
PARTS = ("fresh", "cached", "written")


def draw_serving_costs(
    published: Curves, conversations: Mapping[str, Conversation], prices: Prices = LIST_PRICES
) -> Drawn:
    """For each use its bill by the list, and in GPU time by the published figure, dense and sparse."""
    fig, [axes] = plt.subplots(1, len(conversations), figsize=(8, 2.7), squeeze=False)
    words = []
    for ax, (name, conversation) in zip(axes, conversations.items(), strict=True):
        bills = {"list": list_price_bill(conversation, prices), **published_gpu_bills(published, conversation)}
        _stacked(ax, {label.replace("-", "\n"): bill for label, bill in bills.items()})
        ax.set(title=name)
        words.append(f"{name} {', '.join(f'{label} {_cents(bill.total)}' for label, bill in bills.items())}")
    axes[0].set(ylabel="US cents")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return fig, f"A bill in cents, by the price list and in GPU time: {'; '.join(words)}."


def _stacked(ax: Axes, bills: Mapping[str, Bill]) -> None:
    """One bar for each bill, its parts on each other, the total above."""
    base = [0.0] * len(bills)
    for number, part in enumerate(PARTS):
        heights = [100 * getattr(bill, part) for bill in bills.values()]
        hatch = ("", "//", "..")[number]
        bars = ax.bar(list(bills), heights, bottom=base, label=part, color=COLOURS[number], hatch=hatch, width=0.6)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    ax.bar_label(bars, [f"{total:.2g}" for total in base], padding=2, fontsize=9)
    ax.margins(y=0.15)
    ax.grid(axis="x", visible=False)


def draw_tornado(charts: Mapping[str, tuple[float, Sequence[Bar]]]) -> Drawn:
    """Tornado charts: title -> (the cost as it is, bars), in US cents on a logarithmic axis."""
    fig, [axes] = plt.subplots(1, len(charts), figsize=(9, 2.9), squeeze=False)
    words = []
    for ax, (title, (middle, bars)) in zip(axes, charts.items(), strict=True):
        for row, bar in enumerate(reversed(bars)):
            low, high = sorted(100 * cost for cost in bar.costs)
            ax.barh(row, high - low, left=low, color=COLOURS[row % 2], height=0.6)
        ax.set_yticks(range(len(bars)), [_moved(bar) for bar in reversed(bars)], fontsize=8)
        ax.axvline(100 * middle, color="black", linewidth=0.9)
        ax.set(title=title, xscale="log", xlabel="US cents")
        widest = max(bars[0].costs) / min(bars[0].costs)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if widest < 30 else (1,)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        first = [f"{_moved(bar)} {_cents(bar.costs[0])} to {_cents(bar.costs[1])}" for bar in bars[:3]]
        words.append(f"{title}, {_cents(middle)} cents as it is: {', '.join(first)}")
    return fig, f"What moves the cost most. {'; '.join(words)}."


def _moved(bar: Bar) -> str:
    low, high = (f"{value:,}" if isinstance(value, int) else f"{value}" for value in bar.values)
    return f"{bar.name.replace('_', ' ')} {low.removesuffix('-Terminus')} … {high.removesuffix('-Exp')}"


def _cents(dollars: float) -> str:
    return f"{100 * dollars:.2g}" if dollars < 1 else f"{100 * dollars:.0f}"


def draw_calculator(config: Config, published: Curves) -> Callable[..., Drawn]:
    """Make a panel's callback: draw(length, top_k, price, cached) -> (figure, sentence).

    One request: a prompt of `length` units of 1,024 tokens, of which the first `cached` per cent are in the cache, and
    1,000 tokens of answer, on GPUs of `price` US cents an hour. Raises ValueError for what cannot be.
    """
    found = base_costs(published)

    def draw(length: int, top_k: int, price: int, cached: int) -> Drawn:
        ends = f"the figure ends at {MAX_POSITION:,} tokens, and the answer needs {ANSWER:,}"
        checked_int("length", length, 1, 127, ends)
        checked_int("top-k", top_k, 1, MAX_POSITION, "no more than the context")
        checked_int("price", price, 1, 10_000, "US cents for an hour of one GPU")
        checked_int("cached", cached, 0, 100, "a share in per cent")
        curves = modelled_curves(config.replace(index_topk=top_k), found)
        request = Request(length * UNIT, length * UNIT * cached // 100, ANSWER)
        scale = price / 100 / H800.dollars_per_hour
        bills = {m: gpu_time_bill([request], curves["prefill", m], curves["decode", m], scale) for m in (DENSE, SPARSE)}
        fig, (left, right) = plt.subplots(1, 2, figsize=(6.6, 2.6), width_ratios=[1.4, 1])
        _curves(left, curves, scale)
        left.axvline(length * UNIT, color="#444444", linewidth=0.8)
        _stacked(right, {"list": list_price_bill([request]), "V3.1": bills[DENSE], "V3.2": bills[SPARSE]})
        right.set(title="the request", ylabel="US cents")
        right.legend(fontsize=7)
        return fig, _calculated(request, bills, curves, top_k)

    return draw


def _curves(ax: Axes, curves: Curves, scale: float) -> None:
    """All four curves, dearest on top, on a logarithmic axis."""
    for number, ((phase, model), curve) in enumerate(curves.items()):
        look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], **provenance("modelled")}
        places = sorted({*curve.positions, *range(0, MAX_POSITION, 2 * 8192)})
        ax.plot(places, [scale * curve.at(p) for p in places], label=f"{model[:4]}, {phase}", **look)
    ki_axis(ax)
    lowest = scale * min(curve.dollars[0] for curve in curves.values())
    ax.set(yscale="log", title="a token", ylabel="$ per million tokens", ylim=(lowest / 3, None))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.legend(fontsize=7, ncols=2, loc="lower right", frameon=True, framealpha=1, edgecolor="none")


def _calculated(request: Request, bills: Mapping[str, Bill], curves: Curves, top_k: int) -> str:
    places = []
    for phase in ("prefill", "decode"):
        try:
            place = f"above {crossing(curves[phase, DENSE], curves[phase, SPARSE]):,.0f} tokens"
        except ValueError:
            place = "nowhere up to 128 Ki"
        places.append(f"{place} in {phase}")
    dense, sparse = (100 * bills[model].total for model in (DENSE, SPARSE))
    return (
        f"A prompt of {request.prompt:,} tokens, {request.cached:,} of them cached, and {request.written:,} tokens of "
        f"answer: by the list {100 * list_price_bill([request]).total:.2f} cents; "
        f"GPU time {dense:.2f} dense and {sparse:.2f} sparse with top-k {top_k:,}, {dense / sparse:.1f} times less. "
        f"A token is cheaper sparse {' and '.join(places)}."
    )
