"""Run cases and keep what they find, each result as soon as it is there.

A GPU's time is short, and much can go wrong on a machine that nobody has tried a kernel on: it may not compile, give
wrong numbers, hang, or break the process's connection to the device. So each case runs in a process of its own with a
limit on its time; a candidate that fails is written down with its message and the next one is tried; one that is wrong
is not timed; and the record is written anew, in one step, after every result.
"""

import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dsa import record
from dsa.bench.gpu.benchmark_case import BenchmarkCase, Candidate, fastest, judge, milliseconds
from dsa.bench.gpu.correctness import poisoned
from dsa.bench.gpu.inputs import Inputs
from dsa.bench.timing import Call, Timer, cuda_graphs
from dsa.kernels.triton.index_logits import INDEX_LOGITS
from dsa.kernels.triton.sparse_attention import SPARSE_ATTENTION
from dsa.kernels.triton.sparse_backward import LATENT_GRADIENT, QUERY_GRADIENT
from dsa.kernels.triton.top_k import TOP_K

TUNED = (INDEX_LOGITS, TOP_K, SPARSE_ATTENTION, QUERY_GRADIENT, LATENT_GRADIENT)
LIMIT = 240  # seconds for a case, compiling included
Save = Callable[[dict[str, Any]], None]


def measure(candidate: Candidate, sets: int, timer: Timer) -> dict[str, Any]:
    """Check an answer, then time it; a row of the record."""
    candidate.call(0)  # compiles and chooses tiles
    with poisoned():
        answer = candidate.call(0)
    row: dict[str, Any] = {"error": candidate.error(answer)}
    del answer
    if not row["error"] <= candidate.tolerance:  # NaN is not
        return {"failed": f"wrong by {row['error']:.2g}, where {candidate.tolerance:g} is allowed"}
    calls: list[Call] = [lambda n=n: candidate.call(n) for n in range(sets)]  # type: ignore[misc]
    if candidate.cuda_graph:
        try:
            calls, row["graph"] = cuda_graphs(calls), True
        except (RuntimeError, AssertionError):  # something in it cannot be captured: then Python is timed too
            row["graph"] = False
    row["milliseconds"] = timer(calls)
    row["counted"] = candidate.counted
    seconds = milliseconds({**row, "counted": 1}) / 1e3
    row["tflops"] = candidate.flop / seconds / 1e12
    row["gigabytes_per_second"] = candidate.bytes / seconds / 1e9
    return row


def tuned_tiles(before: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """What the tuner timed since `before`: kernel -> tile sizes -> milliseconds, None where they do not fit."""
    return {
        kernel.name: {tile: ms if math.isfinite(ms) else None for tile, ms in kernel.timings.items()}
        for kernel in TUNED
        if kernel.timings != before[kernel.name]
    }


def run_case(case: BenchmarkCase, make: Inputs, timer: Timer, save: Save) -> dict[str, Any]:
    """Measure all candidates of a case, whatever becomes of one of them."""
    found: dict[str, Any] = {"candidates": {}}
    before = {kernel.name: kernel.timings for kernel in TUNED}
    sets = min(case.sets, make.sets)
    try:
        candidates = case.build(replace(make, sets=sets))
    except Exception as error:  # whatever it is, it belongs into the record
        candidates, found["failed"] = {}, _one_line(error)
    for name, candidate in candidates.items():
        try:
            found["candidates"][name] = measure(candidate, sets, timer)
        except Exception as error:
            found["candidates"][name] = {"failed": _one_line(error)}
        found["tiles"] = tuned_tiles(before)
        if case.target:
            found |= judge(case.target, found["candidates"])
        save(found)
    if case.phase:
        found["rows"] = seconds_a_token(case, found["candidates"])
    save(found)
    return found


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def seconds_a_token(case: BenchmarkCase, rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fastest of each kind of attention, as a record of a layer has it."""
    return [
        {"phase": case.phase, "attention": kind, "keys": case.keys,
         "seconds": float(f"{milliseconds(row) / 1e3 / case.tokens:.4g}")}
        for kind in ("dense", "sparse")
        if (row := fastest(rows, kind))
    ]  # fmt: skip


def run_group(
    cases: Iterable[BenchmarkCase], make: Inputs, timer: Timer, save: Callable[[str, dict[str, Any]], None]
) -> None:
    """Run a case's cases one after the other, each in memory that the last one left."""
    for case in cases:
        found = run_case(case, make, timer, lambda found, case=case: save(case.name, found))  # type: ignore[misc]
        print(format_case(case.name, found), flush=True)
        gc.collect()
        if make.device.type == "cuda":
            torch.cuda.empty_cache()


def format_case(name: str, found: Mapping[str, Any]) -> str:
    """A line for the case and one for each candidate."""
    mark = ""
    if found.get("figure") is not None:
        mark = f": {found['figure']:.3g} {found['unit']}, target {found['target']:g}, minimum {found['minimum']:g}: "
        mark += found["verdict"]
    lines = [f"{name}{mark}{found.get('failed', '')}"]
    for candidate, row in found["candidates"].items():
        if "failed" in row:
            lines.append(f"    {candidate:36} {row['failed']}")
        else:
            a, b = row["milliseconds"]
            lines.append(f"    {candidate:36} {a:9.3f} {b:9.3f} ms {row['tflops']:6.0f} TFLOP/s "
                         f"{row['gigabytes_per_second']:6.0f} GB/s  error {row['error']:.1e}")  # fmt: skip
    return "\n".join(lines)


class Record:
    """The JSON file: read when it is there, written anew after every result."""

    def __init__(self, path: Path, about: Mapping[str, Any]):
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        self.content = {**about, "rows": [], "cases": self.content.get("cases", {})}

    def keep(self, name: str, found: Mapping[str, Any]) -> None:
        """Put a case's findings in place of earlier ones and write the file, whole or not at all."""
        self.content["cases"][name] = dict(found)
        self.content["rows"] = [row for case in self.content["cases"].values() for row in case.get("rows", [])]
        record.write(self.path, self.content)


def run_isolated(names: Sequence[str], command: Callable[[str], list[str]], limit: float = LIMIT) -> dict[str, str]:
    """Run each case in a process of its own: the names of those that did not end well, and how they ended."""
    broken = {}
    for name in (bar := tqdm(names, unit="case", disable=not sys.stderr.isatty())):
        bar.set_description(name)
        try:
            code = subprocess.run(command(name), timeout=limit).returncode
        except subprocess.TimeoutExpired:
            broken[name] = f"stopped after {limit:g} seconds"
        else:
            if code:
                broken[name] = f"its process ended with {code}"
    return broken
