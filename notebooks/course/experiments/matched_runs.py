"""Matched runs: one warmed-up model trained on in several ways, by equal steps on equal batches.

"The sparse model is as good" means nothing by itself: more steps change any model, the dense one too. So each way of
the second stage is matched by runs that differ in nothing but what attention may see: the same weights to start from,
the same batches in the same order, the same optimisers and rates. Three ways frame the sparse one: ``dense`` (all
keys), ``window`` (as many keys, the latest ones), and the sparse one with two, where there is something to adapt to.

    python -m course.experiments.matched_runs --work runs/seeds --out data/measurements/sparse_training.json

trains them for the seeds of `seed_study` (whose base and warmed-up models it takes, or makes), then measures them all:
a sweep over K, the text, and the benchmarks of `benchmark_suite`. It is a short training, the one that the chapter does
live; with ``--length 512 --batch 8 --steps 100`` it is that of the shipped model.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from course.experiments import benchmark_suite, seed_study
from dsa.checkpoint.load import from_pretrained
from dsa.checkpoint.save import save_pretrained
from dsa.datasets import corpus as texts
from dsa.datasets.corpus import Corpus
from dsa.datasets.recall_tasks import Task
from dsa.model.transformer import Transformer
from dsa.record import add_options, check_free, write
from dsa.training import evaluate, run_folder
from dsa.training.indexer import SPARSE_RATE, TOP_K, train_sparse
from dsa.training.optimizers import main_optimizers
from dsa.training.pretrain import MixedNeedles, balance, lm_objective
from dsa.training.trainer import Phase, Run, train

STEPS, SIZE, LENGTH = 60, 4, 256
TRAINED_WITH = {  # name -> attention and K while it is trained
    "sparse": ("sparse", TOP_K),
    "dense": ("dense", TOP_K),
    "window": ("window", TOP_K),
    "sparse 2": ("sparse", 2),
}
SWEPT_TOP_K = (1, 2, 4, 16)
SWEPT_ATTENTION = {  # name -> the kinds of attention it is measured with
    "warmed": ("sparse", "oracle", "window", "random"),
    "sparse": ("sparse", "oracle", "window", "random"),
    "dense": ("sparse",),
    "window": ("window",),
    "sparse 2": ("sparse",),
}
SWEEP_LENGTH, SWEEP_SEQUENCES, TEXT_SEQUENCES = 256, 16, 64
Row = dict[str, Any]


def continue_training(
    model: Transformer,
    task: Task,
    attention: str,
    top_k: int = TOP_K,
    *,
    steps: int = STEPS,
    size: int = SIZE,
    seed: int = 0,
    show: bool = False,
) -> Run:
    """Train a model on, in place, under one kind of attention over ``top_k`` keys, as the sparse stage does.

    "sparse" *is* the sparse stage, both losses; any other kind learns from the language loss alone, and its indexers
    stay as they are.
    """
    model.top_k = top_k
    if attention == "sparse":
        return train_sparse(model, task, steps=steps, size=size, seed=seed, show=show)
    model.attention = attention
    model.train()
    plan = [Phase(attention, steps, lm_objective(task, size), rates=(1.0, 0.1), warmup=min(10, steps // 4))]
    run = train(model, main_optimizers("muon", model, SPARSE_RATE), plan, seed=seed, after=balance, show=show)
    model.eval()
    return run


@dataclass(frozen=True)
class Plan:
    """How long the runs are trained: their number of steps, the sequences in each, and their length."""

    steps: int = STEPS
    size: int = SIZE
    length: int = LENGTH

    def folder(self, work: Path, seed: int, name: str) -> Path:
        """The folder of one model; the warmed-up one is that of `seed_study`."""
        own = work / str(seed)
        return (
            own / name
            if name == "warmed"
            else own / f"matched runs of {self.steps} x {self.size} x {self.length}" / name
        )


def make(work: Path, seed: int, corpus: Corpus, plan: Plan) -> None:
    """Train what is missing of one seed."""
    seed_study.make(work, seed)
    for name, (attention, top_k) in TRAINED_WITH.items():
        folder = plan.folder(work, seed, name)
        if not folder.exists():
            model = from_pretrained(plan.folder(work, seed, "warmed"))
            task = MixedNeedles(corpus, plan.length)
            continue_training(model, task, attention, top_k, steps=plan.steps, size=plan.size, seed=seed)
            model.attention = "sparse"  # what a folder can say; the sweep chooses for itself
            whole = run_folder.work_folder(folder)
            save_pretrained(model, whole, dtype=torch.bfloat16)
            run_folder.move_into_place(whole, folder)
            print(f"made {folder}", flush=True)


def sweep(
    model: Transformer, corpus: Corpus, choosers: Sequence[str], swept: Sequence[int] = SWEPT_TOP_K
) -> Iterator[Row]:
    """Bits per byte and recall of one model for every chooser and K, and with all keys."""
    eval_set = list(evaluate.needle_batches(corpus, SWEEP_LENGTH, SWEEP_SEQUENCES))
    for attention, top_k in [("dense", SWEEP_LENGTH), *((who, k) for who in choosers for k in swept)]:
        with evaluate.set_to(model, attention, top_k):
            bits = evaluate.text_bits(model, corpus, SWEEP_LENGTH, SWEEP_SEQUENCES)
        right = evaluate.recall(model, eval_set, attention, top_k)
        measures = {"bits": bits, "recall": right["all"], "recall_far": right["far"]}
        yield {"attention": attention, "top_k": top_k} | {name: round(x, 4) for name, x in measures.items()}


def evaluate_runs(models: dict[str, Transformer], corpus: Corpus, length: int) -> dict[str, list[Row]]:
    """All models of one seed: the rows of the sweep, of the text at the length they were trained at, of the suite."""
    swept = [
        {"model": name, **row} for name, model in models.items() for row in sweep(model, corpus, SWEPT_ATTENTION[name])
    ]
    eval_sets, correct, text = benchmark_suite.eval_sets(corpus), {}, []
    for name in ("dense", "sparse", "window"):
        attention, top_k = TRAINED_WITH[name]
        correct[name] = benchmark_suite.evaluate_suite(models[name], eval_sets, attention, top_k)
        with evaluate.set_to(models[name], attention, top_k):
            bits = evaluate.text_bits(models[name], corpus, length, TEXT_SEQUENCES)
        text.append({"model": name, "bits": round(bits, 4)})
    suite_rows = [
        {"model": name, **row}
        for name, right in correct.items()
        for row in benchmark_suite.rows(right, correct["dense"])
    ]
    return {"sweep": swept, "text": text, "suite": suite_rows}


def run(options: argparse.Namespace) -> Path:
    """Make the record that the command line asks for."""
    check_free(options)
    corpus, started, plan = texts.load(), perf_counter(), Plan(options.steps, options.batch, options.length)
    found: dict[str, list[Row]] = {"sweep": [], "text": [], "suite": []}
    for seed in options.seeds:
        make(options.work, seed, corpus, plan)
    for seed in options.seeds:
        models = {name: from_pretrained(plan.folder(options.work, seed, name)) for name in SWEPT_ATTENTION}
        for table, rows in evaluate_runs(models, corpus, plan.length).items():
            found[table] += [{"seed": seed, **row} for row in rows]
        print(f"measured seed {seed}", flush=True)
    said = {"seeds": options.seeds, **asdict(plan), "rate": SPARSE_RATE}
    record = run_folder.provenance(options.command, said, corpus, perf_counter() - started)
    del record["training_seconds"]  # of this session alone: models that were there are taken as they are
    write(options.out, record | found)
    return options.out


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``python -m course.experiments.matched_runs``."""
    parser = argparse.ArgumentParser(
        "python -m course.experiments.matched_runs", description="Train matched runs and measure them."
    )
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="where the models are and go")
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seed_study.SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=SIZE)
    parser.add_argument("--length", type=int, default=LENGTH)
    run_folder.command(run, parser, argv)


if __name__ == "__main__":
    main()
