"""The base model: dense, and unable to do anything without looking far back.

Shown text and needles from the start, a model of this size guesses the needles for ever: the text is where loss falls
first, and a third of the recall can be had by counting values. What it lacks is an *induction head*, an attention that
finds the earlier place where the present symbol stood. So it first copies random segments, where nothing else helps,
until it does so nearly without error (100 to 400 steps, depending on the seed, hence a stop rule and not a number).
After that it reads text with needles, 128 tokens long, then 256 and 512, and recalls almost at once.

The base is true to history: V3.1-Terminus was a dense model, and its indexers were added afterwards
(:mod:`dsa.training.indexer`). The folder is therefore a ``deepseek_v3`` one.

    dsa train pretrain --out data/base
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dsa.datasets import corpus as texts
from dsa.datasets.corpus import Corpus
from dsa.datasets.recall_tasks import Copy, Needles, Task
from dsa.distributed import fsdp
from dsa.io.command_line import Parser
from dsa.model.config import Config
from dsa.model.transformer import Transformer
from dsa.training import run_folder
from dsa.training.evaluate import Claim
from dsa.training.losses import language_loss
from dsa.training.optimizers import main_optimizers
from dsa.training.trainer import Objective, Phase, Run, train, until

COPY_LENGTH, COPY_BATCH, COPY_CAP = 64, 32, 600
MIXED = (  # length, sequences a step, steps, factors on the rate at first and last step
    (128, 16, 250, (1.0, 0.7)),
    (256, 16, 250, (0.7, 0.4)),
    (512, 8, 150, (0.4, 0.03)),
)
LENGTH = MIXED[-1][0]
RATE = 0.01  # of Muon and of AdamW
ROUTER_SPEED = 0.003
PAIRS = (2, 4, 8, 16)  # needles a sequence, drawn anew for each step

CLAIMS = (
    Claim("recalls needles with dense attention", "recall.dense.all", least=0.99),
    Claim("recalls needles more than 32 back with dense attention", "recall.dense.far", least=0.99),
    Claim("cannot recall them through a window of 16", "recall.window.far", most=0.2),
    Claim("reads text at less than 3 bits per byte", "bits_per_byte.dense", most=3.0),
)


def lm_objective(task: Task, size: int) -> Objective:
    """The objective "predict what counts" on ``size`` episodes of a task, with the task's own measures."""

    def step(model: nn.Module, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        episodes = fsdp.local_batch(task.generate(rng, size))
        logits = model(episodes.tokens)
        return language_loss(logits, episodes), task.score(logits.detach(), episodes)

    return step


class MixedNeedles(Needles):
    """Needles of which each batch has 2, 4, 8 or 16 pairs, so that one alone is found as well as many."""

    def generate(self, generator: torch.Generator, size: int):
        """A batch of :class:`Needles` with a drawn number of pairs, all asked."""
        pairs = PAIRS[int(torch.randint(len(PAIRS), (1,), generator=generator))]
        return Needles(self.corpus, self.length, pairs, pairs, self.split).generate(generator, size)


def phases(corpus: Corpus) -> list[Phase]:
    """Copy until it works, then text and needles at each length of MIXED."""
    copy = lm_objective(Copy(COPY_LENGTH), COPY_BATCH)
    return [
        Phase("copy", COPY_CAP, copy, warmup=20, done=until("copy", 0.95)),
        *(
            Phase(f"mixed {length}", steps, lm_objective(MixedNeedles(corpus, length), size), rates)
            for length, size, steps, rates in MIXED
        ),
    ]


def dense_config(length: int = LENGTH) -> Config:
    """The laptop model without indexers."""
    dense = {"index_n_heads": None, "index_head_dim": None, "index_topk": None}
    return Config.mini().replace(**dense, max_position_embeddings=length)


def balance(model: nn.Module) -> None:
    """Move the routers' biases by what the step has loaded on the experts, on all ranks together."""
    assert isinstance(model, Transformer)
    for gate in model.gates():
        fsdp.all_reduce_sum(gate.load)
        gate.balance(ROUTER_SPEED)


def pretrain(
    corpus: Corpus,
    *,
    seed: int = 0,
    work: Path | None = None,
    resume: bool = False,
    config: Config | None = None,
    plan: Sequence[Phase] | None = None,
    optimizer: str = "muon",
) -> tuple[Transformer, Run]:
    """Train a dense model on a corpus; ``config`` and ``plan`` (phases) replace the laptop model's.

    Raises ValueError for a corpus too short for one sequence.
    """
    config = config or dense_config()
    corpus.require_length(config.max_position_embeddings)
    model = Transformer(config)
    model.reset_parameters(seed)
    fsdp.shard(model).train()
    plan = phases(corpus) if plan is None else plan
    optimizers = main_optimizers(optimizer, model, RATE)
    label = f"pretrain by {optimizer} on {corpus.sha256}"
    run = train(model, optimizers, plan, seed=seed, work=work, resume=resume, after=balance, label=label)
    return fsdp.gather(model).eval(), run


def run(options: argparse.Namespace) -> Path:
    """Make the folder that the command line asks for."""
    work = run_folder.prepare(options.out, resume=options.resume, replace=options.replace)
    corpus = texts.load(options.corpus)
    print(corpus)
    model, made = pretrain(corpus, seed=options.seed, work=work, resume=options.resume, optimizer=options.optimizer)
    return run_folder.finish(
        model,
        options.out,
        made,
        made_by=options.command,
        options={"seed": options.seed, "length": LENGTH, "optimizer": options.optimizer},
        corpus=corpus,
        claims=CLAIMS,
        eval_settings={"length": LENGTH},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command `dsa train pretrain`."""
    parser = Parser("dsa train pretrain", description="Train the dense base model.")
    run_folder.command(run, run_folder.options(parser), argv)


if __name__ == "__main__":
    main()
