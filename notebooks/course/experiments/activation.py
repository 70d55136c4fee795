"""Is the ReLU any good? Indexers with and without it, warmed up side by side on one frozen model.

During the dense warm-up nothing but the indexers changes, so what they see and what they are to imitate depends on the
tokens alone. The frozen model therefore reads each batch once, and every variant learns from that one reading: six
indexers cost little more than one, and all of them see the same data in the same order.

The variants are three forms of Eq. 1 in two sizes:

- ``relu``: sum_j w_j ReLU(q_j . k), as published;
- ``none``: sum_j w_j (q_j . k). The sum can be moved inside, (sum_j w_j q_j) . k: all heads are one;
- ``softmax``: the ReLU kept, but the head weights made positive with sum one, as a mixture's usually are.

    python -m course.experiments.activation data/base --out data/measurements/indexer_activation.json
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from course.experiments import experiment
from dsa.datasets import corpus as texts
from dsa.datasets.recall_tasks import Episodes, Task
from dsa.kernels import reference
from dsa.model import baselines
from dsa.model.attention import Attention
from dsa.model.indexer import Indexer
from dsa.model.rope import Rope
from dsa.model.transformer import Transformer
from dsa.training import evaluate
from dsa.training.indexer import TOP_K, WARMUP_RATE, with_indexer
from dsa.training.optimizers import adamw
from dsa.training.pretrain import MixedNeedles
from dsa.training.trainer import Learn, Phase, train

FORMS = ("relu", "none", "softmax")
SIZES = ((2, 32), (8, 16))  # J, W
SEEDS = (0, 1, 2)
LENGTH, BATCH, STEPS, EXAM = 256, 4, 120, 32


@dataclass(frozen=True)
class Lesson:
    """What one layer's indexer is shown of a batch, and the attention it is to imitate.

    x (B, T, D) the normed hidden state, query_latent (B, T, Q), the angles, and mass (B, T, T), rows that sum to 1.
    """

    x: Tensor
    query_latent: Tensor
    rope: Rope
    mass: Tensor


def attentions(model: Transformer) -> list[Attention]:
    """The attention of every layer, in order."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def indexers(model: Transformer) -> list[Indexer]:
    """The indexer of every layer, in order; none for a dense model."""
    return [attention.indexer for attention in attentions(model) if attention.indexer is not None]


