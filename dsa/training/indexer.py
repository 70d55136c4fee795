"""The two stages that turn a dense model into a sparse one (report section 2).

**Dense warm-up.** The indexers are new and rank at random, so a model that trusted them would see noise. All else is
frozen, attention stays dense, and each indexer learns to imitate its layer's attention: KL(p || softmax(I)) with p the
attention summed over heads (Eq. 3).

**Sparse training.** Attention is over the K selected keys from now on, and everything learns, but from two losses that
do not touch each other: the model from its language loss alone, the indexers from the KL over the selected set alone
(Eq. 4). Their inputs are detached and selecting passes no gradient, so one backward pass serves both; clipping is
apart for the same reason.

Two things differ from the report besides size. It warms up at a rate of 1e-3 for 1000 steps; here 1e-2 and a hundred
are enough. And an indexer whose ReLU is dead for all keys learns nothing and looks like a window: with large first
weights some layers stayed so, hence the small first weights and the slow start.

    python -m dsa.training.indexer data/base --out data/warmed
    python -m dsa.training.indexer data/warmed --sparse --out data/sparse
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dsa.inference.checkpoint import from_pretrained
from dsa.model.transformer import Transformer
from dsa.text import corpus as texts
from dsa.text.tasks import Task
from dsa.training import folder
from dsa.training.evaluate import Claim
from dsa.training.loop import Learn, Phase, Run, train
from dsa.training.objectives import language_loss
from dsa.training.optimizers import adamw, muon_and_adamw
from dsa.training.pretrain import MixedNeedles, balance

HEADS, WIDTH, TOP_K = 2, 32, 16  # J, W, K
WARMUP_RATE, WARMUP_STEPS = 0.01, 150
SPARSE_RATE, INDEXER_RATE, SPARSE_STEPS = 0.003, 0.003, 100
BATCH = 8

WARMED_CLAIMS = (
    Claim("selects the answer in the induction layer", "indexer.hit_rate_in_induction_layer.indexer", least=0.95),
    Claim("where a window of 16 never does", "indexer.hit_rate_in_induction_layer.window", most=0.05),
    Claim("keeps most of the mass the oracle keeps", "indexer.of_oracle_mean", least=0.85),
    Claim("still recalls needles with dense attention", "recall.dense.all", least=0.99),
)
SPARSE_CLAIMS = (
    Claim("recalls needles with 16 selected keys", "recall.sparse.all", least=0.99),
    Claim("recalls needles more than 32 back with 16 selected keys", "recall.sparse.far", least=0.99),
    Claim("selects the answer in the induction layer", "indexer.hit_rate_in_induction_layer.indexer", least=0.95),
    Claim("cannot recall them through a window of 16", "recall.window.far", most=0.2),
    Claim("reads text at less than 3 bits per byte with 16 selected keys", "bits_per_byte.sparse", most=3.0),
)


def with_indexer(
    model: Transformer, heads: int = HEADS, width: int = WIDTH, top_k: int = TOP_K, seed: int = 0
) -> Transformer:
    """A copy of a dense model with untrained indexers added: J = heads, W = width, K = top_k.

    Every weight the two share is equal, and with dense attention (which it is set to) both compute the same.
    """
    sizes = {"index_n_heads": heads, "index_head_dim": width, "index_topk": top_k}
    grown = Transformer(model.config.replace(**sizes))
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in grown.indexer_parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=chance) * (3 * p.shape[1]) ** -0.5)
    grown.load_state_dict(model.state_dict(), strict=False)
    grown.attention = "dense"
    return grown.to(model.model.embed_tokens.weight.device).eval()


def imitate(task: Task, size: int) -> Learn:
    """Eq. 3 (dense attention) or Eq. 4 (sparse), summed over layers; ``kl`` is their mean."""

    def step(model: nn.Module, chance: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        _, losses = model(task.generate(chance, size).tokens, indexer_loss=True)
        return losses.sum(), _by_layer(losses)

    return step


def learn_both(task: Task, size: int) -> Learn:
    """The language loss for the model and Eq. 4 for its indexers, in one backward pass."""

    def step(model: nn.Module, chance: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        episodes = task.generate(chance, size)
        logits, losses = model(episodes.tokens, indexer_loss=True)
        loss = language_loss(logits, episodes)
        measures = {"language": loss.item(), **_by_layer(losses), **task.score(logits.detach(), episodes)}
        return loss + losses.sum(), measures

    return step


def _by_layer(losses: Tensor) -> dict[str, float]:
    return {"kl": losses.mean().item(), **{f"kl {layer}": loss.item() for layer, loss in enumerate(losses)}}


def warm_up(
    model: Transformer,
    task: Task,
    *,
    steps: int = WARMUP_STEPS,
    rate: float = WARMUP_RATE,
    size: int = BATCH,
    seed: int = 0,
    work: Path | None = None,
    resume: bool = False,
    label: str = "",
    after: Callable[[nn.Module], None] | None = None,
    show: bool = True,
) -> Run:
    """Stage one: train only the indexers of ``model``, in place, under dense attention; sets it to sparse.

    ``after(model)`` is called after each step, for whoever wants to watch.
    Raises ValueError for a model without indexers (add them: :func:`with_indexer`).
    """
    if not model.indexer_parameters():
        raise ValueError("this model has no indexers to warm up: add them first, with_indexer(model)")
    model.eval()  # the routers stay as they are, too
    model.attention = "dense"
    frozen = [p for name, p in model.named_parameters() if ".indexer." not in name]
    wanted = [p.requires_grad for p in frozen]
    try:
        for p in frozen:
            p.requires_grad_(False)
        plan = [Phase("warm-up", steps, imitate(task, size), rates=(1.0, 0.1), warmup=min(20, steps // 4))]
        optimizers = adamw(model.indexer_parameters(), rate)
        return train(model, optimizers, plan, seed=seed, work=work, resume=resume, after=after, label=label, show=show)
    finally:
        for p, grad in zip(frozen, wanted, strict=True):
            p.requires_grad_(grad)
        model.attention = "sparse"


def train_sparse(
    model: Transformer,
    task: Task,
    *,
    steps: int = SPARSE_STEPS,
    rate: float = SPARSE_RATE,
    indexer_rate: float = INDEXER_RATE,
    size: int = BATCH,
    seed: int = 0,
    work: Path | None = None,
    resume: bool = False,
    label: str = "",
    show: bool = True,
) -> Run:
    """Stage two: train everything, in place, attention over the model's ``top_k`` selected keys.

    Raises ValueError for a model without indexers.
    """
    model.attention = "sparse"
    model.train()
    optimizers = [*muon_and_adamw(model, rate, rate), *adamw(model.indexer_parameters(), indexer_rate)]
    plan = [Phase("sparse", steps, learn_both(task, size), rates=(1.0, 0.1), warmup=min(10, steps // 4))]
    run = train(model, optimizers, plan, seed=seed, work=work, resume=resume, after=balance, label=label, show=show)
    model.eval()
    return run


def run(options: argparse.Namespace) -> Path:
    """Make the folder that the command line asks for."""
    model = from_pretrained(options.folder)
    length = model.config.max_position_embeddings
    work = folder.prepare(options.out, resume=options.resume, replace=options.replace)
    corpus = texts.load(options.corpus)
    corpus.require(length)
    print(corpus)
    task = MixedNeedles(corpus, length)
    label = f"{'sparse' if options.sparse else 'warm-up'} from {options.folder} on {corpus.sha256}"
    common = {"seed": options.seed, "work": work, "resume": options.resume, "label": label}
    if options.sparse:
        made = train_sparse(model, task, **common)
    else:
        model = with_indexer(model, seed=options.seed) if model.config.index_topk is None else model
        made = warm_up(model, task, **common)
    return folder.finish(
        model,
        options.out,
        made,
        made_by=options.command,
        options={"seed": options.seed, "length": length, "top_k": model.top_k},
        corpus=corpus,
        claims=SPARSE_CLAIMS if options.sparse else WARMED_CLAIMS,
        exam={"length": length, "top_k": model.top_k, "traced": "sparse" if options.sparse else "dense"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``python -m dsa.training.indexer``."""
    parser = argparse.ArgumentParser("python -m dsa.training.indexer", description="Train a model's indexers.")
    parser.add_argument("folder", type=Path, help="the model folder to start from")
    parser.add_argument("--sparse", action="store_true", help="stage two, sparse training; without it the warm-up")
    folder.command(run, folder.options(parser), argv)


if __name__ == "__main__":
    main()
