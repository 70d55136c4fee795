"""Measured claims of a model: how well it reads, recalls, and chooses.

Four measures, all on held-out text and generated needles that any machine can draw again from the seed:

- **bits per byte** of plain text (raw bytes, so that no tokenizer can flatter itself);
- **recall**: share of needles answered right, under each way of choosing keys. Window and random frame what the indexer
  achieves, dense and the oracle bound it;
- **needle hit rate**: is the answer's place, more than 64 back, among the K selected? Per layer, since one layer does
  the looking-up: the one whose attention finds the answers, called the induction layer here;
- **mass kept**: how much of dense attention's weight the selected keys hold, against the K best keys (the oracle).

The first two ask what the model can still do; the last two what the indexer itself got right. Text alone shows little:
bytes are local, and a window predicts them as well as an indexer does.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa.datasets.corpus import Corpus
from dsa.datasets.recall_tasks import Episodes, Needles
from dsa.kernels import ops
from dsa.model import baselines
from dsa.model.transformer import Transformer
from dsa.training.losses import bits_per_byte

SEED = 20_250_929  # of the evaluation set, apart from every training seed
FAR, HIT_FAR = 32, 64  # tokens back
BATCH = 16


@dataclass(frozen=True)
class Claim:
    """A sentence about one measure: ``path`` finds the number, which must be at least or at most ``limit``."""

    name: str
    path: str
    least: float | None = None
    most: float | None = None

    def check(self, measures: Mapping[str, Any]) -> dict[str, Any]:
        """The claim with its measured value and whether it holds."""
        value: Any = measures
        for part in self.path.split("."):
            value = value[part]
        low, high = self.least is None or value >= self.least, self.most is None or value <= self.most
        limit = {"at_least": self.least} if self.least is not None else {"at_most": self.most}
        return {"claim": self.name, "measure": self.path, "value": value, **limit, "holds": bool(low and high)}


@contextmanager
def set_to(model: Transformer, attention: str, top_k: int | None = None) -> Iterator[Transformer]:
    """The model in evaluation mode under another attention, without gradients; as before when left."""
    before = (model.attention, model.top_k, model.training)
    model.attention, model.top_k = attention, top_k or model.top_k
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.attention, model.top_k = before[:2]
        model.train(before[2])


def measure(
    model: Transformer,
    corpus: Corpus,
    *,
    length: int = 256,
    top_k: int = 16,
    traced: str = "dense",
    episodes: int = 128,
    seed: int = SEED,
) -> dict[str, Any]:
    """All measures of a model, rounded to four decimals.

    ``traced`` is the attention under which the indexer is watched: "dense" before sparse training, "sparse" after. A
    model without an indexer gets no hit rate and no mass.
    """
    eval_set = list(needle_batches(corpus, length, episodes, seed))
    has_indexer = model.config.index_topk is not None
    modes = ["dense", *(["sparse"] if has_indexer else []), "window", "random", "oracle"]
    found: dict[str, Any] = {
        "length": length,
        "top_k": top_k,
        "sequences": sum(len(batch.tokens) for batch in eval_set),
        "bits_per_byte": {},
        "recall": {mode: recall(model, eval_set, mode, top_k) for mode in modes},
    }
    for mode in ("dense", "sparse") if has_indexer else ("dense",):
        with set_to(model, mode, top_k):
            found["bits_per_byte"][mode] = text_bits(model, corpus, length, episodes, seed)
    if has_indexer:
        found["indexer"] = selection_metrics(model, eval_set, traced, top_k)
    return _rounded(found)


def needle_batches(corpus: Corpus, length: int, episodes: int, seed: int = SEED) -> Iterator[Episodes]:
    """The evaluation set: held-out text with eight needles each, all asked."""
    task = Needles(corpus, length, pairs=8, queries=8, split="held_out")
    for start in range(0, episodes, BATCH):
        yield task.generate(torch.Generator().manual_seed(seed + start), min(BATCH, episodes - start))


def text_bits(model: Transformer, corpus: Corpus, length: int, sequences: int, seed: int = SEED) -> float:
    """Bits per raw byte of held-out text, with the model as it is set."""
    totals = [0.0, 0]
    for start in range(0, sequences, BATCH):
        rng = torch.Generator().manual_seed(seed + start)
        tokens = corpus.batch(rng, min(BATCH, sequences - start), length, "held_out")
        with torch.no_grad():
            bits, count = bits_per_byte(model(tokens), tokens)
        totals = [totals[0] + bits, totals[1] + count]
    return totals[0] / totals[1]


def recall(model: Transformer, eval_set: list[Episodes], attention: str, top_k: int) -> dict[str, float]:
    """Share of needles answered right: ``all``, and ``far`` for those more than 32 back."""
    with set_to(model, attention, top_k):
        right = torch.cat([batch.correct(model(batch.tokens)) for batch in eval_set]).float()
    far = torch.cat([batch.distance for batch in eval_set]) > FAR
    return {"all": right.mean().item(), "far": right[far].mean().item()}


def selection_metrics(model: Transformer, eval_set: list[Episodes], attention: str, top_k: int) -> dict[str, Any]:
    """Hit rate and mass kept of indexer, oracle, window and random, per layer.

    ``induction_layer`` is the layer (from 0) in which dense attention gives the answers' places the most weight;
    ``hit_rate`` and ``kept`` map each chooser to a list over layers, ``of_oracle`` is the indexer's mass over the
    oracle's. Rows with at most K visible keys are left out of the mass: nothing is chosen there.
    """
    per_batch = [_batch_metrics(model, batch, attention, top_k) for batch in eval_set]
    weight, hits, kept = (  # means over batches
        {who: torch.stack([one[part][who] for one in per_batch]).mean(0) for who in per_batch[0][part]}
        for part in range(3)
    )
    layer = int(weight["mass"].argmax())
    share = kept["indexer"] / kept["oracle"]
    return {
        "attention": attention,
        "induction_layer": layer,
        "hit_rate": {chooser: rates.tolist() for chooser, rates in hits.items()},
        "hit_rate_in_induction_layer": {chooser: rates[layer].item() for chooser, rates in hits.items()},
        "kept": {chooser: shares.tolist() for chooser, shares in kept.items()},
        "of_oracle": share.tolist(),
        "of_oracle_mean": (kept["indexer"].mean() / kept["oracle"].mean()).item(),
        "of_oracle_in_induction_layer": share[layer].item(),
    }


def _batch_metrics(model: Transformer, batch: Episodes, attention: str, top_k: int) -> list[dict[str, Tensor]]:
    """One batch: weight on the answers, hit rates, mass kept; each a dict of (layers,)."""
    with set_to(model, attention, top_k):
        _, trace = model(batch.tokens, trace=True)
    rows, far = torch.arange(len(batch.tokens))[:, None], batch.distance > HIT_FAR
    weight, hits, kept = [], [], []
    for number, layer in enumerate(trace):
        chosen = choices(layer.mass, layer.scores, top_k, number)
        weight.append({"mass": layer.mass[rows, batch.query, batch.source][far].mean()})
        hits.append({who: hit(keys, batch)[far].float().mean() for who, keys in chosen.items()})
        shares = {who: baselines.attention_recall(layer.mass, keys) for who, keys in chosen.items()}
        kept.append({who: share[:, top_k:].mean() for who, share in shares.items()})  # earlier rows keep all they see
    return [{who: torch.stack([one[who] for one in layers]) for who in layers[0]} for layers in (weight, hits, kept)]


def choices(mass: Tensor, scores: Tensor, top_k: int, seed: int = 0) -> dict[str, Tensor]:
    """What each chooser would keep, for one layer's mass and index scores (B, T, S): -> (B, T, min(K, S)) each."""
    B, T, S = mass.shape
    return {
        "indexer": ops.select(scores, top_k),
        "oracle": baselines.oracle(mass, top_k),
        "window": baselines.window(B, T, S, top_k),
        "random": baselines.random(B, T, S, top_k, seed=seed),
    }


def hit(selected: Tensor, batch: Episodes) -> Tensor:
    """Whether each answer's place is among the keys its question kept: selected (B, T, K) -> (B, n) bool."""
    rows = torch.arange(len(selected))[:, None]
    return (selected[rows, batch.query] == batch.source[..., None]).any(-1)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
