"""From a command to a finished model folder, with nothing half-done in between.

While a stage runs it works in ``OUT.partial`` (its saved state, see `checkpointing`); only when model,
provenance and table are all written is the folder moved to ``OUT`` in one step. Whoever looks finds a whole folder or
none. Provenance holds what is needed to make the folder anew and what was measured on the weights *as stored*, that is
after rounding to bf16: a number that belongs to other weights would be no claim about the file.
"""

import argparse
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dsa.checkpoint.load import from_pretrained
from dsa.checkpoint.save import save_pretrained
from dsa.datasets.corpus import Corpus
from dsa.distributed import fsdp
from dsa.io.command_line import errors_in_a_sentence
from dsa.io.files import write_json
from dsa.model.transformer import Transformer
from dsa.record import origin
from dsa.training import checkpointing
from dsa.training.evaluate import Claim, measure
from dsa.training.optimizers import OPTIMIZERS
from dsa.training.trainer import Run, write_table


class Described(Protocol):
    """What a model learned from: a corpus, or tasks that are generated."""

    def describe(self) -> dict[str, object]:
        """What provenance records of it."""


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what every stage's command understands."""
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the model folder to make")
    parser.add_argument("--corpus", type=Path, metavar="PATH", help="a folder or file of UTF-8 text of your own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="muon", help="adamw on several processes")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--replace", action="store_true", help="replace OUT if it exists, once the new one is whole")
    return parser


def command(run: Callable[[argparse.Namespace], Path], parser: argparse.ArgumentParser, argv: Sequence[str] | None):
    """Parse, run on one thread (so that the same seed gives the same bits), and turn errors into sentences."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    lasting = [word for word in given if word not in ("--resume", "--replace")]
    torch.set_num_threads(1)  # the order of a sum, and so its last bits, depends on how many there are
    with errors_in_a_sentence():
        try:
            with fsdp.processes(), redirect_stdout(sys.stdout if fsdp.rank() == 0 else None):
                arguments.command = f"{fsdp.launch_command(parser.prog)} {shlex.join(lasting)}"  # makes the folder anew
                print(f"made {run(arguments)}")
        except KeyboardInterrupt:
            saved = checkpointing.exists(work_folder(arguments.out))
            remedy = "add --resume to go on from the last saved step" if saved else "nothing was saved yet, start again"
            sys.exit(f"\nstopped: {remedy}")


def work_folder(out: Path) -> Path:
    """Where a run that will become ``out`` keeps its state."""
    return out.with_name(out.name + ".partial")


def prepare(out: Path, *, resume: bool, replace: bool) -> Path:
    """The work folder for ``out``; refuses to overwrite a folder or forget a stopped run without being told to.

    Raises FileExistsError, or FileNotFoundError when there is nothing to resume.
    """
    work = work_folder(out)
    if out.exists() and not replace:
        raise FileExistsError(f"{out} exists: choose another --out, or --replace it once the new one is whole")
    if resume and not checkpointing.exists(work):
        raise FileNotFoundError(f"{work} holds no stopped run to resume: leave --resume out to start one")
    if not resume and checkpointing.exists(work):
        if not replace:
            raise FileExistsError(f"{work} holds a stopped run: --resume it, or --replace it to start over")
        fsdp.barrier()  # all ranks have looked
        if fsdp.rank() == 0:
            shutil.rmtree(work)
    fsdp.barrier()
    work.mkdir(parents=True, exist_ok=True)
    return work


def finish(
    model: Transformer,
    out: Path,
    run: Run,
    *,
    made_by: str,
    options: dict[str, Any],
    corpus: Described,
    claims: Sequence[Claim] = (),
    eval_settings: dict[str, Any] | None = None,
    extra: Callable[[Path, Transformer], dict[str, Any]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write the model, measure it as written, record provenance, and move all of it to ``out``; on rank 0.

    ``eval_settings`` are the keyword arguments of :func:`dsa.training.evaluate.measure`; None: the course's claims are
    not this model's. ``extra(folder, model)`` may add files beside the model as written, and entries to provenance.
    """
    if fsdp.rank() > 0:
        return out
    whole = work_folder(out) / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    save_pretrained(model, whole, dtype=dtype)
    stored = from_pretrained(whole)  # what is measured is what was written, rounded
    measures = {}
    if eval_settings is not None and isinstance(corpus, Corpus):
        measures = measure(stored, corpus, **eval_settings)
    checked = [claim.check(measures) for claim in claims]
    record = provenance(made_by, options, corpus, run.seconds, dtype)
    record |= {"training_processor_seconds": round(run.processor_seconds, 1), "claims": checked, "measures": measures}
    record |= {} if extra is None else extra(whole, stored)
    write_json(whole / "provenance.json", record)
    write_table(run.rows, whole / "training.csv")
    for claim in checked:
        print(f"{'ok  ' if claim['holds'] else 'FAIL'} {claim['claim']}: {claim['value']}")
    move_into_place(whole, out)
    shutil.rmtree(work_folder(out))
    return out


def provenance(
    made_by: str, options: dict[str, Any], corpus: Described, seconds: float, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """What it takes to make the folder anew, and where and when it was made."""
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32") + " (norms and router biases fp32)"
    return {
        **origin(made_by, f"{platform.system()} {platform.machine()}, processor only, 1 thread", numpy=np.__version__),
        "options": options,
        "corpus": corpus.describe(),
        "training_seconds": round(seconds, 1),
        "weights": f"stored in {kind}; every number below was measured on them as stored",
    }


def move_into_place(whole: Path, out: Path) -> None:
    """Put a finished folder in place of ``out``, which is only set aside until the new one stands there."""
    aside = out.with_name(out.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        out.rename(aside)
    whole.replace(out)
    shutil.rmtree(aside, ignore_errors=True)
