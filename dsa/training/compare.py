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
from dsa.training.indexer_data import Reading

SEQUENCES, BATCH = 32, 8
MODES = {"dense": "dense attention", "sparse": "keys by the indexer", "oracle": "oracle", "window": "window",
         "random": "random"}  # fmt: skip
Row = dict[str, Any]


def measured(model: Transformer, reading: Reading, sequences: int = SEQUENCES) -> dict[str, Any]:
    """Loss and recall under every way to choose, and per layer the share of attention mass that each keeps."""
    found: dict[str, Any] = {"loss": {mode: loss(model, reading, mode, sequences) for mode in MODES}}
    if reading.needles:
        exam = list(evaluate.needle_batches(reading.corpus, reading.length, sequences))
        found["recall"] = {mode: evaluate.recall(model, exam, mode, model.top_k)["all"] for mode in MODES}
    kept = attention_recall(model, reading, sequences)
    if kept:
        found["kept"] = kept
    return found


def loss(model: Transformer, reading: Reading, attention: str, sequences: int) -> float:
    """Bits per byte where ids are bytes, else nats per token, of held-out text under one kind of attention."""
    with evaluate.set_to(model, attention):
        if reading.in_bytes:
            return evaluate.text_bits(model, reading.corpus, reading.length, sequences)
        batches = list(_held_out(reading, sequences, BATCH))
        nats = [_nats(model(tokens), tokens) * len(tokens) for tokens in batches]
    return sum(nats) / sequences


def _nats(logits: Tensor, tokens: Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def _held_out(reading: Reading, sequences: int, batch: int):
    """The same held-out windows whenever it is asked."""
    for start in range(0, sequences, batch):
        chance = torch.Generator().manual_seed(evaluate.SEED + start)
        yield reading.corpus.batch(chance, min(batch, sequences - start), reading.length, "held_out")


def attention_recall(model: Transformer, reading: Reading, sequences: int) -> dict[str, list[float]]:
    """Per layer, the share of dense attention's mass in the keys of indexer, oracle, window and random.

    Rows with at most K visible keys are left out. A trace is large, so of a long sequence of a deep model only the
    beginning is looked at; nothing is returned where that holds no more than K tokens.
    """
    length = min(reading.length, math.isqrt(TRACE_LIMIT // (16 * model.config.num_hidden_layers)))
    if length <= model.top_k:
        return {}
    with evaluate.set_to(model, "dense"):
        found = [_kept(model, tokens[:, :length]) for tokens in _held_out(reading, sequences, 1)]
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
        dense, sparse = (flops.prompt_work(config, length, kind).total / length for kind in flops.KINDS)
        rows.append(_row(read, dense, sparse, "counted"))
        dense, sparse = (flops.token_work(config, length, kind, "decode").total for kind in flops.KINDS)
        rows.append(_row(write, dense, sparse, "counted"))
    for phase, what in (("prefill", "reading"), ("decode", "writing")):
        least = flops.crossover(config, phase)
        found = "never" if math.isinf(least) else math.ceil(least)
        rows.append(_row(f"visible keys from which sparse costs less, {what}", None, found, "counted"))
    return rows


def report(model: Transformer, reading: Reading, before: Row, lengths: Sequence[int] | None = None) -> Row:
    """Measure a finished model, print the table, and return what provenance keeps of it.

    ``before`` is what :func:`measured` said at first; cost is counted at ``lengths``, by default as trained, as far as
    the model reads, and at 128K.
    """
    after = measured(model, reading)
    lengths = lengths or (reading.length, model.config.max_position_embeddings, 2**17)
    rows = table(before, after, cost(model.config, lengths), reading)
    print(lines(rows))
    return {"comparison": {"table": rows, "before": before, "after": after}}


def table(before: dict[str, Any], after: dict[str, Any], costs: list[Row], reading: Reading) -> list[Row]:
    """One row a measure: its name, before, after, and whether it was measured or counted."""
    unit = "bits per byte" if reading.in_bytes else "nats per token"
    names = [(f"loss, {words} ({unit})", "loss", mode) for mode, words in MODES.items()]
    names += [(f"recall, {words}", "recall", mode) for mode, words in MODES.items() if "recall" in after]
    names += [(f"attention mass kept, {who}", "kept", who) for who in after.get("kept", {})]
    rows = [_row(name, _mean(before[part][key]), _mean(after[part][key]), "measured") for name, part, key in names]
    return rows + costs


def _row(measure: str, before: float | None, after: float | str | None, kind: str) -> Row:
    return {"measure": measure, "before": before, "after": after, "kind": kind}


def _mean(value: float | list[float]) -> float:
    return round(sum(value) / len(value) if isinstance(value, list) else value, 4)


def lines(rows: list[Row]) -> str:
    """The table as text."""
    widest = max(len(row["measure"]) for row in rows)
    head = f"{'':{widest}}  {'before':>11}  {'after':>11}"
    body = [f"{r['measure']:{widest}}  {_cell(r['before']):>11}  {_cell(r['after']):>11}  {r['kind']}" for r in rows]
    return "\n".join([head, *body])


def _cell(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.4g}"
    return f"{value:.4f}"
