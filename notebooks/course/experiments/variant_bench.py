"""Every design on one bench: the same model, the same batches, the same eval set; another way to choose.

All start from one dense model that already finds its needles, as DSA did, and get the same number of steps of the same
batches. What brings new parts must first learn what they are for, each by imitating attention, 150 steps long: the
indexers of DSA and MSA its shares (that is `data/warmed`), the layers of Gated DeltaNet its output. NSA's new parts
start so that they change little, and derived proxies have nothing to learn. But a model may learn to write keys that a
summary does not hide, so the blocks chosen by one get a longer course besides.

    python -m course.experiments.variant_bench data/warmed --out data/measurements/alternatives.json
    python -m course.experiments.variant_bench data/warmed --out data/measurements/alternatives_longer.json
        --designs moba quest nsa --steps 240    (on one line)

The seed is that of the batches (and of new layers); the dense model is the same for all of them.
"""

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from course.experiments import experiment
from course.experiments.attention_variants import delta, moba, msa, nsa, quest, sinks, sparq
from course.experiments.attention_variants.selective_attention import Budget, convert
from dsa.datasets import corpus as texts
from dsa.datasets.recall_tasks import Episodes, Task
from dsa.model.attention import Attention, ForwardContext
from dsa.model.transformer import Transformer
from dsa.training import evaluate
from dsa.training.indexer import WARMUP_RATE, WARMUP_STEPS, joint_objective
from dsa.training.optimizers import adamw, main_optimizers
from dsa.training.pretrain import MixedNeedles, balance, lm_objective
from dsa.training.trainer import Phase, train

CONVERTED: dict[str, type[Attention]] = {
    "sinks": sinks.Sinks, "moba": moba.Moba, "quest": quest.Quest, "nsa": nsa.Nsa, "sparq": sparq.Sparq,
    "msa": msa.Msa,
}  # fmt: skip
DESIGNS = ("dense", "window", *CONVERTED, "dsa", "delta")
LEARNED = ("msa", "dsa")  # their indexers are trained beside the model (Eq. 4)
SEEDS, STEPS = (0, 1, 2), 60
LENGTH, BATCH, RATE, EVAL_EPISODES = 256, 4, 0.001, 48
BINS = (32, 64, 128)  # tokens back: the limits between bins of distance


def build(design: str, warmed: Transformer, budget: Budget) -> Transformer:
    """A copy of a warmed-up model that attends by one of DESIGNS but "delta". Raises ValueError for another name."""
    if design not in DESIGNS or design == "delta":
        raise ValueError(f"design={design!r} is unknown: use one of {', '.join(DESIGNS[:-1])} (and hybrid() for delta)")
    model = copy.deepcopy(warmed)
    model.top_k = budget.keys
    model.attention = {"window": "window", "msa": "sparse", "dsa": "sparse"}.get(design, "dense")
    return convert(model, CONVERTED[design], budget) if design in CONVERTED else model


