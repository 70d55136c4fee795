"""What if the sparse stage were done otherwise? Three ablations, small ones: they show a direction, not a size.

- ``scratch``: no dense model, no warm-up; sparse attention from the first step, indexers and model learning together,
  against a dense model from the same weights. The indexer is to imitate an attention that knows nothing yet, and
  attention can only learn from what the indexer shows it.
- ``detach``: the sparse stage with the indexer's input attached, so that its loss also moves the main model.
- ``longer``: a model read at twice the length it was trained for, before and after some sparse training there.

    python -m course.experiments.ablations data/warmed --out data/measurements/sparse_ablations.json
"""

from collections.abc import Sequence
from typing import Any

from course.experiments import experiment
from course.experiments.activation import indexers
from dsa.datasets.corpus import Corpus
from dsa.datasets.recall_tasks import Copy
from dsa.model.transformer import Transformer
from dsa.training import evaluate, pretrain
from dsa.training.indexer import TOP_K, WARMUP_RATE, joint_objective, train_sparse, with_indexer
from dsa.training.optimizers import adamw, main_optimizers
from dsa.training.pretrain import COPY_BATCH, COPY_CAP, COPY_LENGTH, RATE, MixedNeedles, balance
from dsa.training.trainer import Phase, train, until

SEEDS = (0, 1)
STEPS, BATCH, LENGTH, SEQUENCES = 60, 4, 256, 32
SCRATCH_LENGTH, SCRATCH_BATCH, LONGER, EVERY = 128, 16, 1024, 10
Row = dict[str, Any]


def attach_indexer_loss(model: Transformer) -> Transformer:
    """Let the loss of every indexer of this model flow on into the model; returns the same model."""
    for indexer in indexers(model):
        indexer.detached = False
    return model


def clone_model(model: Transformer, length: int | None = None) -> Transformer:
    """A model of its own with equal weights, for texts of up to ``length`` tokens (None: as before).

    Nothing in the weights depends on the length; that it *may* read further does not mean that it has learned to.
    """
    config = model.config.replace(max_position_embeddings=length or model.config.max_position_embeddings)
    made = Transformer(config)
    made.load_state_dict(model.state_dict())
    made.attention, made.top_k = model.attention, model.top_k
    return made.eval()


def evaluate_model(model: Transformer, corpus: Corpus, attention: str, length: int, top_k: int = TOP_K) -> Row:
    """Bits per byte, recall, and recall of what is over 32 back."""
    eval_set = list(evaluate.needle_batches(corpus, length, SEQUENCES))
    with evaluate.set_to(model, attention, top_k):
        bits = evaluate.text_bits(model, corpus, length, SEQUENCES)
    right = evaluate.recall(model, eval_set, attention, top_k)
    return {"bits": round(bits, 4), "recall": round(right["all"], 4), "recall_far": round(right["far"], 4)}


def from_scratch(corpus: Corpus, kind: str, seed: int, steps: int, cap: int = COPY_CAP) -> Row:
    """Copy until it works, then ``steps`` with needles; ``kind`` is "dense" or "sparse".

    Returns ``copy_steps``, how many the copying took, and ``copy`` and ``recall``, the means of every ten steps.
    """
    model = Transformer(pretrain.dense_config())
    model.reset_parameters(seed)
    objective, extra = pretrain.lm_objective, []
    if kind == "sparse":
        model, objective = with_indexer(model, seed=seed), joint_objective
        # top-k passes no gradient: indexers learn from a loss of their own, at a rate of their own
        model.attention, extra = "sparse", adamw(model.indexer_parameters(), WARMUP_RATE)
    plan = [
        Phase("copy", cap, objective(Copy(COPY_LENGTH), COPY_BATCH), warmup=20, done=until("copy", 0.95)),
        Phase("needles", steps, objective(MixedNeedles(corpus, SCRATCH_LENGTH), SCRATCH_BATCH), (1.0, 0.7)),
    ]
    run = train(
        model.train(), [*main_optimizers("muon", model, RATE), *extra], plan, seed=seed, after=balance, show=False
    )
    curves = {name: [row[name] for row in run.rows if name in row] for name in ("copy", "recall")}
    thinned = {}
    for name, curve in curves.items():
        parts = (curve[n : n + EVERY] for n in range(0, len(curve), EVERY))
        thinned[name] = [round(sum(part) / len(part), 3) for part in parts]
    return {"copy_steps": len(curves["copy"])} | thinned


def detached_or_not(model: Transformer, corpus: Corpus, kind: str, seed: int, steps: int) -> Row:
    """The sparse stage with the indexer's input ``kind``: "detached" or "attached"."""
    trained = clone_model(model)
    if kind == "attached":
        attach_indexer_loss(trained)
    run = train_sparse(trained, MixedNeedles(corpus, LENGTH), steps=steps, size=BATCH, seed=seed, show=False)
    kl = sum(row["kl"] for row in run.rows[-10:]) / len(run.rows[-10:])
    return evaluate_model(trained, corpus, "sparse", LENGTH) | {
        "kl": round(kl, 4),
        "dense": evaluate_model(trained, corpus, "dense", LENGTH),
    }


def longer(model: Transformer, corpus: Corpus, seed: int, steps: int, length: int = LONGER) -> Row:
    """Twice the length: what dense and sparse can do there as they are, and sparse after some training there."""
    trained = clone_model(model, length)
    before = {kind: evaluate_model(trained, corpus, kind, length) for kind in ("dense", "sparse")}
    train_sparse(trained, MixedNeedles(corpus, length), steps=steps, size=BATCH, seed=seed, show=False)
    return {"length": length, "before": before, "after": evaluate_model(trained, corpus, "sparse", length)}


def sweep(model: Transformer, corpus: Corpus, *, seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> list[Row]:
    """All three; the two longer ones with the first seed alone."""
    runs: list[Row] = []

    def keep(ablation: str, kind: str, seed: int, found: Row) -> None:
        runs.append({"ablation": ablation, "kind": kind, "seed": seed, **found})
        print(runs[-1], flush=True)

    for seed in seeds:
        for kind in ("detached", "attached"):
            keep("detach", kind, seed, detached_or_not(model, corpus, kind, seed, steps))
    keep("longer", "sparse", seeds[0], longer(model, corpus, seeds[0], steps // 2))
    for kind in ("dense", "sparse"):
        keep("scratch", kind, seeds[0], from_scratch(corpus, kind, seeds[0], steps))
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``python -m course.experiments.ablations``."""
    plan = {"batch": BATCH, "length": LENGTH, "top_k": TOP_K}
    what = "Do the sparse stage otherwise."
    experiment.record("course.experiments.ablations", what, sweep, seeds=SEEDS, steps=STEPS, plan=plan, argv=argv)


if __name__ == "__main__":
    main()
