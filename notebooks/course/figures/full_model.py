"""Around the attention: what experts are loaded with, where parameters lie, and what fits on which GPUs.

Everything about memory and speed of the real model is counted from its sizes (`analysis.serving_fit`) and drawn as
modelled. What has been measured on a GPU comes from a record with its provenance; while there is none, the figure says
so.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from course.ui.panel import Draw
from course.ui.style import COLOURS, provenance
from dsa.analysis.serving_fit import GPUS, RESERVE, Fit, fit
from dsa.model.config import Config
from dsa.model.moe import Gate

Drawn = tuple[Figure, str]
PRECISIONS = {"FP8, as published": "deployed", "bf16": "bf16"}
CONTEXTS = tuple(2**n for n in range(10, 18))  # 1K ... 128K
RECORD_COMMAND = "dsa bench full-width --out data/measurements/true_width.json"


def imbalance(load: Tensor) -> float:
    """How much more than its share the fullest expert has: load (E,) -> 1 when all have the same."""
    return float(load.max() / load.double().mean())


@torch.no_grad()
def balance_over_steps(gate: Gate, tokens: Tensor, steps: int, batch: int, speed: float) -> list[Tensor]:
    """Route `batch` of the tokens (n, D) a step and move the bias after each: -> the load (E,) of every step."""
    generator = torch.Generator().manual_seed(0)
    gate.train()
    loads = []
    for _ in range(steps):
        gate(tokens[torch.randint(len(tokens), (batch,), generator=generator)])
        loads.append(gate.load.clone())
        gate.balance(speed)
    return loads


def balance_new_router(
    config: Config, tokens: Tensor, speed: float, steps: int = 200, batch: int = 500
) -> list[Tensor]:
    """The loads (E,) of every step of a new router that is balanced at this speed; the same start for every speed."""
    gate = Gate(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) / config.hidden_size**0.5)
    return balance_over_steps(gate, tokens, steps, batch, speed)


def draw_balance(history: Mapping[float, Sequence[float]]) -> Drawn:
    """How full the fullest expert is, step by step, for each speed of the bias."""
    fig, ax = plt.subplots(figsize=(7, 2.9))
    for speed, line in history.items():
        ax.plot(line, label=f"{speed:g}", markevery=20, linewidth=1.2)
    ax.axhline(1, color="#444444", linewidth=0.8)
    ax.set(xlabel="step", ylabel="fullest expert / fair share", ylim=(0, 13))
    ax.legend(title="speed of the bias", ncols=4, loc="upper right")
    words = "; ".join(f"speed {speed:g}: {mean(line[-20:]):.1f}" for speed, line in history.items())
    return fig, f"Fullest expert against its share, last 20 steps. {words}."


def draw_loads(loads: Mapping[str, Tensor]) -> Drawn:
    """Sorted loads of all experts in fair shares (E,), by name."""
    fig, ax = plt.subplots(figsize=(7, 2.4))
    for name, load in loads.items():
        ax.plot(load, label=name, markersize=3)
    ax.set(xlabel="experts, by load", ylabel="load / fair share")
    ax.legend()
    words = "; ".join(f"{name} {float(load.min()):.1f} and {float(load.max()):.1f}" for name, load in loads.items())
    return fig, f"Least and largest load in fair shares: {words}."


def draw_parts(stored: Mapping[str, float], used: Mapping[str, float]) -> Drawn:
    """Parameters by part in billions: those stored, and those that work on one token."""
    fig, ax = plt.subplots(figsize=(7, 2.9))
    names = list(stored)[::-1]
    for shift, part, label in ((0.2, stored, "stored"), (-0.2, used, "used")):
        ax.barh([i + shift for i in range(len(names))], [part[n] for n in names], height=0.38, label=label)
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="billions of parameters")
    ax.legend(loc="lower right")
    words = ", ".join(f"{n} {stored[n]:.2f} ({used[n]:.2f})" for n in stored)
    return fig, f"Billions of parameters stored (used by one token): {words}."


def draw_split(numbers: Sequence[int], plans: Sequence[Fit]) -> Drawn:
    """Weights and cache on each of so many GPUs that share all heads; modelled."""
    fig, ax = plt.subplots(figsize=(6.4, 2.8))
    held = {name: [getattr(plan, name) / 1e9 for plan in plans] for name in ("weights", "cache")}
    for name, line in held.items():
        ax.plot(numbers, line, label=name, linestyle=provenance("modelled")["linestyle"])
    ax.axhline(141, color="#444444", linewidth=1)
    ax.text(1, 150, "an H200", va="bottom")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(numbers, [str(n) for n in numbers])
    ax.set(xlabel="GPUs", ylabel="GB on each", ylim=(10, 1000))
    ax.legend()
    words = ", ".join(f"{name} {line[0]:.0f} to {line[-1]:.0f} GB" for name, line in held.items())
    return fig, f"Modelled, on each GPU, from {numbers[0]} to {numbers[-1]} of them: {words}."


def draw_speedup(numbers: Sequence[int], times: Mapping[str, Sequence[float]]) -> Drawn:
    """Least seconds for a prompt, dense and sparse, on so many GPUs that share all heads; modelled."""
    fig, ax = plt.subplots(figsize=(6, 2.8))
    for kind, n in (("dense", 1), ("sparse", 0)):
        look: dict[str, Any] = {"color": COLOURS[n], "marker": "os"[n], **provenance("modelled")}
        ax.plot(numbers, times[kind], label=kind, **look)
    ax.set_xscale("log", base=2)
    ax.set_xticks(numbers, [str(n) for n in numbers])
    ax.set(xlabel="GPUs", ylabel="seconds, at least", ylim=(0, None))
    ax.legend()
    gains = (a / b for a, b in zip(times["dense"], times["sparse"], strict=True))
    words = "; ".join(f"{n}: {gain:.1f}" for n, gain in zip(numbers, gains, strict=True))
    return fig, f"Modelled, dense over sparse seconds for the prompt, by GPUs: {words}."


def run_generation(folder: str, prompt: str, processes: int) -> str:
    """What `dsa generate` writes on so many processes of this machine."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = ["-m", "dsa.generation.cli", folder, "--prompt", prompt, "--max-new-tokens", "16", "--device", "cpu"]
    start = [sys.executable, *(launch if processes > 1 else []), *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(start, capture_output=True, text=True, check=True, env=environment).stdout


def skewed_tokens(count: int, width: int, seed: int = 0, skew: float = 0.2) -> Tensor:
    """Tokens (count, width) that have something in common, as hidden states have: some experts like all of them."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=generator)
    return torch.randn(count, width, generator=generator) + skew * common


def draw_fit(config: Config) -> Draw:
    """Make a panel's callback: draw(gpu, ranks, context, batch, precision) -> (figure, sentence).

    `context` is in units of 1,024 tokens. Raises ValueError for what cannot be.
    """

    def draw(gpu: str, ranks: int, context: int, batch: int, precision: str) -> tuple[Figure, str]:
        if gpu not in GPUS or precision not in PRECISIONS:
            raise ValueError(f"{gpu!r} in {precision!r} is unknown: use {', '.join(GPUS)} and {', '.join(PRECISIONS)}")

        def plan(tokens: int, attention: str) -> Fit:
            return fit(config, GPUS[gpu], ranks, tokens, batch, PRECISIONS[precision], attention)

        tokens = 1024 * context
        sparse, dense = plan(tokens, "sparse"), plan(tokens, "dense")
        fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 2.9), width_ratios=[1.15, 1])
        _draw_memory(left, sparse)
        for attention, colour, marker in (("dense", COLOURS[1], "s"), ("sparse", COLOURS[0], "o")):
            rates = [1 / plan(n, attention).decode_seconds for n in CONTEXTS]
            look = {"color": colour, "marker": marker} | provenance("modelled")
            right.plot([n / 1024 for n in CONTEXTS], rates, label=attention, **look)
        right.axvline(context, color="#444444", linewidth=0.8)
        right.set_xscale("log", base=2)
        right.set_xticks([1, 8, 32, 128], ["1K", "8K", "32K", "128K"])
        right.set(xlabel="context", ylim=(0, None), title="at most, tokens/s a sequence")
        right.legend(loc="lower left")
        return fig, _sentence(f"{ranks} x {gpu}", context, sparse, dense)

    return draw


def _draw_memory(ax: Axes, plan: Fit) -> None:
    """One GPU's memory as a bar of three parts, and where it ends."""
    start = 0.0
    parts = (("weights", plan.weights), ("cache", plan.cache), ("reserve", RESERVE))
    for number, (name, size) in enumerate(parts):
        ax.barh([0], [size / 1e9], left=start, color=COLOURS[(0, 1, 5)[number]], height=0.5, label=name)
        start += size / 1e9
    ax.axvline(plan.memory / 1e9, ymax=0.6, color="black", linewidth=2, label="the GPU's memory")
    ax.set(yticks=[], ylim=(-0.5, 1.1), xlabel="GB on each GPU", title="fits" if plan.fits else "does not fit")
    ax.set_xlim(0, 1.08 * max(start, plan.memory / 1e9))
    ax.legend(loc="upper left", ncols=4, fontsize=8, columnspacing=1, handlelength=1.2)


def _sentence(machine: str, context: int, sparse: Fit, dense: Fit) -> str:
    weights, cache, reserve, memory = (x / 1e9 for x in (sparse.weights, sparse.cache, RESERVE, sparse.memory))
    most = sparse.largest_batch
    verdict = "it fits" if sparse.fits else "it does not fit"
    room = f"there is room for {most}" if most else "not one sequence has room"
    return (
        f"{machine}, {sparse.batch} x {context}K tokens: {weights:.0f} GB of weights, {cache:.1f} GB of cache and "
        f"{reserve:.0f} GB of reserve on each, of {memory:.0f}: {verdict}; {room}. By the roofline a sequence gets at "
        f"most {1 / sparse.decode_seconds:.0f} tokens/s (dense: {1 / dense.decode_seconds:.0f}), "
        f"and reading its prompt takes at least {sparse.prefill_seconds:.1f} s (dense: {dense.prefill_seconds:.1f} s)."
    )


def read_record(path: str | Path) -> dict | None:
    """The recorded GPU run, or None if nobody has made one yet."""
    path = Path(path)
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def draw_record(record: dict | None) -> tuple[Figure, str] | str:
    """The recorded run as (figure, words); without one a sentence that says how to make it."""
    if record is None:
        return f"No GPU run has been recorded yet. On a machine with one: {RECORD_COMMAND}"
    fig, axes = plt.subplots(1, 2, figsize=(8.6, 3))
    words = []
    for attention, colour, marker in (("dense", COLOURS[1], "s"), ("sparse", COLOURS[0], "o")):
        runs = [run for run in record["runs"] if run["attention"] == attention and "prefill_seconds" in run]
        lengths = [run["length"] / 1024 for run in runs]
        look = {"color": colour, "marker": marker, "label": attention} | provenance("recorded")
        axes[0].plot(lengths, [1e3 * run["prefill_seconds"] / run["length"] for run in runs], **look)
        axes[1].plot(lengths, [1e3 * run["decode_seconds_per_token"] for run in runs], **look)
        words.append(_of_longest(attention, runs))
    for ax, title in zip(axes, ("prefill: mean ms a token", "decode: ms a token"), strict=True):
        ax.set(xlabel="context in K tokens", title=title, ylim=(0, None))
    axes[0].legend()
    origin = f"{record['layers']} layers of true width on {record['machine']}, {record['date']}, {record['weights']}"
    return fig, f"Recorded: {origin}. {' '.join(words)}"


def _of_longest(attention: str, runs: Sequence[dict]) -> str:
    if not runs:
        return f"{attention}: nothing fitted."
    last = runs[-1]
    peak = f", {last['peak_bytes'] / 1e9:.0f} GB at the peak" if last["peak_bytes"] else ""
    return (
        f"{attention}, {last['length'] // 1024}K tokens: read in {last['prefill_seconds']:.1f} s, then "
        f"{1e3 * last['decode_seconds_per_token']:.1f} ms a token{peak}."
    )
