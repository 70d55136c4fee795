"""What a text costs under sparse attention, before and after the model has learned to live with it.

Chapter 06 compares models that differ in how they were trained on. Its panel lets a reader do so on a text of their
own: each model reads it twice, with all keys and with K that somebody chooses, and what the choice costs is drawn where
it is paid, byte by byte. The other functions here draw the chapter's recorded tables.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from course.ui.panel import Draw
from course.ui.reading import checked_int, tokenize
from course.ui.style import COLOURS, LINES, MARKERS
from dsa.analysis.published import Benchmark
from dsa.datasets import byte_tokenizer
from dsa.model.transformer import Transformer
from dsa.training.evaluate import set_to

CHOOSERS = ("indexer", "oracle", "window", "random")
MAX_TOP_K = 64
HATCHES = ("", "//", "..", "xx", "--")
Row = dict[str, Any]
Pair = tuple[str, str]
Drawn = tuple[Figure, str]


def bits_per_token(model: Transformer, ids: list[int], attention: str, top_k: int) -> Tensor:
    """Bits that a model pays for each token of a text after the first: (T - 1,)."""
    tokens = torch.tensor([ids])
    with set_to(model, attention, top_k):
        chances = model(tokens)[0, :-1].log_softmax(-1)
    return -chances.gather(-1, tokens[0, 1:, None])[:, 0] / math.log(2)  # nats to bits


def draw_extra_bits(models: Mapping[str, Transformer]) -> Draw:
    """Make a panel's callback: draw(text, top_k, who) -> (figure, sentence), for models by name.

    ValueError for a text that cannot be read, a K outside 1 ... 64, or an unknown chooser.
    """
    longest = min(model.config.max_position_embeddings for model in models.values())

    @lru_cache(maxsize=32)
    def paid(name: str, text: str, attention: str, top_k: int) -> Tensor:
        return bits_per_token(models[name], byte_tokenizer.last_tokens(tokenize(text), longest), attention, top_k)

    def draw(text: str, top_k: int, who: str) -> tuple[Figure, str]:
        checked_int("top-k", top_k, 1, MAX_TOP_K, "with more keys there is little left to see")
        if who not in CHOOSERS:
            raise ValueError(f"chooser {who!r} is unknown: use one of {', '.join(CHOOSERS)}")
        attention = "sparse" if who == "indexer" else who
        raw = int(
            byte_tokenizer.byte_count(torch.tensor(byte_tokenizer.last_tokens(tokenize(text), longest)[1:])).sum()
        )
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


def recorded_curve(rows: Sequence[Row], model: str, attention: str, measure: str) -> dict[int, list[float]]:
    """One line of a recorded sweep: K -> the measure of each seed. ValueError if it was not swept."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["model"], row["attention"]) == (model, attention):
            found.setdefault(row["top_k"], []).append(row[measure])
    if not found:
        raise ValueError(f"the sweep holds no model {model!r} with attention {attention!r}")
    return dict(sorted(found.items()))


