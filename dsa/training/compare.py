"""Before and after: what a model loses and what it saves by selecting, in one table.

*Before* is the model as it was given (one without an indexer gets an untrained one, so that the effect of training is
seen and not only of selecting); *after* is the new model as stored. Losses, recall and the attention mass that is kept
are **measured** on held-out text, beside the choices that frame them: oracle, window and random. Cost is **counted**
from the sizes (:mod:`dsa.analysis.flops`), dense before and sparse after: FLOP, no seconds. At short lengths sparse
attention costs more, and the table says so, with the length from which on it costs less.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa.analysis import flops
from dsa.model import baselines
from dsa.model.config import Config
from dsa.model.transformer import TRACE_LIMIT, Transformer
from dsa.training import evaluate
from dsa.training.indexer_data import IndexerData

SEQUENCES, BATCH = 32, 8
MODES = {"dense": "dense attention", "sparse": "keys by the indexer", "oracle": "oracle", "window": "window",
         "random": "random"}  # fmt: skip
Row = dict[str, Any]


def measure(model: Transformer, data: IndexerData, sequences: int = SEQUENCES) -> dict[str, Any]:
    """Loss and recall under every way to choose, and per layer the share of attention mass that each keeps.

    A model without an indexer is measured under the other ways, and there is no mass: nothing was to be kept.
    """
    has_indexer = model.config.index_topk is not None
    modes = [mode for mode in MODES if has_indexer or mode != "sparse"]
    found: dict[str, Any] = {"loss": {mode: loss(model, data, mode, sequences) for mode in modes}}
    if data.needles:
        eval_set = list(evaluate.needle_batches(data.corpus, data.length, sequences))
        found["recall"] = {mode: evaluate.recall(model, eval_set, mode, model.top_k)["all"] for mode in modes}
    kept = attention_recall(model, data, sequences) if has_indexer else {}
    return found | {"kept": kept} if kept else found


def loss(model: Transformer, data: IndexerData, attention: str, sequences: int) -> float:
    """Bits per byte where ids are bytes, else nats per token, of held-out text under one kind of attention."""
    with evaluate.set_to(model, attention):
        if data.in_bytes:
            return evaluate.text_bits(model, data.corpus, data.length, sequences)
        nats = 0.0
        for tokens in _held_out(data, sequences, BATCH):
            mean = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            nats += mean.item() * len(tokens)  # the last batch may be smaller
    return nats / sequences


def _held_out(data: IndexerData, sequences: int, batch: int):
    """The same held-out windows whenever it is asked."""
    for start in range(0, sequences, batch):
        rng = torch.Generator().manual_seed(evaluate.SEED + start)
        yield data.corpus.batch(rng, min(batch, sequences - start), data.length, "held_out")


def attention_recall(model: Transformer, data: IndexerData, sequences: int) -> dict[str, list[float]]:
    """Per layer, the share of dense attention's mass in the keys of indexer, oracle, window and random.

    Rows with at most K visible keys are left out. A trace is large, so of a long sequence of a deep model only the
    beginning is looked at; nothing is returned where that holds no more than K tokens.
    """
    length = min(data.length, math.isqrt(TRACE_LIMIT // (16 * model.config.num_hidden_layers)))
    if length <= model.top_k:
        return {}
    with evaluate.set_to(model, "dense"):
        found = [_kept(model, tokens[:, :length]) for tokens in _held_out(data, sequences, 1)]
    return {who: torch.stack([one[who] for one in found]).mean(0).tolist() for who in found[0]}


def _kept(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """One sequence: each chooser's share of the mass (layers,)."""
    _, trace = model(tokens, trace=True)
    layers = []
    for number, layer in enumerate(trace):
        chosen = evaluate.choices(layer.mass, layer.scores, model.top_k, number)
        rows = slice(model.top_k, None)
        layers.append(
            {who: baselines.attention_recall(layer.mass, keys)[:, rows].mean() for who, keys in chosen.items()}
        )
    return {who: torch.stack([one[who] for one in layers]) for who in layers[0]}


def cost(config: Config, lengths: Sequence[int]) -> list[Row]:
    """Counted FLOP per token, dense before and sparse after, reading a prompt and writing at its end."""
    rows = []
    for length in sorted(set(lengths)):
        read, write = f"FLOP per token, reading {length:,} tokens", f"FLOP per token, writing with {length:,} visible"
        dense, sparse = (flops.prompt_flops(config, length, kind).total / length for kind in flops.ATTENTIONS)
        rows.append(_row(read, dense, sparse, "counted"))
        dense, sparse = (flops.token_flops(config, length, kind, "decode").total for kind in flops.ATTENTIONS)
        rows.append(_row(write, dense, sparse, "counted"))
    for phase, what in (("prefill", "reading"), ("decode", "writing")):
        least = flops.crossover(config, phase)
        found = "never" if math.isinf(least) else math.ceil(least)
        rows.append(_row(f"visible keys from which sparse costs less, {what}", None, found, "counted"))
    return rows


def report(model: Transformer, data: IndexerData, before: Row, lengths: Sequence[int] | None = None) -> Row:
    """Measure a finished model, print the table, and return what provenance keeps of it.

    ``before`` is what :func:`measure` said at first; cost is counted at ``lengths``, by default as trained, as far as
    the model reads, and at 128K.
    """
    after = measure(model, data)
    lengths = lengths or (data.length, model.config.max_position_embeddings, 2**17)
    rows = table(before, after, cost(model.config, lengths), data)
    print(format_table(rows))
    return {"comparison": {"table": rows, "before": before, "after": after}}


def table(before: dict[str, Any], after: dict[str, Any], costs: list[Row], data: IndexerData) -> list[Row]:
    """One row a measure: its name, before, after, and whether it was measured or counted."""
    first = summary(before, data)
    return [_row(name, first[name], value, "measured") for name, value in summary(after, data).items()] + costs


def summary(found: dict[str, Any], data: IndexerData) -> dict[str, float]:
    """What :func:`measure` found, one number a measure by its name in words; mass is the mean over layers."""
    unit = "bits per byte" if data.in_bytes else "nats per token"
    numbers = {f"loss, {MODES[mode]} ({unit})": value for mode, value in found["loss"].items()}
    numbers |= {f"recall, {MODES[mode]}": value for mode, value in found.get("recall", {}).items()}
    kept = {f"attention mass kept, {who}": sum(each) / len(each) for who, each in found.get("kept", {}).items()}
    return {name: round(value, 4) for name, value in (numbers | kept).items()}


def _row(measure: str, before: float | None, after: float | str | None, kind: str) -> Row:
    return {"measure": measure, "before": before, "after": after, "kind": kind}


def format_table(rows: list[Row]) -> str:
    """The table as text."""
    widest = max(len(row["measure"]) for row in rows)
    head = f"{'':{widest}}  {'before':>11}  {'after':>11}"
    body = [
        f"{r['measure']:{widest}}  {_format_number(r['before']):>11}  {_format_number(r['after']):>11}  {r['kind']}"
        for r in rows
    ]
    return "\n".join([head, *body])


def _format_number(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.4g}"
    return f"{value:.4f}"
