"""An experiment that is recorded: a model and a text go in, a table with its provenance comes out.

What an experiment varies is its own affair: a function from (model, corpus) to rows. Everything a record needs besides
is the same for all, and is here: the command line, the refusal to overwrite, and how to make the record anew.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from dsa.checkpoint.load import from_pretrained
from dsa.datasets import corpus as texts
from dsa.record import add_options, check_free, write
from dsa.training import run_folder

Rows = list[dict[str, Any]]


def record(
    program: str,
    description: str,
    rows: Callable[..., Rows],
    *,
    seeds: Sequence[int],
    steps: int,
    plan: dict[str, Any],
    designs: Sequence[str] = (),
    weights: str = "the frozen model is {}; the warmed-up variants are not kept",
    argv: Sequence[str] | None = None,
) -> None:
    """Run ``python -m PROGRAM FOLDER --out FILE``.

    ``rows(model, corpus, seeds=, steps=)`` measures; ``plan`` holds the settings that the record is to name besides;
    ``designs``, if there are any, may be narrowed down by ``--designs`` and reach ``rows`` under this name;
    ``weights`` says, around the folder's name, which models were made of which.
    The command refuses to overwrite FILE without ``--replace``.
    """
    parser = argparse.ArgumentParser(f"python -m {program}", description=description)
    parser.add_argument("folder", type=Path, help="the model folder to begin with")
    add_options(parser)
    parser.add_argument("--corpus", type=Path, metavar="PATH", help="a folder or file of UTF-8 text of your own")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--steps", type=int, default=steps)
    if designs:
        parser.add_argument("--designs", nargs="+", choices=designs, default=list(designs), metavar="NAME")

    def run(options: argparse.Namespace) -> Path:
        check_free(options)
        model, corpus, started = from_pretrained(options.folder), texts.load(options.corpus), perf_counter()
        asked = {"seeds": options.seeds, "steps": options.steps, **({"designs": options.designs} if designs else {})}
        runs = rows(model, corpus, **asked)
        found = run_folder.provenance(options.command, asked | plan, corpus, perf_counter() - started)
        found["weights"] = weights.format(options.folder)
        write(options.out, found | {"runs": runs})
        return options.out

    run_folder.command(run, parser, argv)
