"""Attention over selected tokens (report Eq. 2): gather them, attend, forget them, a few queries at a time.

A query's K tokens are copied together into one small buffer, and its H heads become the rows of two matrix products:
all heads share the keys, so each gathered token is used 2 H times. The buffer must stay in the processor's cache
between copying and multiplying. With K = 2048 tokens of 576 numbers that is one query at a time, with 64 of 160 it is
thirty.
"""

import torch
from torch import Tensor

from dsa.kernels.cpu.scoring import compute_dtype
from dsa.kernels.loops import EMPTY

GATHER_ELEMENTS = 2**18  # elements of the buffer that tokens are gathered into: 1 MB in fp32


def attend(q: Tensor, kv: Tensor, selected: Tensor, scale: float, out: Tensor) -> None:
    """Attend in one sequence: q (T, H, C + R), kv (S, C + R), selected (T, K), result into out (T, H, C)."""
    (T, H, D), K, C = q.shape, selected.shape[1], out.shape[2]
    size = max(1, min(T, GATHER_ELEMENTS // (K * D)))  # queries at once
    dtype = compute_dtype(kv.dtype)
    q, gathered = q.to(dtype), kv.new_empty(size * K, D)
    upcast = gathered if dtype == kv.dtype else torch.empty_like(gathered, dtype=dtype)
    buffer = q.new_empty(size, H, K)
    for begin in range(0, T, size):
        rows = slice(begin, min(begin + size, T))
        n, slots = rows.stop - begin, selected[rows]
        torch.index_select(kv, 0, slots.clamp(min=0).flatten(), out=gathered[: n * K])  # empty slots gather token 0
        if upcast is not gathered:
            upcast[: n * K].copy_(gathered[: n * K])
        keys, logits = upcast[: n * K].view(n, K, D), buffer[:n]
        torch.baddbmm(logits, q[rows], keys.mT, beta=0, alpha=scale, out=logits)  # scale * q . k: (n, H, K)
        empty = slots == EMPTY
        if empty.any():
            logits.masked_fill_(empty[:, None], float("-inf"))
        weights = torch.softmax(logits, -1, out=logits)  # in place; inside, torch computes in fp32 at least
        out[rows] = torch.bmm(weights, keys[..., :C])  # Eq. 2


def attend_one(q: Tensor, kv: Tensor, selected: Tensor, scale: float, value_width: int) -> Tensor:
    """One query, as in decoding, without a buffer: q (H, C + R), kv (S, C + R), selected (K,) -> (H, C)."""
    if selected.min().item() < 0:
        selected = selected[selected != EMPTY]
    dtype = compute_dtype(kv.dtype)
    keys = kv.index_select(0, selected).to(dtype)  # (K, C + R)
    weights = torch.mm(q.to(dtype), keys.t()).mul_(scale).softmax(-1)
    return torch.mm(weights, keys[:, :value_width]).to(q.dtype)  # Eq. 2
