"""Distillation from specialists: sample, keep what is right, and let one model imitate it.

The report trains a specialist for each domain and lets them write the training data of one model. Nothing is copied
between weights, and logits are not compared either: the data are *texts*, of which a checker has thrown away the wrong
ones (rejection sampling). So teacher and student may differ in size and kind, and a specialist that is right half the
time still teaches nothing but right answers.

What is kept leans to the easy: a problem that a specialist rarely solves is rarely in the data. ``per_prompt`` bounds
how often an easy one may be.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn

from dsa.datasets import rl_transcripts
from dsa.datasets.rl_transcripts import Transcript
from dsa.model.transformer import Transformer
from dsa.training.losses import forward_with_indexer_loss, language_loss
from dsa.training.optimizers import adamw
from dsa.training.rollout import sample
from dsa.training.trainer import Phase, Run, train


def rejection_sample(
    model: Transformer,
    names: Sequence[str],
    *,
    num_prompts: int = 128,
    num_generations: int = 4,
    per_prompt: int = 1,
    temperature: float = 1.0,
    keep: Callable[[Transcript], bool] = lambda one: one.correct,
    seed: int = 0,
) -> list[Transcript]:
    """Sample ``num_generations`` completions of each prompt; of each prompt's, the first ``per_prompt`` to be kept."""
    generator = torch.Generator().manual_seed(seed)
    drawn = rl_transcripts.sample_problems(generator, names, num_prompts)
    found = sample(
        model, [p for p in drawn for _ in range(num_generations)], generator, temperature=temperature
    ).transcripts()
    groups = (found[n : n + num_generations] for n in range(0, len(found), num_generations))
    return [one for group in groups for one in [one for one in group if keep(one)][:per_prompt]]


def collect(specialists: Mapping[str, Transformer], **options) -> list[Transcript]:
    """Rejection sampling of every specialist in its own domain (options: :func:`rejection_sample`)."""
    return [one for name, model in specialists.items() for one in rejection_sample(model, [name], **options)]


@dataclass(frozen=True)
class SFTObjective:
    """The objective of supervised fine-tuning: the next own token, over ``size`` transcripts drawn for each step.

    Domains are drawn with equal chances, whatever the number of their transcripts, since rejection leaves more of the
    easy ones. Under sparse attention the indexers learn beside it (Eq. 4).
    """

    transcripts: Sequence[Transcript]
    size: int = 64

    def __post_init__(self) -> None:
        if not self.transcripts:
            raise ValueError("there is no transcript to learn from: sample more prompts, or from a better specialist")

    def __call__(self, model: nn.Module, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss of one step."""
        assert isinstance(model, Transformer)
        draw = Random(int(torch.randint(2**62, (1,), generator=rng)))
        by_domain: dict[str, list[Transcript]] = {}
        for one in self.transcripts:
            by_domain.setdefault(one.problem.domain, []).append(one)
        names = sorted(by_domain)
        episodes = rl_transcripts.batch([draw.choice(by_domain[names[n % len(names)]]) for n in range(self.size)])
        logits, indexer_loss = forward_with_indexer_loss(model, episodes.tokens)
        loss = language_loss(logits, episodes)
        return loss + indexer_loss, {"language": loss.item()}


def sft(
    model: Transformer,
    transcripts: Sequence[Transcript],
    *,
    steps: int = 80,
    learning_rate: float = 2e-3,
    size: int = 64,
    seed: int = 0,
    show: bool = True,
) -> Run:
    """Fine-tune ``model``, in place, on the own tokens of transcripts. ValueError if there are none."""
    plan = [Phase("sft", steps, SFTObjective(transcripts, size), rates=(1.0, 0.1), warmup=min(5, steps // 4))]
    return train(model.eval(), adamw(model.parameters(), learning_rate), plan, seed=seed, show=show)
