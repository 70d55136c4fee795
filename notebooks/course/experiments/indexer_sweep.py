"""What an indexer needs: heads, width, rotary width, learning rate and first weights, each moved alone.

The sizes the course trains with are the middle; every other variant differs from them in one thing. All learn beside
each other from one reading of the frozen model, as in `activation`, whose machinery this is: the same batches in the
same order, so that what differs in the end comes from what was changed.

Two variants cannot be kept as a model. A narrower rotation than the model's own is one (the published format has a
single rotary width for attention and indexer), and it is the one worth seeing: an indexer that hardly knows where a
token stands cannot imitate an attention that does. The other is large first weights, with which a layer may start with
its ReLU shut for all keys, where no gradient passes, and stay so.

    python -m course.experiments.indexer_sweep data/base --out data/measurements/indexer_sweep.json
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course.experiments import activation, experiment
from course.experiments.activation import BATCH, EVAL_EPISODES, LENGTH, IndexerVariant, TeacherBatch
from dsa.datasets import corpus as texts
from dsa.model.indexer import Indexer
from dsa.model.rope import Rope, frequencies
from dsa.model.transformer import Transformer
from dsa.training import evaluate
from dsa.training.indexer import HEADS, TOP_K, WARMUP_RATE, WIDTH
from dsa.training.pretrain import MixedNeedles

SEEDS = (0, 1)
STEPS = 100


@dataclass(frozen=True)
class VariantConfig:
    """How one variant is built and trained: J, W, R, the learning rate, and a factor on its first weights."""

    heads: int = HEADS
    width: int = WIDTH
    rotary: int = 16
    rate: float = WARMUP_RATE
    first: float = 1.0


DEFAULT = VariantConfig()
AXES: dict[str, tuple[float, ...]] = {  # the default's own value is in each
    "heads": (1, 2, 4, 8),
    "width": (16, 32, 64),
    "rotary": (2, 4, 8, 16),
    "rate": (1e-3, 3e-3, 1e-2, 3e-2),
    "first": (1, 4, 16),
}


def variant_configs() -> list[VariantConfig]:
    """The default, and every config that differs from it in one thing."""
    moved = [replace(DEFAULT, **{axis: value}) for axis, values in AXES.items() for value in values]  # type: ignore[arg-type]
    return list(dict.fromkeys([DEFAULT, *moved]))


class SweptVariant(IndexerVariant):
    """An indexer for every layer of a model, of the sizes that a config gives."""

    def __init__(self, model: Transformer, config: VariantConfig, seed: int):
        super().__init__(model, "relu", config.heads, config.width, seed, config.rate)
        if config.rotary % 2 or not 2 <= config.rotary <= config.width:
            raise ValueError(f"rotary={config.rotary}: it must be even and lie in 2 ... {config.width}, the width")
        self.config, self.theta = config, model.config.rope_theta
        with torch.no_grad():
            for p in self.parameters():
                if p.ndim == 2:  # the matrices; LayerNorm's gain and bias start as they are
                    p.mul_(config.first)
        for indexer in self.indexers:  # built with the model's own rotary width, the only one a checkpoint can have
            assert isinstance(indexer, Indexer)
            indexer.rotary = config.rotary

    def rope(self, length: int) -> Rope:
        """The angles of ``length`` positions for this variant's rotary width."""
        angles = torch.arange(length)[:, None] * frequencies(self.config.rotary, self.theta, None)  # (T, R/2)
        return Rope(angles.cos(), angles.sin())

    def forward(self, teacher: list[TeacherBatch]) -> list[Tensor]:
        """Score every layer's keys: -> (B, T, T) for each."""
        rope = self.rope(teacher[0].x.shape[1])
        return super().forward([replace(layer, rope=rope) for layer in teacher])


def sweep(
    model: Transformer,
    corpus: texts.Corpus,
    plan: Sequence[VariantConfig],
    *,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    length: int = LENGTH,
    episodes: int = EVAL_EPISODES,
) -> list[dict[str, Any]]:
    """Warm up and evaluate every config, once per seed: a list of runs."""
    eval_set, runs = list(evaluate.needle_batches(corpus, length, episodes)), []
    for seed in seeds:
        variants = [SweptVariant(model, config, seed) for config in plan]
        activation.warm_up(model, variants, MixedNeedles(corpus, length), steps=steps, seed=seed)
        for config, measures in zip(plan, activation.evaluate_variants(model, variants, eval_set), strict=True):
            rounded = {name: round(value, 4) for name, value in measures.items()}
            runs.append({**asdict(config), "seed": seed, **rounded})
            print(", ".join(f"{name} {value}" for name, value in runs[-1].items()), flush=True)
    return runs


def along_axis(runs: Sequence[dict[str, Any]], axis: str, measure: str) -> dict[float, list[float]]:
    """One axis of recorded runs: value -> the measure of each seed, all else as in DEFAULT.

    Raises ValueError for an axis that was not swept.
    """
    if axis not in AXES:
        raise ValueError(f"axis {axis!r} was not swept: use one of {', '.join(AXES)}")
    others = {name: value for name, value in asdict(DEFAULT).items() if name != axis}
    found: dict[float, list[float]] = {}
    for run in runs:
        if all(run[name] == value for name, value in others.items()):
            found.setdefault(run[axis], []).append(run[measure])
    return dict(sorted(found.items()))


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``python -m course.experiments.indexer_sweep``."""
    plan = {"batch": BATCH, "length": LENGTH, "top_k": TOP_K}
    rows, what = partial(sweep, plan=variant_configs()), "Move one size of an indexer alone."
    experiment.record("course.experiments.indexer_sweep", what, rows, seeds=SEEDS, steps=STEPS, plan=plan, argv=argv)


if __name__ == "__main__":
    main()
