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

    dsa train indexer data/base --out data/warmed
    dsa train indexer data/warmed --sparse --out data/sparse

Any `deepseek_v3` folder may stand in the place of data/base (:mod:`dsa.training.adopt` says what is asked of it), and
`--corpus` names a text of one's own. A table of loss, recall, mass kept and cost, before and after, is printed and
stored in provenance.json (:mod:`dsa.training.compare`).
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsa.checkpoint.load import from_pretrained
from dsa.datasets.recall_tasks import Task
from dsa.distributed import fsdp
from dsa.io.command_line import Parser
from dsa.model.transformer import Transformer
from dsa.training import adopt, compare, indexer_data, run_folder
from dsa.training.evaluate import Claim
from dsa.training.indexer_data import IndexerData
from dsa.training.losses import language_loss
from dsa.training.optimizers import adamw, main_optimizers
from dsa.training.pretrain import balance
from dsa.training.trainer import Objective, Phase, Run, train

HEADS, WIDTH, TOP_K = 2, 32, 16  # J, W, K
WARMUP_RATE, WARMUP_STEPS = 0.01, 150
SPARSE_RATE, INDEXER_RATE, SPARSE_STEPS = 0.003, 0.003, 100
BATCH = 8
VOCABULARY = (
    "A model with a vocabulary of its own reads text through the tokenizer.json in its folder, or --corpus is token "
    "ids (.npy or .safetensors)."
)

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
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in grown.indexer_parameters():
            if p.ndim == 2:
                # a third of the usual variance: with larger weights the ReLU of some layers starts dead and stays so
                p.copy_(torch.randn(p.shape, generator=rng) * (3 * p.shape[1]) ** -0.5)
    grown.load_state_dict(model.state_dict(), strict=False)  # only the indexers' weights are missing in it
    grown.attention = "dense"
    return grown.to(model.model.embed_tokens.weight.device).eval()