def hybrid(
    warmed: Transformer, task: Task, *, steps: int = WARMUP_STEPS, seed: int = 0, size: int = BATCH
) -> Transformer:
    """Gated DeltaNet in three layers of four, the replaced ones warmed up: each has learned what attention gave.

    They see the dense model's input and are to give its output; the loss is the squared error over the target's own
    square, added over layers.
    """
    grown, dense = delta.hybrid(warmed, seed=seed), build("dense", warmed, Budget())
    targets = [layer.get_submodule("self_attn") for layer in dense.model.layers][: delta.REPLACED]
    replacements = nn.ModuleList([layer.get_submodule("self_attn") for layer in grown.model.layers][: delta.REPLACED])

    def step(_: nn.Module, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        seen = record_attention(dense, targets, task.generate(rng, size).tokens)
        wrong = [mine(x, context)[0] - out for mine, (x, context, out) in zip(replacements, seen, strict=True)]
        errors = [w.square().mean() / out.square().mean() for w, (*_, out) in zip(wrong, seen, strict=True)]
        return torch.stack(errors).sum(), {}

    plan = [Phase("imitation", steps, step, rates=(1.0, 0.1), warmup=min(10, steps // 4))]
    train(replacements, adamw(replacements.parameters(), WARMUP_RATE), plan, seed=seed, show=False)
    return grown


@torch.no_grad()
def record_attention(
    model: Transformer, modules: Sequence[nn.Module], tokens: Tensor
) -> list[tuple[Tensor, ForwardContext, Tensor]]:
    """Run a model and record what attention modules get and give: input (B, T, D), context, output (B, T, D)."""
    seen: list[tuple[Tensor, ForwardContext, Tensor]] = []
    hooks = [m.register_forward_hook(lambda _, got, gave: seen.append((got[0], got[1], gave[0]))) for m in modules]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def train_design(design: str, model: Transformer, task: Task, *, steps: int, seed: int = 0, size: int = BATCH) -> None:
    """Train everything of a built model in place, indexers by Eq. 4, all else by the language loss."""
    learned = design in LEARNED
    objective = joint_objective(task, size) if learned else lm_objective(task, size)
    optimizers = [*main_optimizers("muon", model, RATE), *(adamw(model.indexer_parameters(), RATE) if learned else [])]
    plan = [Phase(design, steps, objective, rates=(1.0, 0.1), warmup=min(10, steps // 4))]
    model.train()
    train(model, optimizers, plan, seed=seed, after=balance, show=False)
    model.eval()


@torch.no_grad()
def evaluate_design(
    model: Transformer, corpus: texts.Corpus, eval_set: Sequence[Episodes], length: int
) -> dict[str, float]:
    """Recall of needles by distance and in all, and bits per byte of plain text, on held-out files."""
    model.eval()
    right = torch.cat([batch.correct(model(batch.tokens)) for batch in eval_set]).float().flatten()
    distance = torch.cat([batch.distance for batch in eval_set]).flatten()
    edges = (0, *BINS, length)
    found = {"recall": right.mean().item()}
    for low, high in pairwise(edges):
        found[f"to {high}"] = right[(distance > low) & (distance <= high)].mean().item()
    return {**found, "bits": evaluate.text_bits(model, corpus, length, len(eval_set) * evaluate.BATCH)}


def bench(
    warmed: Transformer,
    corpus: texts.Corpus,
    *,
    designs: Sequence[str] = DESIGNS,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    budget: Budget | None = None,
    length: int = LENGTH,
    episodes: int = EVAL_EPISODES,
) -> list[dict[str, Any]]:
    """Examine every design as built (steps 0), and after training, once per seed: a list of runs."""
    budget = budget or Budget()
    eval_set = list(evaluate.needle_batches(corpus, length, episodes))
    runs = []

    def add_row(design: str, seed: int, done: int, model: Transformer) -> None:
        rounded = {name: round(value, 4) for name, value in evaluate_design(model, corpus, eval_set, length).items()}
        runs.append({"design": design, "seed": seed, "steps": done, **rounded})
        print(", ".join(f"{name} {value}" for name, value in runs[-1].items()), flush=True)

    for seed in seeds:
        for design in designs:
            task = MixedNeedles(corpus, length)
            model = hybrid(warmed, task, seed=seed) if design == "delta" else build(design, warmed, budget)
            if seed == seeds[0] or design == "delta":  # without training, the others are the same for every seed
                add_row(design, seed, 0, model)
            train_design(design, model, task, steps=steps, seed=seed)
            add_row(design, seed, steps, model)
    return runs


def measure_by_seed(runs: Sequence[dict[str, Any]], design: str, measure: str, steps: int = STEPS) -> list[float]:
    """One design's measure after so many steps, a number for each seed. Raises ValueError if it was not recorded."""
    found = [run[measure] for run in runs if (run["design"], run["steps"]) == (design, steps)]
    if not found:
        raise ValueError(f"no run of {design!r} with {steps} steps was recorded")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``python -m course.experiments.variant_bench``."""
    budget = Budget()
    plan = {"batch": BATCH, "length": LENGTH, "keys": budget.keys, "block": budget.block}
    rows, what = partial(bench, budget=budget), "Train every design of sparse attention with one budget."
    weights = "all start from {}; the trained models are not kept"
    given: dict[str, Any] = {"plan": plan, "designs": DESIGNS, "weights": weights, "argv": argv}
    experiment.record("course.experiments.variant_bench", what, rows, seeds=SEEDS, steps=STEPS, **given)


if __name__ == "__main__":
    main()
