"""What our kernels reach on a real GPU, beside their targets: the record of `dsa bench gpu` as a picture.

Units differ (operations, bandwidth, time, a ratio), so each bar is the share of its target that was reached; the
minimum that counts is a mark on it, and words carry the figures. What failed says so: it has no bar, and a line in the
words.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from course.ui.style import COLOURS

COMMAND = "dsa bench gpu --out data/measurements/gpu_kernels.json"
NONE = f"No kernel has been timed on a GPU yet. On a machine with one: {COMMAND}"
SIGNS = {"TFLOP/s": "TFLOP/s", "of bandwidth": "of the bandwidth", "ms": "ms", "times": "times as quick as dense"}


def share(case: Mapping[str, Any], figure: float) -> float:
    """Which share of the target a figure is: over 1 is better than the target, in milliseconds too."""
    return case["target"] / figure if case["unit"] == "ms" else figure / case["target"]


def draw_targets(record: Mapping[str, Any] | None) -> tuple[Figure, str] | str:
    """A bar for each target, with words; without a record the sentence that says how to make one."""
    if record is None:
        return NONE
    cases = {name: case for name, case in record["cases"].items() if "unit" in case}
    fig, ax = plt.subplots(figsize=(7.4, 0.36 * len(cases) + 0.9))
    for place, case in enumerate(cases.values()):
        if case["figure"] is not None:
            reached = share(case, case["figure"])
            enough = case["verdict"] in ("target", "minimum")
            ax.barh(place, reached, 0.6, color=COLOURS[0 if enough else 1], hatch=None if enough else "//")
        ax.plot([share(case, case["minimum"])] * 2, [place - 0.35, place + 0.35], color="black", linewidth=1.5)
    ax.axvline(1, color="black", linestyle="--", linewidth=1)
    ax.set_yticks(range(len(cases)), list(cases))
    ax.invert_yaxis()
    ax.set(
        xlabel="share of the target (dashed); short line: the minimum that counts; hatched: less than that",
        xlim=(0, None),
    )
    lines = [_in_words(name, case) for name, case in cases.items()]
    failed = [f"{name}: {why}" for name, why in failures(record).items()]
    versions = record["versions"]
    origin = (
        f"Recorded on {record['machine']}, {record['date']}, torch {versions['torch']}, Triton {versions['triton']}"
    )
    return fig, "\n".join([f"{origin}.", *lines, *failed])


def _in_words(name: str, case: Mapping[str, Any]) -> str:
    marks = f"target {case['target']:g}, minimum {case['minimum']:g}"
    if case["figure"] is None:
        return f"{name}: {case['verdict']} ({marks})."
    rivals = [
        f"{rival} {row['tflops']:.0f}" if case["unit"] in ("TFLOP/s", "times") else f"{rival} {_mean(row):.2f} ms"
        for rival, row in list(case["candidates"].items())[1:]
        if "milliseconds" in row
    ]
    beside = f"; beside it {', '.join(rivals)}{' TFLOP/s' * (case['unit'] in ('TFLOP/s', 'times'))}" if rivals else ""
    ours = next(iter(case["candidates"].values()))
    noise = abs(ours["milliseconds"][0] / ours["milliseconds"][1] - 1)
    said = f"{case['figure']:.3g} {SIGNS[case['unit']]}"
    return f"{name}: {said} ({marks}: {case['verdict']}), the same again {noise:.1%} apart{beside}."


def _mean(row: Mapping[str, Any]) -> float:
    return sum(row["milliseconds"]) / 2


def failures(record: Mapping[str, Any]) -> dict[str, str]:
    """What did not run, or was wrong: name -> why."""
    found = {}
    for name, case in record["cases"].items():
        if "failed" in case:
            found[name] = case["failed"]
        for candidate, row in case["candidates"].items():
            if "failed" in row:
                found[f"{name}, {candidate}"] = row["failed"]
    return found


def tiles(record: Mapping[str, Any]) -> str:
    """A Markdown table of the tile sizes that were tried, the quickest of each kernel and case first."""
    lines = ["| measured | kernel | tile | ms |", "|---|---|---|---|"]
    for name, case in record["cases"].items():
        for kernel, tried in case.get("tiles", {}).items():
            for tile, ms in sorted(tried.items(), key=lambda item: (item[1] is None, item[1])):
                lines.append(f"| {name} | `{kernel}` | {tile} | {'does not fit' if ms is None else f'{ms:.3f}'} |")
    return "\n".join(lines)
