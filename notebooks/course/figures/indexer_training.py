"""The pictures of chapter 05: a teacher of several heads, who is served badly by it, how the divergence falls, a sweep.

Each function draws what it is given and returns the figure with the sentence that describes it, ready for `show`. The
film of the training, which is the chapter's panel, is in `warmup_film`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from course.experiments.indexer_sweep import AXES, along_axis
from course.ui.style import COLOURS, MARKERS, provenance

Drawn = tuple[Figure, str]
LABELS = ("heads J", "width W", "rotary width R", "rate", "first weights, x")  # of the sweep's axes


def draw_step(at: Tensor, out: Tensor) -> Drawn:
    """What comes out of a choice, for each score `at` of one key."""
    fig, ax = plt.subplots(figsize=(6.2, 2.4))
    ax.plot(at, out, marker="")
    ax.set(xlabel="score of key 3", ylabel="output")
    levels = sorted({float(x) for x in out})
    values = " and ".join(f"{x:g}" for x in levels)
    return fig, f"The output takes {len(levels)} values, {values}, and is flat on both sides of the jump."


def draw_teacher(heads: Tensor, p: Tensor) -> Drawn:
    """Each head's attention to the keys (H, S), and what they say together, p (S,)."""
    fig, axes = plt.subplots(1, len(heads) + 1, figsize=(6.6, 1.9), sharey=True)
    for n, (ax, row) in enumerate(zip(axes, [*heads, p], strict=True)):
        last = n == len(heads)
        ax.bar(range(len(p)), row.tolist(), color=COLOURS[2 if last else 0])
        ax.set(title="p" if last else f"head {n}", xlabel="key")
    axes[0].set(ylabel="share")
    liked = ", ".join(f"head {n} key {int(row.argmax())}" for n, row in enumerate(heads))
    shares = " and ".join(f"{p[key]:.0%}" for key in heads.argmax(-1).tolist())
    return fig, f"What is liked best: {liked}; in p these stand out, with {shares}."


def draw_unluckiest(rows: Mapping[str, Sequence[float]]) -> Drawn:
    """What the unluckiest head keeps of its attention in each layer, for each teacher by name."""
    fig, ax = plt.subplots(figsize=(6.6, 2.5))
    for i, (name, kept) in enumerate(rows.items()):
        ax.plot([n + 0.1 * (i - 2) for n in range(len(kept))], kept, MARKERS[i], markersize=7, label=name)
    layers = range(len(kept))
    ax.set_xticks(layers, [f"layer {n}" for n in layers])
    ax.set(ylabel="unluckiest head keeps", ylim=(0, 1.05), xlim=(-0.5, len(layers) - 0.5))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", title="teacher")
    words = "; ".join(f"{name} {', '.join(f'{x:.0%}' for x in kept)}" for name, kept in rows.items())
    return fig, f"What the unluckiest head keeps in layers 0 to {layers[-1]}: {words}."


def draw_fall(rows: Sequence[Mapping[str, float]], layers: int) -> Drawn:
    """Each layer's divergence by step, from the table of a warm-up."""
    fig, ax = plt.subplots(figsize=(6.8, 2.7))
    words = []
    for n in range(layers):
        curve = [row[f"kl {n}"] for row in rows]
        ax.plot(curve, label=f"layer {n}", markevery=10)
        words.append(f"layer {n}: {curve[0]:.1f} to {curve[-1]:.2f}")
    ax.set(xlabel="step", ylabel="KL, nats", yscale="log")
    ax.legend()
    return fig, f"Divergence from attention over {len(rows)} steps, measured. {'; '.join(words)}."


def draw_axes(runs: Sequence[dict[str, Any]], measure: str = "kl") -> Drawn:
    """The recorded sweep: a measure along each axis, one line for each seed."""
    fig, axes = plt.subplots(1, len(AXES), figsize=(9, 2.5), sharey=True)
    words = []
    for ax, axis, label in zip(axes, AXES, LABELS, strict=True):
        found = along_axis(runs, axis, measure)
        for seed, line in enumerate(zip(*found.values(), strict=True)):
            look: dict[str, Any] = {"color": COLOURS[seed], "marker": MARKERS[seed], "label": f"seed {seed}"}
            ax.plot(range(len(line)), line, **look, **provenance("recorded"))
        ax.set_xticks(range(len(found)), [f"{x:g}" for x in found])
        ax.set(xlabel=label, yscale="log")
        words.append(f"{label} " + ", ".join(f"{x:g}: {sum(y) / len(y):.2f}" for x, y in found.items()))
    axes[0].set(ylabel=f"{measure.upper()}, recorded")
    axes[0].legend(fontsize=8)
    return fig, f"Mean {measure.upper()} of the seeds after training, recorded. {'; '.join(words)}."
