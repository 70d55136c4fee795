"""What a text costs under sparse attention, before and after the model has learned to live with it.

Chapter 07 compares models that differ in how they were trained on. Its panel lets a reader do so on a text of their
own: each model reads it twice, with all keys and with K that somebody chooses, and what the choice costs is drawn where
it is paid, byte by byte. The other functions here draw the chapter's recorded tables.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dsa.cost.published import Benchmark
from dsa.model.transformer import Transformer
from dsa.show.figures import COLOURS, LINES, MARKERS
from dsa.show.panel import Draw
from dsa.show.reading import checked, readable
from dsa.text import tokenizer
from dsa.training.evaluate import set_to

CHOOSERS = ("indexer", "oracle", "window", "random")
MOST = 64
Row = dict[str, Any]


def bits(model: Transformer, ids: list[int], attention: str, top_k: int) -> Tensor:
    """Bits that a model pays for each token of a text after the first: (T - 1,)."""
    tokens = torch.tensor([ids])
    with set_to(model, attention, top_k):
        chances = model(tokens)[0, :-1].log_softmax(-1)
    return -chances.gather(-1, tokens[0, 1:, None])[:, 0] / math.log(2)


def draw_price(models: Mapping[str, Transformer]) -> Draw:
    """Make a panel's callback: draw(text, top_k, who) -> (figure, sentence), for models by name.

    ValueError for a text that cannot be read, a K outside 1 ... 64, or an unknown chooser.
    """
    longest = min(model.config.max_position_embeddings for model in models.values())

    @lru_cache(maxsize=32)
    def paid(name: str, text: str, attention: str, top_k: int) -> Tensor:
        return bits(models[name], tokenizer.last_tokens(readable(text), longest), attention, top_k)

    def draw(text: str, top_k: int, who: str) -> tuple[Figure, str]:
        checked("top-k", top_k, 1, MOST, "with more keys there is little left to see")
        if who not in CHOOSERS:
            raise ValueError(f"chooser {who!r} is unknown: use one of {', '.join(CHOOSERS)}")
        attention = "sparse" if who == "indexer" else who
        raw = int(tokenizer.byte_count(torch.tensor(tokenizer.last_tokens(readable(text), longest)[1:])).sum())
        full = {name: paid(name, text, "dense", longest) for name in models}
        cut = {name: paid(name, text, attention, top_k) for name in models}
        return _figure(full, cut), _sentence(full, cut, top_k, who, max(raw, 1))

    return draw


def _figure(full: Mapping[str, Tensor], cut: Mapping[str, Tensor]) -> Figure:
    """What has been paid so far for not seeing everything, one line a model."""
    fig, ax = plt.subplots(figsize=(7, 2.8))
    for number, name in enumerate(cut):
        extra = (cut[name] - full[name]).cumsum(0)
        ax.plot(range(1, len(extra) + 1), extra, label=name, color=COLOURS[number], marker=MARKERS[number],
                markevery=max(1, len(extra) // 8))  # fmt: skip
    ax.axhline(0, color="#8a8a8a", linewidth=1)
    ax.set(xlabel="token of the text", ylabel="extra bits so far")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", title="trained")
    return fig


def _sentence(full: Mapping[str, Tensor], cut: Mapping[str, Tensor], top_k: int, who: str, raw: int) -> str:
    paid = {name: [float(cost[name].sum()) / raw for cost in (full, cut)] for name in cut}
    parts = [f"trained {name}: {a:.2f} with all keys, {b:.2f} with {top_k}" for name, (a, b) in paid.items()]
    tokens = len(next(iter(cut.values()))) + 1
    return f"{tokens} tokens, K = {top_k}, chooser: {who}. Bits per byte, " + "; ".join(parts) + "."


def along(rows: Sequence[Row], model: str, attention: str, measure: str) -> dict[int, list[float]]:
    """One line of a recorded sweep: K -> the measure of each seed. ValueError if it was not swept."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["model"], row["attention"]) == (model, attention):
            found.setdefault(row["top_k"], []).append(row[measure])
    if not found:
        raise ValueError(f"the sweep holds no model {model!r} with attention {attention!r}")
    return dict(sorted(found.items()))


def draw_line(ax: Axes, line: Mapping[int, Sequence[float]], label: str, number: int) -> None:
    """The mean over seeds against K, with bars from the least to the most; recorded, so dashed."""
    values = list(line.values())
    middle = [mean(each) for each in values]
    reach = [[m - min(e) for m, e in zip(middle, values, strict=True)],
             [max(e) - m for m, e in zip(middle, values, strict=True)]]  # fmt: skip
    look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": LINES["recorded"]}
    ax.errorbar(list(line), middle, yerr=reach, label=label, capsize=2, **look)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(line), [str(k) for k in line])
    ax.set_xlabel("K")


def spread(values: Sequence[float]) -> str:
    """The mean of some seeds, and their deviation."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def draw_differences(ax: Axes, table: Sequence[Row], label: str, number: int) -> None:
    """Our benchmarks: one model's difference to the dense twin in points, with its 95 % interval, one line each."""
    places = [0.15 - 0.3 * number - n for n in range(len(table))]
    gaps, halves = ([100 * row[key] for row in table] for key in ("difference", "half"))
    look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": "none"}
    ax.errorbar(gaps, places, xerr=halves, label=label, capsize=2, elinewidth=1, **look)
    ax.axvline(0, color="#8a8a8a", linewidth=1)
    ax.set_yticks([-n for n in range(len(table))], [row["benchmark"] for row in table])


def draw_scratch(ax: Axes, runs: Mapping[str, Row]) -> None:
    """Recorded runs from random weights, by name: the share copied, then the share of needles, every ten steps."""
    for number, (name, row) in enumerate(runs.items()):
        look: dict[str, Any] = {"color": COLOURS[number], "linestyle": LINES["recorded"]}
        for start, task, marker in ((0, "copy", "o"), (row["copy_steps"], "recall", "^")):
            at = [start + 10 * n + 5 for n in range(len(row[task]))]
            label = f"{name}: {'needles' if task == 'recall' else task}"
            ax.plot(at, row[task], marker=marker, label=label, **look)
    ax.set(xlabel="step", ylabel="right")


def draw_published(ax: Axes, table: Sequence[Benchmark]) -> None:
    """The report's shares: the difference in points as published, over a band of what chance alone can do."""
    shares = [row for row in table if row.dense <= 100]
    for n, row in enumerate(shares):
        if (half := row.chance()) is not None:
            ax.barh(-n, 2 * half, left=-half, height=0.7, color="#dddddd")
    ax.plot([row.difference for row in shares], [-n for n in range(len(shares))], "s", color=COLOURS[3])
    ax.axvline(0, color="#8a8a8a", linewidth=1)
    ax.set_yticks([-n for n in range(len(shares))], [row.name for row in shares])
