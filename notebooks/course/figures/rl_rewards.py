"""The pictures of chapter 11: how often models are right, while they are trained by reward and afterwards.

Each function returns a figure and the sentence that says what it shows, ready for `show`. Tables of right answers have
a row for each seed and a column for each domain; how they were picked from a record is to be seen in the notebook.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from course.figures.grpo_groups import block_means, curves_by_seed
from course.ui.style import COLOURS, MARKERS, provenance

Drawn = tuple[Figure, str]
Run = Mapping[str, Any]
COLUMNS = MappingProxyType(
    {
        "reward": "reward",
        "completions/mean_length": "own tokens",
        "frac_reward_zero_std": "groups without variance",
    }
)
"""Of a training run's table what is worth watching, and what it is called."""


def draw_decoding_modes(found: Mapping[str, Mapping[str, float]]) -> Drawn:
    """Bars of right answers by domain, for two ways of taking tokens by name."""
    fig, ax = plt.subplots(figsize=(6.6, 2.5))
    for i, (label, shares) in enumerate(found.items()):
        places = [n + 0.38 * (i - 0.5) for n in range(len(shares))]
        ax.bar(places, list(shares.values()), width=0.36, label=label, hatch=("", "//")[i])
    names = list(shares)
    ax.set_xticks(range(len(names)), names)
    ax.set(ylabel="right answers", ylim=(0, 1.05))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    each = "; ".join(f"{name} {' and '.join(f'{shares[name]:.0%}' for shares in found.values())}" for name in names)
    return fig, f"Right answers, {' and '.join(found)}: {each}."


def draw_run(rows: Sequence[Run], width: int = 5) -> Drawn:
    """A training run: reward, length and groups without variance by step, grey, and means of `width` steps."""
    fig, axes = plt.subplots(1, 3, figsize=(8, 2.4))
    words = []
    for ax, (column, label) in zip(axes, COLUMNS.items(), strict=True):
        each = [row[column] for row in rows]
        means = block_means(each, width)
        ax.plot(each, color="#b0b0b0", marker="")
        ax.plot([width * n + width // 2 for n in range(len(means))], means, color=COLOURS[0])
        ax.set(xlabel="step", title=label, ylim=(0, 1.3 * max(each)))
        words.append(f"{label} {means[0]:.2f} to {means[-1]:.2f}")
    return fig, f"Means of {width} steps, first to last: {'; '.join(words)}."


def draw_recipes(rows: Mapping[str, Tensor], domains: Sequence[str]) -> Drawn:
    """A table of right answers: a row for each model, tables (seeds, domains) by name; a column for each domain."""
    fig, ax = plt.subplots(figsize=(6.4, 4))
    means = [each.mean(0).tolist() for each in rows.values()]
    ax.imshow(means, vmin=0.2, vmax=1, aspect="auto")
    for y, line in enumerate(means):
        for x, value in enumerate(line):
            colour = "black" if value > 0.65 else "white"
            ax.text(x, y, f"{value:.2f}", fontsize=9, ha="center", va="center", color=colour)
    ax.set_xticks(range(len(domains)), domains)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.grid(False)
    words = "; ".join(f"{name} {each.mean():.2f}" for name, each in rows.items())
    return fig, f"Right answers, mean of domains and seeds, recorded: {words}."


def draw_sequential_stages(stages: Tensor, mixed: Tensor, domains: Sequence[str]) -> Drawn:
    """Right answers while one domain after another has its stage: (seeds, 1 + stages, domains), the base first.

    `mixed` (seeds, domains) is what one mixed stage reaches.
    """
    fig, axes = plt.subplots(1, len(domains), figsize=(9, 2.4), sharey=True)
    words = []
    for n, (ax, name) in enumerate(zip(axes, domains, strict=True)):
        for seed, line in enumerate(stages[:, :, n]):
            look = {"color": COLOURS[seed], "marker": MARKERS[seed]}
            ax.plot(line, markersize=4, **look, **provenance("recorded"))
        level = float(mixed[:, n].mean())
        ax.axvline(n + 1, color="#8a8a8a", linewidth=1)
        ax.axhline(level, color="black", linewidth=1.5, linestyle=":")
        ax.set(title=name, xlabel="stages done", ylim=(0, 1.05))
        first, last = stages[:, 0, n].mean(), stages[:, -1, n].mean()
        words.append(f"{name} {first:.2f}, {last:.2f}, mixed {level:.2f}")
    axes[0].set(ylabel="right answers")
    return fig, (
        f"Stages in a row, {len(stages)} seeds; grey: the domain's own stage; dotted: the mixed stage. Base, end of "
        f"the row and mixed: {'; '.join(words)}."
    )


def draw_domains(found: Mapping[str, Tensor], domains: Sequence[str]) -> Drawn:
    """Right answers of some models by domain, tables (seeds, domains) by name: means and deviations over seeds."""
    fig, ax = plt.subplots(figsize=(6.8, 2.6))
    for i, (label, each) in enumerate(found.items()):
        places = [n + 0.14 * (i - 1) for n in range(len(domains))]
        ax.errorbar(places, each.mean(0), each.std(0), fmt=MARKERS[i], capsize=3, label=label)
    ax.set_xticks(range(len(domains)), domains)
    ax.set(ylabel="right answers", ylim=(0, 1.05))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    words = "; ".join(f"{label} {', '.join(f'{x:.2f}' for x in each.mean(0))}" for label, each in found.items())
    return fig, f"Means over seeds with deviations, recorded: {words}."


def draw_learning(runs: Sequence[Run], curves: Mapping[str, str], width: int = 5) -> Drawn:
    """Recorded reward and length by step, means and deviations over seeds: `curves` names the run's curve by label."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 2.7))
    words = []
    for ax, measure, top in zip(axes, ("reward", "length"), (1, 8), strict=True):
        for i, (label, curve) in enumerate(curves.items()):
            found = curves_by_seed(runs, curve, measure, width)  # (seeds, steps / width)
            at = [width * n + width // 2 for n in range(found.shape[1])]
            look = {"color": COLOURS[i], "marker": MARKERS[i], **provenance("recorded")}
            ax.errorbar(at, found.mean(0), found.std(0), capsize=2, label=label, **look)
            if measure == "reward":
                words.append(f"{found.mean(0)[0]:.2f} to {found.mean(0)[-1]:.2f} ({label})")
        ax.set(xlabel="step", title=measure, ylim=(0, top))
    axes[0].legend(loc="lower right")
    return fig, f"Means of {width} steps over the seeds, with deviations. Reward from {', '.join(words)}."


def draw_rates(rewards: Mapping[str, Sequence[float]]) -> Drawn:
    """Reward by step, for runs by name."""
    fig, ax = plt.subplots(figsize=(6, 2.3))
    for label, curve in rewards.items():
        ax.plot(curve, label=label)
    ax.set(xlabel="step", ylabel="reward", ylim=(0, 1.05))
    ax.legend()
    words = "; ".join(f"{label} {curve[0]:.2f}, then {curve[-1]:.2f}" for label, curve in rewards.items())
    return fig, f"Reward by step: {words}."
