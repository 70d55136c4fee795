"""A record of something measured: a JSON file that says what was run, on what, in which versions and when.

A number without these is worth nothing a year later. And a record may stand for an hour of somebody's machine, so
nothing is written over without being asked, and a file is written whole or not at all.
"""

import argparse
import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dsa.io.files import write_json

# A record keeps the command it was made with. What each module's command is today, where that has changed since 0.1:
MOVED = MappingProxyType(
    {
        "dsa.cost.gpu": "dsa bench gpu",
        "dsa.cost.measure": "dsa bench cpu",
        "dsa.cost.tried": "python -m course.experiments.rejected_variants",
        "dsa.inference.true_width": "dsa bench full-width",
        "dsa.training.ablations": "python -m course.experiments.ablations",
        "dsa.training.activation": "python -m course.experiments.activation",
        "dsa.training.alternatives": "python -m course.experiments.variant_bench",
        "dsa.training.indexer": "dsa train indexer",
        "dsa.training.novice": "python -m course.experiments.rl_base_model",
        "dsa.training.post_training": "python -m course.experiments.post_training",
        "dsa.training.pretrain": "dsa train pretrain",
        "dsa.training.seeds": "python -m course.experiments.seed_study",
        "dsa.training.sweep": "python -m course.experiments.indexer_sweep",
        "dsa.training.twins": "python -m course.experiments.matched_runs",
    }
)


def as_of_today(command: str) -> str:
    """A recorded command as it is given now: `python -m dsa.cost.gpu --out a.json` is `dsa bench gpu --out a.json`."""
    module = re.match(r"python -m (\S+)", command)
    return command if not module else MOVED.get(module[1], module[0]) + command[module.end() :]


def add_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The options of every command that records: --out FILE, and --replace."""
    parser.add_argument("--out", type=Path, required=required, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--replace", action="store_true", help="replace FILE if it exists")


def check_free(options: argparse.Namespace) -> None:
    """Raise FileExistsError if the file to write exists and may not be replaced: before the work, not after it."""
    if options.out and options.out.exists() and not options.replace:
        raise FileExistsError(f"{options.out} exists: choose another --out, or --replace it")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, str]:
    """Parse a command that may record: its options, and the command line to be written down.

    A file that exists and may not be replaced ends the program with a sentence, before the work.
    """
    given = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(given)
    try:
        check_free(options)
    except FileExistsError as error:
        parser.error(str(error))
    return options, command(parser.prog, given)


def origin(command: str, machine: str, **versions: str | None) -> dict[str, Any]:
    """Where a record comes from: the command that makes it anew, machine, versions (Python, torch, more), date."""
    return {
        "command": command,
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
        "date": datetime.now(UTC).date().isoformat(),
    }


def processor() -> str:
    """The processor's name as the system gives it, and that one core of it was used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or platform.machine()}, one core"


def command(program: str, arguments: Sequence[str]) -> str:
    """The command line as it is to be written down."""
    return " ".join([program, *(word for word in arguments if word != "--replace")])


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a record, whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
