"""The backend "cpu": what runs by default on a processor when no gradient is wanted.

Each operation has a file of its own here; this one goes through the sequences of a batch. Signatures are those of
`loops`, except that index keys may be `fp8.QuantizedTensor`, which are multiplied as they are.

Many short sequences, as in sampling, are the exception: one after the other they would cost mostly calls, and a batch
of them goes to `tiled`, which does all at once.
"""

import torch
from torch import Tensor

from dsa.kernels import tiled
from dsa.kernels.cpu import dense, gathered, topk
from dsa.kernels.cpu.scoring import score_one, score_tiles
from dsa.kernels.fp8 import QuantizedTensor
from dsa.kernels.loops import EMPTY

ACCEPTS_QUANTIZED_KEYS = True
BATCHED_FROM = 8  # sequences, if each has
SMALL_SCORING = 2**18  # fewer products of index heads with keys than this, or
SMALL_GATHER = 2**14  # fewer elements to gather, or
SMALL_DECODE = 2**11  # fewer keys for one query, are done together


def unsupported_reason(operation: str, *tensors: Tensor) -> str:
    """Why this backend cannot; empty if it can."""
    if any(x.device.type != "cpu" for x in tensors):
        return "its tensors must be on the CPU"
    selects = operation in ("select", "index_topk")  # which passes no gradient anyway
    if not selects and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "it keeps nothing to find a gradient from (call it under torch.no_grad())"
    if operation == "dense_attention":
        _, k, v = tensors
        if v.shape[3] > k.shape[3]:
            return "its fused kernel takes no values wider than keys"
        if not torch.backends.cuda.flash_sdp_enabled():  # the switch's name; it is the processor's too
            return "fused attention is switched off"
    return ""


def _sequence(k: Tensor | QuantizedTensor, number: int) -> Tensor | QuantizedTensor:
    """One sequence's index keys (S, W)."""
    return QuantizedTensor(*(part[number] for part in k)) if isinstance(k, QuantizedTensor) else k[number]


@torch.no_grad()
def index_topk(q: Tensor, k: Tensor | QuantizedTensor, w: Tensor, top_k: int) -> Tensor:
    """Score and choose tile by tile -> selected (B, T, min(K, S)); no score outlives its tile."""
    (B, T), S = w.shape[:2], len(k[0][0]) if isinstance(k, QuantizedTensor) else k.shape[1]
    if (T == 1 or B >= BATCHED_FROM) and w.numel() * S < B * SMALL_SCORING:
        q, k = (q.float(), k.dequantize()) if isinstance(k, QuantizedTensor) else (q, k)
        return topk.select_one(score_one(q, k, w), top_k) if T == 1 else tiled.index_topk(q, k, w, top_k)
    selected = torch.full((B, T, min(top_k, S)), EMPTY)
    for b in range(B):
        for rows, scores in score_tiles(q[b], _sequence(k, b), w[b]):
            chosen = topk.select_rows(scores, top_k)
            selected[b, rows, : chosen.shape[1]] = chosen
    return selected


def index_scores(q: Tensor, k: Tensor | QuantizedTensor, w: Tensor) -> Tensor:
    """The whole matrix I (B, T, S), to look at."""
    (B, T), S = w.shape[:2], len(k[0][0]) if isinstance(k, QuantizedTensor) else k.shape[1]
    whole = torch.full((B, T, S), float("-inf"), dtype=torch.promote_types(w.dtype, torch.float32))
    for b in range(B):
        for rows, scores in score_tiles(q[b], _sequence(k, b), w[b]):
            whole[b, rows, : scores.shape[1]] = scores
    return whole


@torch.no_grad()
def select(scores: Tensor, top_k: int) -> Tensor:
    """Choose from a score matrix (B, T, S) -> (B, T, min(K, S))."""
    return topk.select_rows(scores.flatten(0, 1), top_k).unflatten(0, scores.shape[:2])


def sparse_attention(q: Tensor, kv: Tensor, selected: Tensor, scale: float, value_width: int) -> Tensor:
    """Attend to the selected tokens (report Eq. 2): -> (B, T, H, C)."""
    if len(q) == q.shape[1] == 1:
        one = gathered.attend_one(q.view(q.shape[2:]), kv[0], selected.view(-1), scale, value_width)
        return one.view(1, 1, *one.shape)
    if len(q) >= BATCHED_FROM and selected[0].numel() * kv.shape[2] < SMALL_GATHER:
        return tiled.sparse_attention(q, kv, selected, scale, value_width)
    out = kv.new_empty(*q.shape[:3], value_width)
    for b in range(len(q)):
        gathered.attend(q[b], kv[b], selected[b], scale, out[b])
    return out


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend to every visible token: -> (B, T, H, V)."""
    if q.shape[1] == 1 and k.shape[2] == 1:  # decode, MQA mode: H queries that all see all keys
        if len(q) >= BATCHED_FROM and k.shape[1] < SMALL_DECODE:
            return tiled.dense_attention(q, k, v, scale)
        one = [dense.decode(q[b, 0], k[b, :, 0], v[b, :, 0], scale) for b in range(len(q))]
        return torch.stack(one)[:, None].to(q.dtype)
    return dense.prefill(q, k, v, scale)