def indexer_kl_objective(task: Task, size: int) -> Objective:
    """Eq. 3 (dense attention) or Eq. 4 (sparse), summed over layers; ``kl`` is their mean."""

    def step(model: nn.Module, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        _, losses = model(fsdp.local_batch(task.generate(rng, size)).tokens, indexer_loss=True)
        return losses.sum(), _kl_measures(losses)

    return step


def joint_objective(task: Task, size: int) -> Objective:
    """The language loss for the model and Eq. 4 for its indexers, in one backward pass."""

    def step(model: nn.Module, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        episodes = fsdp.local_batch(task.generate(rng, size))
        logits, losses = model(episodes.tokens, indexer_loss=True)
        loss = language_loss(logits, episodes)
        measures = {"language": loss.item(), **_kl_measures(losses), **task.score(logits.detach(), episodes)}
        return loss + losses.sum(), measures  # unweighted: no parameter gets a gradient from both

    return step


def _kl_measures(losses: Tensor) -> dict[str, float]:
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
        plan = [Phase("warm-up", steps, indexer_kl_objective(task, size), rates=(1.0, 0.1), warmup=min(20, steps // 4))]
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
    optimizer: str = "muon",
) -> Run:
    """Stage two: train everything, in place, attention over the model's ``top_k`` selected keys.

    Raises ValueError for a model without indexers.
    """
    model.attention = "sparse"
    model.train()
    optimizers = [*main_optimizers(optimizer, model, rate), *adamw(model.indexer_parameters(), indexer_rate)]
    plan = [Phase("sparse", steps, joint_objective(task, size), rates=(1.0, 0.1), warmup=min(10, steps // 4))]
    run = train(model, optimizers, plan, seed=seed, work=work, resume=resume, after=balance, label=label, show=show)
    model.eval()
    return run


def run(options: argparse.Namespace) -> Path:
    """Make the folder that the command line asks for."""
    config = adopt.check(options)
    length = adopt.length_of(config, options.length)
    sizes = adopt.index_sizes(config, options, length)
    data = indexer_data.load(options.folder, config.vocab_size, options.corpus, length)
    print(data.corpus)
    model = from_pretrained(options.folder)
    if config.index_topk is None:
        model = with_indexer(model, **sizes, seed=options.seed)
    model.top_k = sizes["top_k"]
    work = run_folder.prepare(options.out, resume=options.resume, replace=options.replace)
    before = compare.measure(model, data)  # whole, so before it is sharded
    model = fsdp.shard(model)
    made = train_stages(model, data, options, work)
    return _write_folder(fsdp.gather(model), data, options, made, before)


def train_stages(model: Transformer, data: IndexerData, options: argparse.Namespace, work: Path) -> Run:
    """The stage that is asked for, or both one after the other, each with a state of its own to resume from."""
    rate = options.sparse_rate or SPARSE_RATE
    sparse_stage = (f"sparse by {options.optimizer}", partial(train_sparse, optimizer=options.optimizer), rate)
    stages: list[tuple[str, Callable[..., Run], float, int, Path]]
    if options.sparse:
        stages = [(*sparse_stage, options.steps or SPARSE_STEPS, work)]
    else:
        stages = [("warm-up", warm_up, options.rate or WARMUP_RATE, options.steps or WARMUP_STEPS, work)]
        if options.then_sparse:
            stages.append((*sparse_stage, options.then_sparse, work / "sparse"))
    common = {"size": options.batch, "seed": options.seed, "resume": options.resume}
    origin = f"from {options.folder} on {data.corpus.sha256}, {_recorded_options(model, data, options)}"
    runs = []
    for name, stage, rate, steps, place in stages:
        label = f"{name} at {rate} {origin}"
        runs.append(stage(model, data.task, steps=steps, rate=rate, work=place, label=label, **common))
    rows = [row for run in runs for row in run.rows]
    return Run(rows, sum(run.seconds for run in runs), sum(run.processor_seconds for run in runs))


def _recorded_options(model: Transformer, data: IndexerData, options: argparse.Namespace) -> dict[str, Any]:
    """What provenance says of a run."""
    sizes = {"index_heads": model.config.index_n_heads, "index_head_dim": model.config.index_head_dim}
    return {"seed": options.seed, "length": data.length, "top_k": model.top_k, **sizes, "batch": options.batch}


def _write_folder(
    model: Transformer, data: IndexerData, options: argparse.Namespace, made: Run, before: dict[str, Any]
) -> Path:
    """Write the folder with its table; the course's own model is held against its claims, too."""
    sparse = bool(options.sparse or options.then_sparse)
    is_course_model = data.needles and adopt.is_course_model(model.config, data.length)
    eval_settings = {"length": data.length, "top_k": model.top_k, "traced": "sparse" if sparse else "dense"}

    def add_comparison(whole: Path, stored: Transformer) -> dict[str, Any]:
        adopt.copy_tokenizer(options.folder, whole)
        return compare.report(stored, data, before, options.cost_at)

    return run_folder.finish(
        model,
        options.out,
        made,
        made_by=options.command,
        options=_recorded_options(model, data, options),
        corpus=data.corpus,
        claims=() if not is_course_model else SPARSE_CLAIMS if sparse else WARMED_CLAIMS,
        eval_settings=eval_settings if is_course_model else None,
        extra=add_comparison,
        dtype=adopt.stored_dtype(options.folder),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command `dsa train indexer`."""
    about = f"Train a model's indexers, new ones if it has none; with --sparse all of it. {VOCABULARY}"
    parser = adopt.options(Parser("dsa train indexer", description=about))
    parser.add_argument("--sparse", action="store_true", help="stage two, sparse training; without it the warm-up")
    run_folder.command(run, run_folder.options(parser), argv)


def adopt_main(argv: Sequence[str] | None = None) -> None:
    """The command `dsa adopt`: the warm-up, and sparse training if asked for, of a model that has no indexers yet."""
    about = f"Give a dense model lightning indexers, taught by its own attention. {VOCABULARY}"
    parser = adopt.options(Parser("dsa adopt", description=about))
    parser.set_defaults(sparse=False)

    def run_from_dense(options: argparse.Namespace) -> Path:
        if adopt.check(options).index_topk is not None:
            raise ValueError(f"{options.folder} has an indexer already: dsa train indexer goes on training it")
        return run(options)

    run_folder.command(run_from_dense, run_folder.options(parser), argv)


if __name__ == "__main__":
    main()
