"""What our kernels reach on a real GPU, beside their goals: the record of `dsa bench gpu` as a picture.

Units differ (operations, bandwidth, time, a ratio), so each bar is the share of its goal that was reached; the least
that counts is a mark on it, and words carry the figures. What failed says so: it has no bar, and a line in the words.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from course.ui.style import COLOURS

COMMAND = "dsa bench gpu --out data/measurements/gpu_kernels.json"
NONE = f"No kernel has been timed on a GPU yet. On a machine with one: {COMMAND}"
SIGNS = {"TFLOP/s": "TFLOP/s", "of bandwidth": "of the bandwidth", "ms": "ms", "times": "times as quick as dense"}


def share(trial: Mapping[str, Any], figure: float) -> float:
    """Which share of the goal a figure is: over 1 is better than the goal, in milliseconds too."""
    return trial["goal"] / figure if trial["unit"] == "ms" else figure / trial["goal"]


def draw_goals(record: Mapping[str, Any] | None) -> tuple[Figure, str] | str:
    """A bar for each goal, with words; without a record the sentence that says how to make one."""
    if record is None:
        return NONE
    trials = {name: trial for name, trial in record["trials"].items() if "unit" in trial}
    fig, ax = plt.subplots(figsize=(7.4, 0.36 * len(trials) + 0.9))
    for place, trial in enumerate(trials.values()):
        if trial["figure"] is not None:
            reached = share(trial, trial["figure"])
            enough = trial["verdict"] in ("goal", "least")
            ax.barh(place, reached, 0.6, color=COLOURS[0 if enough else 1], hatch=None if enough else "//")
        ax.plot([share(trial, trial["least"])] * 2, [place - 0.35, place + 0.35], color="black", linewidth=1.5)
    ax.axvline(1, color="black", linestyle="--", linewidth=1)
    ax.set_yticks(range(len(trials)), list(trials))
    ax.invert_yaxis()
    ax.set(
        xlabel="share of the goal (dashed); short line: the least that counts; hatched: less than that", xlim=(0, None)
    )
    lines = [_in_words(name, trial) for name, trial in trials.items()]
    failed = [f"{name}: {why}" for name, why in failures(record).items()]
    versions = record["versions"]
    origin = (
        f"Recorded on {record['machine']}, {record['date']}, torch {versions['torch']}, Triton {versions['triton']}"
    )
    return fig, "\n".join([f"{origin}.", *lines, *failed])


def _in_words(name: str, trial: Mapping[str, Any]) -> str:
    marks = f"goal {trial['goal']:g}, least {trial['least']:g}"
    if trial["figure"] is None:
        return f"{name}: {trial['verdict']} ({marks})."
    rivals = [
        f"{rival} {row['tflops']:.0f}" if trial["unit"] in ("TFLOP/s", "times") else f"{rival} {_mean(row):.2f} ms"
        for rival, row in list(trial["contenders"].items())[1:]
        if "milliseconds" in row
    ]
    beside = f"; beside it {', '.join(rivals)}{' TFLOP/s' * (trial['unit'] in ('TFLOP/s', 'times'))}" if rivals else ""
    ours = next(iter(trial["contenders"].values()))
    noise = abs(ours["milliseconds"][0] / ours["milliseconds"][1] - 1)
    said = f"{trial['figure']:.3g} {SIGNS[trial['unit']]}"
    return f"{name}: {said} ({marks}: {trial['verdict']}), the same again {noise:.1%} apart{beside}."


def _mean(row: Mapping[str, Any]) -> float:
    return sum(row["milliseconds"]) / 2


def failures(record: Mapping[str, Any]) -> dict[str, str]:
    """What did not run, or was wrong: name -> why."""
    found = {}
    for name, trial in record["trials"].items():
        if "failed" in trial:
            found[name] = trial["failed"]
        for contender, row in trial["contenders"].items():
            if "failed" in row:
                found[f"{name}, {contender}"] = row["failed"]
    return found


def tiles(record: Mapping[str, Any]) -> str:
    """A Markdown table of the tile sizes that were tried, the quickest of each kernel and trial first."""
    lines = ["| measured | kernel | tile | ms |", "|---|---|---|---|"]
    for name, trial in record["trials"].items():
        for kernel, tried in trial.get("tiles", {}).items():
            for tile, ms in sorted(tried.items(), key=lambda item: (item[1] is None, item[1])):
                lines.append(f"| {name} | `{kernel}` | {tile} | {'does not fit' if ms is None else f'{ms:.3f}'} |")
    return "\n".join(lines)
