"""Attention over selected tokens (report Eq. 2): fetch them, attend, forget them, a few queries at a time.

A query's K tokens are copied together into one small buffer, and its H heads become the rows of two matrix products:
all heads share the keys, so each fetched token is used 2 H times. The buffer must stay in the processor's cache
between copying and multiplying. With K = 2048 tokens of 576 numbers that is one query at a time, with 64 of 160 it is
thirty.
"""

import torch
from torch import Tensor

from dsa.kernels.cpu.scoring import operand
from dsa.kernels.loops import EMPTY

FETCHED = 2**18  # numbers fetched at once


def attend(q: Tensor, kv: Tensor, selected: Tensor, scale: float, out: Tensor) -> None:
    """Attend in one sequence: q (T, H, C + R), kv (S, C + R), selected (T, K), result into out (T, H, C)."""
    (T, H, D), K, C = q.shape, selected.shape[1], out.shape[2]
    size = max(1, min(T, FETCHED // (K * D)))
    numbers = operand(kv.dtype)
    q, fetched = q.to(numbers), kv.new_empty(size * K, D)
    wide = fetched if numbers == kv.dtype else torch.empty_like(fetched, dtype=numbers)
    logits = q.new_empty(size, H, K)
    for begin in range(0, T, size):
        rows = slice(begin, min(begin + size, T))
        n, chosen = rows.stop - begin, selected[rows]
        torch.index_select(kv, 0, chosen.clamp(min=0).flatten(), out=fetched[: n * K])
        if wide is not fetched:
            wide[: n * K].copy_(fetched[: n * K])
        keys = wide[: n * K].view(n, K, D)
        weights = softmax(multiply(q[rows], keys.mT, scale, logits[:n]), chosen == EMPTY)
        out[rows] = torch.bmm(weights, keys[..., :C])  # Eq. 2


def attend_one(q: Tensor, kv: Tensor, selected: Tensor, scale: float, value_width: int) -> Tensor:
    """One query, as in decoding, without a buffer: q (H, C + R), kv (S, C + R), selected (K,) -> (H, C)."""
    if selected.min().item() < 0:
        selected = selected[selected != EMPTY]
    numbers = operand(kv.dtype)
    keys = kv.index_select(0, selected).to(numbers)  # (K, C + R)
    weights = torch.mm(q.to(numbers), keys.t()).mul_(scale).softmax(-1)
    return torch.mm(weights, keys[:, :value_width]).to(q.dtype)  # Eq. 2


def multiply(q: Tensor, keys: Tensor, scale: float, out: Tensor) -> Tensor:
    """Scaled products q . k: (n, H, D), (n, D, K) -> out (n, H, K)."""
    return torch.baddbmm(out, q, keys, beta=0, alpha=scale, out=out)


def softmax(logits: Tensor, empty: Tensor) -> Tensor:
    """Softmax over the filled slots, in place, inside in fp32 at least: (n, H, K), empty (n, K) -> (n, H, K)."""
    if empty.any():
        logits.masked_fill_(empty[:, None], float("-inf"))
    return torch.softmax(logits, -1, out=logits)