@torch.no_grad()
def lessons(model: Transformer, tokens: Tensor) -> list[Lesson]:
    """Let a frozen model read tokens (B, T) with dense attention: one lesson for each layer."""
    found: list[Lesson] = []

    def watch(attention: Attention, inputs: tuple) -> None:
        x, step = inputs[:2]
        q, latent = attention.queries(x, step.rope)
        found.append(Lesson(x, latent, step.rope, attention.attention_probs(q, attention.compress_kv(x, step.rope))))

    hooks = [attention.register_forward_pre_hook(watch) for attention in attentions(model)]
    try:
        with evaluate.set_to(model, "dense"):
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def scores(form: str, q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Index scores in one of FORMS: the arguments of `ops.index_scores` -> (B, T, S), -inf in the future."""
    products = torch.einsum("btjw,bsw->btjs", q, k)  # (B, T, J, S)
    match form:
        case "relu":
            summed = torch.einsum("btj,btjs->bts", w, products.relu())  # Eq. 1
        case "none":
            summed = torch.einsum("btj,btjs->bts", w, products)
        case "softmax":
            shares = (w * (q.shape[2] * q.shape[3]) ** 0.5).softmax(-1)
            summed = torch.einsum("btj,btjs->bts", shares, products.relu())
        case _:
            raise ValueError(f"form {form!r} is unknown: use one of {', '.join(FORMS)}")
    return summed.masked_fill(~reference.causal_mask(q.shape[1], k.shape[1], q.device), float("-inf"))


class Pupil(nn.Module):
    """One variant: an indexer for every layer of a model, scored in one form, learning at one rate."""

    def __init__(self, model: Transformer, form: str, heads: int, width: int, seed: int, rate: float = WARMUP_RATE):
        super().__init__()
        self.form, self.heads, self.width, self.rate = form, heads, width, rate
        self.indexers = nn.ModuleList(indexers(with_indexer(model, heads, width, seed=seed)))

    def forward(self, taught: list[Lesson]) -> list[Tensor]:
        """Score every layer's keys: -> (B, T, T) for each lesson."""
        found = []
        for indexer, lesson in zip(self.indexers, taught, strict=True):
            assert isinstance(indexer, Indexer)
            found.append(scores(self.form, *indexer(lesson.x, lesson.query_latent, lesson.rope)))
        return found

    def loss(self, taught: list[Lesson]) -> Tensor:
        """KL(p || softmax(I)) of each layer, the mean over queries (Eq. 3): (layers,)."""
        pairs = zip(taught, self(taught), strict=True)
        return torch.stack([reference.kl_divergence(lesson.mass, found).mean() for lesson, found in pairs])


def warm_up(
    model: Transformer, pupils: Sequence[Pupil], task: Task, *, steps: int = STEPS, size: int = BATCH, seed: int = 0
) -> None:
    """Teach several variants at once, in place, each with an optimiser of its own; the model stays as it is."""
    plan = [Phase("variants", steps, _imitate(model, task, size), (1.0, 0.1), warmup=min(20, steps // 4))]
    optimizers = [optimizer for pupil in pupils for optimizer in adamw(pupil.parameters(), pupil.rate)]
    train(nn.ModuleList(pupils), optimizers, plan, seed=seed, show=False)


def _imitate(model: Transformer, task: Task, size: int) -> Learn:
    def step(pupils: nn.Module, chance: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        taught = lessons(model, task.generate(chance, size).tokens)
        losses = [pupil.loss(taught).sum() for pupil in pupils.children()]  # type: ignore[operator]
        return torch.stack(losses).sum(), {}

    return step


@torch.no_grad()
def examine(model: Transformer, pupils: Sequence[Pupil], exam: Sequence[Episodes]) -> list[dict[str, float]]:
    """What each variant learned, from needle episodes of one length.

    Returns, for each pupil: ``kl`` and ``of_oracle`` (share of the mass that the best TOP_K keys keep), both means
    over layers, ``kl_worst`` (of its worst layer), and ``hit`` (is the answer among TOP_K, more than 64 back) in the
    last layer, the one that looks up.
    """
    found: list[list[dict[str, float]]] = [[] for _ in pupils]
    for batch in exam:
        taught = lessons(model, batch.tokens)
        best = [_kept(lesson.mass, lesson.mass) for lesson in taught]
        for pupil, measures in zip(pupils, found, strict=True):
            layers = pupil(taught)
            kept = [_kept(lesson.mass, scored) for lesson, scored in zip(taught, layers, strict=True)]
            far = batch.distance > evaluate.HIT_FAR
            hits = evaluate.hit(reference.select(layers[-1], TOP_K), batch)[far]
            kl = pupil.loss(taught)
            found_out = {"kl": kl.mean().item(), "kl_worst": kl.max().item()}
            measures.append({**found_out, "of_oracle": sum(kept) / sum(best), "hit": hits.float().mean().item()})
    return [{name: mean(one[name] for one in each) for name in each[0]} for each in found]


def _kept(mass: Tensor, ranking: Tensor) -> float:
    """Mean mass on the TOP_K best of a ranking, over the queries that have to choose."""
    visible = reference.causal_mask(mass.shape[1], mass.shape[2], mass.device)
    chosen = reference.select(ranking.masked_fill(~visible, float("-inf")), TOP_K)
    return baselines.attention_recall(mass, chosen)[:, TOP_K:].mean().item()


def sweep(
    model: Transformer, corpus: texts.Corpus, *, seeds: Sequence[int] = SEEDS, steps: int = STEPS, episodes: int = EXAM
) -> list[dict[str, Any]]:
    """Every form in every size, warmed up and examined once per seed: a list of runs."""
    exam, runs = list(evaluate.needle_batches(corpus, LENGTH, episodes)), []
    for seed in seeds:
        pupils = [Pupil(model, form, heads, width, seed) for heads, width in SIZES for form in FORMS]
        warm_up(model, pupils, MixedNeedles(corpus, LENGTH), steps=steps, seed=seed)
        for pupil, measures in zip(pupils, examine(model, pupils, exam), strict=True):
            rounded = {name: round(value, 4) for name, value in measures.items()}
            runs.append({"form": pupil.form, "heads": pupil.heads, "width": pupil.width, "seed": seed, **rounded})
            print(", ".join(f"{name} {value}" for name, value in runs[-1].items()), flush=True)
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``python -m course.experiments.activation``."""
    plan = {"batch": BATCH, "length": LENGTH, "top_k": TOP_K}
    what = "Compare forms of Eq. 1."
    experiment.record("course.experiments.activation", what, sweep, seeds=SEEDS, steps=STEPS, plan=plan, argv=argv)


if __name__ == "__main__":
    main()
