"""One loop for every stage: a stage only says what is trained on what.

A run is a list of phases, each a number of steps of one objective. The loop owns everything else: learning rates,
gradient clipping, progress, the table of measures, saving and resuming. Most training scripts repeat these for every
stage, and the copies drift apart.

Two rules make a run repeatable. Step s of phase p draws its data from a generator seeded with (seed, p, s) alone, so
a run resumed after ``kill -9`` ends with the same weights, bit for bit, as one that was never stopped. And no weight
depends on a clock or on global random state. (Between machines the bits differ all the same.)
"""

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from dsa.distributed import fsdp
from dsa.training import checkpointing
from dsa.training import optimizers as optim

Row = dict[str, Any]
Objective = Callable[[nn.Module, torch.Generator], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Phase:
    """``steps`` steps (a cap, where ``done`` is given) of one objective.

    ``objective(model, generator)`` makes its data from the generator and returns (loss, measures). ``rates`` are the
    factors on the learning rates at the first and last step, a cosine between them; ``warmup`` steps lead up to
    the first. ``done(rows)``, asked after each step with this phase's rows, ends the phase early.
    """

    name: str
    steps: int
    objective: Objective
    rates: tuple[float, float] = (1.0, 1.0)
    warmup: int = 0
    done: Callable[[list[Row]], bool] | None = None

    def factor(self, step: int) -> float:
        """The factor on the learning rates at a step counted from 0."""
        if step < self.warmup:
            return self.rates[0] * (step + 1) / self.warmup
        first, last = self.rates
        share = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Run:
    """What a training leaves beside its weights: the table of measures and the seconds it took in all.

    ``processor_seconds`` leaves out the time in which other programs had the processor.
    """

    rows: list[Row]
    seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class _Position:
    """Where a run stands: the next step, and the seconds spent so far."""

    phase: int = 0
    step: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0


class _Clock:
    """Seconds spent, those before a resumption included; they never reach a weight or a row."""

    def __init__(self, at: _Position):
        self.wall, self.processor = perf_counter() - at.seconds, process_time() - at.processor_seconds

    def read(self) -> tuple[float, float]:
        return perf_counter() - self.wall, process_time() - self.processor


def generator(seed: int, phase: int, step: int) -> torch.Generator:
    """The only source of random numbers in one step."""
    return torch.Generator().manual_seed(((seed * 1009 + phase) * 1_000_003 + step) % 2**63)


def until(measure: str, least: float, over: int = 10) -> Callable[[list[Row]], bool]:
    """A stop rule: the mean of ``measure`` over the last ``over`` steps exceeds ``least``."""

    def done(rows: list[Row]) -> bool:
        return len(rows) >= over and sum(row[measure] for row in rows[-over:]) / over > least

    return done


def train(
    model: nn.Module,
    optimizers: list[Optimizer],
    phases: Sequence[Phase],
    *,
    seed: int = 0,
    work: Path | None = None,
    resume: bool = False,
    every: int = 50,
    clip: float = 1.0,
    after: Callable[[nn.Module], None] | None = None,
    label: str = "",
    show: bool = True,
) -> Run:
    """Train ``model`` through ``phases``.

    ``work`` is the folder for the saved state, written every ``every`` steps (None: nothing is saved); with
    ``resume`` the run goes on from there. ``after(model)`` is called after each step (router balance). ``label``
    names what the run depends on besides its phases, such as the corpus; a state saved under another label, seed
    or other phases is refused with ValueError. A loss that is no longer finite raises FloatingPointError.
    """
    identity = {"seed": seed, "label": label, "phases": [[phase.name, phase.steps] for phase in phases]}
    at, rows = _Position(), list[Row]()
    optim.remember_rates(optimizers)
    if resume and work is not None and checkpointing.exists(work):
        at, rows = _resume(work, model, optimizers, identity)
    clock = _Clock(at)

    def save_state(phase: int, step: int) -> None:
        if work is not None:
            position = asdict(_Position(phase, step, *clock.read()))
            checkpointing.save(work, model, optimizers, {"identity": identity, "position": position, "rows": rows})

    for number in range(at.phase, len(phases)):
        for step in _steps(phases[number], at.step if number == at.phase else 0, rows, show):
            rows.append(_step(model, optimizers, phases[number], step, generator(seed, number, step), clip))
            if after is not None:
                after(model)
            if (step + 1) % every == 0:
                save_state(number, step + 1)  # where to go on: this step is done
    save_state(len(phases), 0)  # past the last phase: resuming a finished run trains nothing
    return Run(rows, *clock.read())


def _steps(phase: Phase, first: int, rows: list[Row], show: bool) -> Iterator[int]:
    """The steps of a phase that are still to do, with a progress bar, until its stop rule says that it is done."""
    with tqdm(
        range(first, phase.steps), phase.name, phase.steps, initial=first, disable=not show or fsdp.rank() > 0
    ) as bar:
        for step in bar:
            if phase.done is not None and phase.done([row for row in rows if row["phase"] == phase.name]):
                return
            yield step
            bar.set_postfix({k: f"{v:.3f}" for k, v in rows[-1].items() if isinstance(v, float)}, refresh=False)


def _resume(
    work: Path, model: nn.Module, optimizers: list[Optimizer], identity: dict[str, Any]
) -> tuple[_Position, list[Row]]:
    saved = checkpointing.load(work, model, optimizers)
    if saved["identity"] != identity:
        raise ValueError(
            f"{work} holds another run ({saved['identity']}), not this one ({identity}); "
            "resume with the options it was started with, or remove the folder and start over"
        )
    return _Position(**saved["position"]), saved["rows"]


def _step(
    model: nn.Module,
    optimizers: list[Optimizer],
    phase: Phase,
    step: int,
    rng: torch.Generator,
    max_norm: float,
) -> Row:
    optim.set_rates(optimizers, phase.factor(step))
    loss, measures = phase.objective(model, rng)
    measures = fsdp.all_reduce_mean({"loss": loss.item(), **measures})  # equal on all ranks: they stop together
    if not math.isfinite(measures["loss"]):
        raise FloatingPointError(f"the loss is {measures['loss']} in step {step} of phase {phase.name}: lower the rate")
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optim.clip_gradients(optimizers, max_norm)
    for optimizer in optimizers:
        optimizer.step()
    return {"phase": phase.name, "step": step, **measures}


def write_table(rows: list[Row], path: Path) -> None:
    """Write rows as CSV, one column per measure that any row has, numbers with four decimals."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