def gradient_norm(gradients: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """The norm of these gradients, taken as one long vector: a scalar."""
    return torch.cat([gradients[name].flatten() for name in names]).norm()


def draw_sweep(rows: Sequence[Row], lines: Mapping[str, Pair], said: Sequence[int], most: float | None = None) -> Drawn:
    """Bits and recall against K, for each name a pair (model, chooser) of a recorded sweep.

    The words tell of the Ks `said`; `most` cuts the axis of bits off.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.8, 2.9))
    for number, (name, pair) in enumerate(lines.items()):
        _line(left, recorded_curve(rows, *pair, "bits"), name, number)
        _line(right, recorded_curve(rows, *pair, "recall"), name, number)
    left.set(ylabel="bits per byte", ylim=(None, most))
    right.set(ylabel="needles recalled", ylim=(0, 1.05))
    fig.legend(*left.get_legend_handles_labels(), loc="outside right center")
    means = {
        name: [tuple(mean(recorded_curve(rows, *pair, what)[k]) for what in ("bits", "recall")) for k in said]
        for name, pair in lines.items()
    }
    words = "; ".join(
        f"{name}: "
        + ", ".join(f"K {k} {bits:.2f} bits and {right:.0%}" for k, (bits, right) in zip(said, found, strict=True))
        for name, found in means.items()
    )
    return fig, f"Recorded, mean of three seeds, bars from the least to the most. {words}."


def _line(ax: Axes, line: Mapping[int, Sequence[float]], label: str, number: int) -> None:
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


def draw_loss_gap(curves: Mapping[str, Sequence[float]], baseline: str, steps: int) -> Drawn:
    """How far curves of language losses lie above that of `baseline`; each has the means of equal parts of `steps`."""
    fig, ax = plt.subplots(figsize=(6.6, 2.6))
    part, words = steps / len(curves[baseline]), []
    for name in (name for name in curves if name != baseline):
        behind = [a - b for a, b in zip(curves[name], curves[baseline], strict=True)]
        ax.plot([part * (n + 0.5) for n in range(len(behind))], behind, label=name)
        words.append(f"{name} {behind[0]:.2f} at first, {behind[-1]:.2f} at last")
    ax.set(xlabel="step", ylabel=f"nats behind the {baseline} twin", ylim=(0, None))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    batches = f"Language loss on the training batches, minus the {baseline} twin's on the same batches"
    return fig, f"{batches}, measured: {'; '.join(words)}."


def draw_attention_recall(kept: Mapping[str, Sequence[float]], whose: str) -> Drawn:
    """Bars of how much attention some keys hold in each layer, by the name of the model or of who chose the keys."""
    fig, ax = plt.subplots(figsize=(6.6, 2.5))
    step = min(0.3, 0.8 / len(kept))
    for i, (name, shares) in enumerate(kept.items()):
        places = [n + step * (i - (len(kept) - 1) / 2) for n in range(len(shares))]
        ax.bar(places, shares, width=0.93 * step, label=name, hatch=HATCHES[i % len(HATCHES)])
    layers = range(len(shares))
    ax.set_xticks(layers, [f"layer {n}" for n in layers])
    ax.set(ylabel=f"{whose} hold", ylim=(0, 1.05))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    words = "; ".join(f"{name} {', '.join(f'{x:.0%}' for x in shares)}" for name, shares in kept.items())
    return fig, f"Attention held by the {whose}, layer by layer: {words}."


def draw_benchmark_suite(sparse: Sequence[Row], window: Sequence[Row]) -> Drawn:
    """Our benchmarks: what the sparse and the window model lack to the dense baseline, with 95 % intervals."""
    fig, ax = plt.subplots(figsize=(7, 3.6))
    _differences(ax, window, "window", 1)
    _differences(ax, sparse, "sparse", 0)
    ax.axvline(0, color="#8a8a8a", linewidth=1)
    ax.set_yticks([-n for n in range(len(sparse))], [row["benchmark"] for row in sparse])
    ax.set(xlabel="difference to the dense twin, points (recorded)")
    ax.set_xscale("symlog", linthresh=5)
    ax.set_xticks([-100, -10, -2, 0, 2, 10], ["-100", "-10", "-2", "0", "2", "10"])
    ax.legend(loc="lower left")
    worst = min(window, key=lambda row: row["difference"])
    found = ";\n".join(
        f"{row['benchmark']} {row['dense']:.0%}, {100 * row['difference']:+.1f} ± {100 * row['half']:.1f}"
        + ("" if row["noise"] else ": outside")
        for row in sparse
    )
    return fig, (
        "Difference to the dense twin, mean and 95% interval of three seeds, recorded. The window loses up to "
        f"{-100 * worst['difference']:.0f} points ({worst['benchmark']}). The dense twin's share, and the sparse "
        f"one's difference in points:\n{found}."
    )


def _differences(ax: Axes, table: Sequence[Row], label: str, number: int) -> None:
    """One model's differences in points, with their intervals, one line each."""
    places = [0.15 - 0.3 * number - n for n in range(len(table))]
    gaps, halves = ([100 * row[key] for row in table] for key in ("difference", "half"))
    look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": "none"}
    ax.errorbar(gaps, places, xerr=halves, label=label, capsize=2, elinewidth=1, **look)


def draw_from_scratch(runs: Mapping[str, Row]) -> Drawn:
    """Recorded runs from random weights, by name: the share copied, then the share of needles, every ten steps."""
    fig, ax = plt.subplots(figsize=(6.8, 2.7))
    words = []
    for number, (name, row) in enumerate(runs.items()):
        look: dict[str, Any] = {"color": COLOURS[number], "linestyle": LINES["recorded"]}
        for start, task, marker in ((0, "copy", "o"), (row["copy_steps"], "recall", "^")):
            at = [start + 10 * n + 5 for n in range(len(row[task]))]
            label = f"{name}: {'needles' if task == 'recall' else task}"
            ax.plot(at, row[task], marker=marker, label=label, **look)
        recalled = f"then recalls {row['recall'][0]:.0%} to {row['recall'][-1]:.0%}"
        words.append(f"{name}: copies after {row['copy_steps']} steps, {recalled}")
    ax.set(xlabel="step", ylabel="right")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    return fig, f"From scratch, one seed, recorded. {'; '.join(words)}."


def draw_published(table: Sequence[Benchmark]) -> Drawn:
    """The report's shares: the difference in points as published, over a band of what chance alone can do."""
    fig, ax = plt.subplots(figsize=(6.8, 3.4))
    shares = [row for row in table if row.dense <= 100]
    for n, row in enumerate(shares):
        if (half := row.noise_margin()) is not None:
            ax.barh(-n, 2 * half, left=-half, height=0.7, color="#dddddd")
    ax.plot([row.difference for row in shares], [-n for n in range(len(shares))], "s", color=COLOURS[3])
    ax.axvline(0, color="#8a8a8a", linewidth=1)
    ax.set_yticks([-n for n in range(len(shares))], [row.name for row in shares])
    ax.set(xlabel="sparse minus dense, points (published)", xlim=(-20, 20))
    words = ";\n".join(
        f"{row.name} {row.difference:+.1f}"
        + (" (a rating, not drawn)" if row.dense > 100 else "")
        + ("" if row.noise_margin() is None else f" (chance ±{row.noise_margin():.1f})")
        for row in table
    )
    return fig, f"Published, V3.2-Exp minus V3.1-Terminus:\n{words}."
