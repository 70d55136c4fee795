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
from dsa.training.trainer import Phase, train

FORMS = ("relu", "none", "softmax")
SIZES = ((2, 32), (8, 16))  # J, W
SEEDS = (0, 1, 2)
LENGTH, BATCH, STEPS, EVAL_EPISODES = 256, 4, 120, 32


@dataclass(frozen=True)
class TeacherBatch:
    """What one layer's indexer is shown of a batch, and the attention it is to imitate.

    x (B, T, D) is the normed hidden state, query_latent (B, T, Q), rope the angles, and attention_probs
    (B, T, T) the mean over all heads, whose rows sum to 1 (Eq. 3).
    """

    x: Tensor
    query_latent: Tensor
    rope: Rope
    attention_probs: Tensor


def attentions(model: Transformer) -> list[Attention]:
    """The attention of every layer, in order."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def indexers(model: Transformer) -> list[Indexer]:
    """The indexer of every layer, in order; none for a dense model."""
    return [attention.indexer for attention in attentions(model) if attention.indexer is not None]


@torch.no_grad()
def teacher_batches(model: Transformer, tokens: Tensor) -> list[TeacherBatch]:
    """Let a frozen model read tokens (B, T) with dense attention: one teacher batch for each layer."""
    found: list[TeacherBatch] = []

    def watch(attention: Attention, inputs: tuple) -> None:
        x, context = inputs[:2]
        q, latent = attention.queries(x, context.rope)
        probs = attention.attention_probs(q, attention.compress_kv(x, context.rope))
        found.append(TeacherBatch(x, latent, context.rope, probs))

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


class IndexerVariant(nn.Module):
    """One variant: an indexer for every layer of a model, scored in one form, learning at one rate."""

    def __init__(self, model: Transformer, form: str, heads: int, width: int, seed: int, rate: float = WARMUP_RATE):
        super().__init__()
        self.form, self.heads, self.width, self.rate = form, heads, width, rate
        self.indexers = nn.ModuleList(indexers(with_indexer(model, heads, width, seed=seed)))

    def forward(self, teacher: list[TeacherBatch]) -> list[Tensor]:
        """Score every layer's keys: -> (B, T, T) for each."""
        found = []
        for indexer, layer in zip(self.indexers, teacher, strict=True):
            assert isinstance(indexer, Indexer)
            found.append(scores(self.form, *indexer(layer.x, layer.query_latent, layer.rope)))
        return found

    def loss(self, teacher: list[TeacherBatch]) -> Tensor:
        """KL(p || softmax(I)) of each layer, the mean over queries (Eq. 3): (layers,)."""
        pairs = zip(teacher, self(teacher), strict=True)
        return torch.stack([reference.kl_divergence(layer.attention_probs, found).mean() for layer, found in pairs])


def warm_up(
    model: Transformer,
    variants: Sequence[IndexerVariant],
    task: Task,
    *,
    steps: int = STEPS,
    size: int = BATCH,
    seed: int = 0,
) -> None:
    """Teach several variants at once, in place, each with an optimiser of its own; the model stays as it is."""

    def step(variants: nn.Module, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        teacher = teacher_batches(model, task.generate(rng, size).tokens)
        losses = [variant.loss(teacher).sum() for variant in variants.children()]  # type: ignore[operator]
        return torch.stack(losses).sum(), {}  # variants share no weight, so the sum trains each as if it were alone

    plan = [Phase("variants", steps, step, (1.0, 0.1), warmup=min(20, steps // 4))]
    optimizers = [optimizer for variant in variants for optimizer in adamw(variant.parameters(), variant.rate)]
    train(nn.ModuleList(variants), optimizers, plan, seed=seed, show=False)


@torch.no_grad()
def evaluate_variants(
    model: Transformer, variants: Sequence[IndexerVariant], eval_set: Sequence[Episodes]
) -> list[dict[str, float]]:
    """What each variant learned, from needle episodes of one length.

    Returns, for each variant: ``kl`` and ``of_oracle`` (share of the mass that the best TOP_K keys keep), both means
    over layers, ``kl_worst`` (of its worst layer), and ``hit`` (is the answer among TOP_K, more than 64 back) in the
    last layer, the one that looks up.
    """
    found: list[list[dict[str, float]]] = [[] for _ in variants]
    for batch in eval_set:
        teacher = teacher_batches(model, batch.tokens)
        best = [_attention_recall(layer.attention_probs, layer.attention_probs) for layer in teacher]
        for variant, measures in zip(variants, found, strict=True):
            scored = variant(teacher)
            kept = [
                _attention_recall(layer.attention_probs, ranking)
                for layer, ranking in zip(teacher, scored, strict=True)
            ]
            far = batch.distance > evaluate.HIT_FAR  # what is near, a window finds as well
            hits = evaluate.hit(reference.select(scored[-1], TOP_K), batch)[far]
            kl = variant.loss(teacher)
            measures.append(
                {
                    "kl": kl.mean().item(),
                    "kl_worst": kl.max().item(),
                    "of_oracle": sum(kept) / sum(best),
                    "hit": hits.float().mean().item(),
                }
            )
    return [{name: mean(one[name] for one in each) for name in each[0]} for each in found]


def _attention_recall(attention_probs: Tensor, ranking: Tensor) -> float:
    """Mean attention on the TOP_K best of a ranking, over the queries that have to choose."""
    visible = reference.causal_mask(attention_probs.shape[1], attention_probs.shape[2], attention_probs.device)
    chosen = reference.select(ranking.masked_fill(~visible, float("-inf")), TOP_K)
    return baselines.attention_recall(attention_probs, chosen)[:, TOP_K:].mean().item()


def sweep(
    model: Transformer,
    corpus: texts.Corpus,
    *,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    episodes: int = EVAL_EPISODES,
) -> list[dict[str, Any]]:
    """Every form in every size, warmed up and evaluated once per seed: a list of runs."""
    eval_set, runs = list(evaluate.needle_batches(corpus, LENGTH, episodes)), []
    for seed in seeds:
        variants = [IndexerVariant(model, form, heads, width, seed) for heads, width in SIZES for form in FORMS]
        warm_up(model, variants, MixedNeedles(corpus, LENGTH), steps=steps, seed=seed)
        for variant, measures in zip(variants, evaluate_variants(model, variants, eval_set), strict=True):
            rounded = {name: round(value, 4) for name, value in measures.items()}
            runs.append({"form": variant.form, "heads": variant.heads, "width": variant.width, "seed": seed, **rounded})
            print(", ".join(f"{name} {value}" for name, value in runs[-1].items()), flush=True)
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``python -m course.experiments.activation``."""
    plan = {"batch": BATCH, "length": LENGTH, "top_k": TOP_K}
    what = "Compare forms of Eq. 1."
    experiment.record("course.experiments.activation", what, sweep, seeds=SEEDS, steps=STEPS, plan=plan, argv=argv)


if __name__ == "__main__":
    main()
