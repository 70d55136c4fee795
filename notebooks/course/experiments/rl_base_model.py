"""The model that post-training starts from: it knows the five domains, from noisy demonstrations.

It is trained as the course's large one was: first it copies, until it can look back; then it reads worked solutions
with dense attention; its indexers are warmed up (Eq. 3) and it learns to live with K = 8 of up to 34 tokens (Eq. 4).
What differs is the text. Two fifths of the solutions have a symbol exchanged, so the model imitates errors as
faithfully as skill: its likeliest answers are mostly right, and those it samples are right about half the time. Real
base models are like that for other reasons; here it is made, openly, because reinforcement learning cannot teach what
is never sampled and has nothing to teach where all samples are right.

    python -m course.experiments.rl_base_model --out data/novice
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsa.datasets.recall_tasks import Copy
from dsa.datasets.rl_domains import DOMAINS
from dsa.datasets.rl_symbols import DIGITS, NAMES, VOCAB
from dsa.datasets.rl_transcripts import LENGTH, Demonstrations
from dsa.model.config import Config
from dsa.model.transformer import Transformer
from dsa.training import run_folder
from dsa.training.indexer import train_sparse, warm_up, with_indexer
from dsa.training.optimizers import main_optimizers
from dsa.training.pretrain import lm_objective
from dsa.training.rollout import accuracy
from dsa.training.trainer import Phase, Run, train, until

TOP_K = 8
RATE = 0.01
COPY_CAP, STEPS, WARM_STEPS, SPARSE_STEPS, BATCH = 600, 900, 100, 150, 64
EVAL_PROBLEMS = 300  # problems of each domain

SOURCE: dict[str, object] = {
    "source": "generated: dsa.datasets.rl_transcripts.Demonstrations",
    "mistakes": Demonstrations().noise,
}


class Generated:
    """What provenance says in the place of a corpus."""

    def describe(self) -> dict[str, object]:
        """The generator and its share of mistakes."""
        return SOURCE


def dense_config() -> Config:
    """A fifth of a million weights, all layers dense: at this size experts cost time and bring nothing."""
    return Config.mini().replace(
        vocab_size=VOCAB, hidden_size=64, q_lora_rank=48, kv_lora_rank=32, intermediate_size=192,
        first_k_dense_replace=3, max_position_embeddings=64,
        index_n_heads=None, index_head_dim=None, index_topk=None,
    )  # fmt: skip


def make(
    seed: int = 0, *, work: Path | None = None, resume: bool = False, show: bool = True
) -> tuple[Transformer, Run]:
    """Train it, with the steps and sizes above."""
    task, size = Demonstrations(), BATCH
    copy = Copy(LENGTH, first=DIGITS[0], symbols=len(DIGITS) + len(NAMES))
    plan = [
        Phase("copy", COPY_CAP, lm_objective(copy, size // 2), warmup=20, done=until("copy", 0.95)),
        Phase("solutions", STEPS, lm_objective(task, size), rates=(1.0, 0.03), warmup=10),
    ]
    places = [None] * 3 if work is None else [work, work / "warm-up", work / "sparse"]
    model = Transformer(dense_config())
    model.reset_parameters(seed)
    optimizers = main_optimizers("muon", model, RATE)
    runs = [train(model.train(), optimizers, plan, seed=seed, work=places[0], resume=resume, show=show)]
    model = with_indexer(model, heads=2, width=16, top_k=TOP_K, seed=seed)
    options: dict[str, Any] = {"size": size, "seed": seed, "resume": resume, "show": show}
    runs.append(warm_up(model, task, steps=WARM_STEPS, work=places[1], **options))
    runs.append(train_sparse(model, task, steps=SPARSE_STEPS, work=places[2], **options))
    rows = [row for run in runs for row in run.rows]
    return model, Run(rows, sum(run.seconds for run in runs), sum(run.processor_seconds for run in runs))


def evaluate_domains(_: Path, model: Transformer) -> dict[str, Any]:
    """Accuracy in each domain under sparse and dense attention, sampled and greedy."""
    found: dict[str, Any] = {}
    for attention in ("sparse", "dense"):
        model.attention = attention
        for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            scores = accuracy(model, tuple(DOMAINS), EVAL_PROBLEMS, temperature=temperature)
            found[f"{attention} {name}"] = {domain: round(score, 4) for domain, score in scores.items()}
    model.attention = "sparse"
    return {"measures": found}


def run(options: argparse.Namespace) -> Path:
    """Make the folder that the command line asks for."""
    work = run_folder.prepare(options.out, resume=options.resume, replace=options.replace)
    model, made = make(options.seed, work=work, resume=options.resume)
    return run_folder.finish(
        model,
        options.out,
        made,
        made_by=options.command,
        options={"seed": options.seed, "steps": STEPS, "top_k": TOP_K},
        corpus=Generated(),
        extra=evaluate_domains,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``python -m course.experiments.rl_base_model``."""
    parser = argparse.ArgumentParser(
        "python -m course.experiments.rl_base_model", description="Train the base model on noisy demonstrations."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the model folder to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--replace", action="store_true", help="replace OUT if it exists, once the new one is whole")
    run_folder.command(run, parser, argv)


if __name__ == "__main__":
    main()
