"""Index scores (report Eq. 1), a tile of queries at a time, in buffers that are made once.

For J index heads there are J products for each score. They are made for ROWS heads of queries and some thousand keys
at a time, in one buffer that stays in the processor's cache: multiplied into it, cut off at zero in place, summed over
the heads out of it, and overwritten by the next. A fresh tensor each time would cost several times as much as the
arithmetic, because the operating system clears every page of it first.

Keys in eight bits are multiplied as they are, where the machine does that fast: the products are whole numbers and
exact, and both scales come after the ReLU (`fp8.index_scores`). So do keys in bf16, with products rounded to bf16.
Anything else is widened tile by tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dsa.kernels.cpu.matmul_speed import is_fast, matmul_for
from dsa.kernels.fp8 import QuantizedTensor
from dsa.kernels.reference import at_least_fp32, causal_mask
from dsa.kernels.tiled import tiles

MAX_ROWS = 512  # rows of a product, one for each head of each query
MAX_QUERIES = 64  # queries scored at once: a row of scores for each has to stay in cache until it is chosen from
BUFFER_ELEMENTS = 2**19  # per-head scores held at once: 2 MB in fp32
MAX_KEYS = 8192  # keys multiplied at once


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype vectors of `dtype` are multiplied here."""
    if dtype == torch.float64 or (dtype in (torch.int8, torch.bfloat16) and is_fast(dtype)):
        return dtype
    return torch.float32


def query_tile(T: int, J: int) -> int:
    """How many of T queries are scored at once."""
    return min(T, MAX_QUERIES, max(1, MAX_ROWS // J))


class PerHeadScores:
    """ReLU(q . k) of some queries and some keys, each time in the same memory.

    Args:
        q: index queries, one head a row (T * J, W).
        k: index keys (S, W).
        rows: most rows of q at once.
        keys: most keys at once.
    """

    def __init__(self, q: Tensor, k: Tensor, rows: int, keys: int):
        self.dtype = compute_dtype(k.dtype)
        self.matmul = matmul_for(self.dtype)
        accumulated = {torch.int8: torch.int32}.get(self.dtype, self.dtype)  # what a product of it comes in
        self.q, self.k = q.to(self.dtype), k
        self.raw = torch.empty(rows * keys, dtype=accumulated)
        self.upcast = torch.empty(rows * keys) if accumulated in (torch.int32, torch.bfloat16) else self.raw
        self.k_cast = torch.empty(0 if k.dtype == self.dtype else keys, k.shape[1], dtype=self.dtype)

    def __call__(self, rows: slice, keys: slice) -> Tensor:
        """The products of these rows and keys: (rows, keys), in fp32 or fp64."""
        q, k = self.q[rows], self.k[keys]
        if k.dtype != self.dtype:
            k = self.k_cast[: len(k)].copy_(k)
        shape, size = (len(q), len(k)), len(q) * len(k)
        raw = self.matmul(q, k.t(), out=self.raw[:size].view(shape))
        upcast = self.upcast[:size].view(shape)
        return (upcast if upcast.dtype == raw.dtype else upcast.copy_(raw)).relu_()


def score_one(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Score one query a sequence against few keys, without a buffer: q (B, 1, J, W), k (B, S, W), w (B, 1, J).

    A decoded token sees every key, so nothing is masked. -> (B, S), in fp32 or fp64.
    """
    q, k, w = at_least_fp32(q), at_least_fp32(k), at_least_fp32(w)
    return torch.bmm(w, torch.bmm(q[:, 0], k.mT).relu_())[:, 0]  # Eq. 1


def score_tiles(q: Tensor, k: Tensor | QuantizedTensor, w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Score one sequence: q (T, J, W), k (S, W), w (T, J).

    Yields:
        A tile of t queries, and their scores against the keys up to the last one's own (t, seen), -inf in the future:
        a view of a buffer, to be used before the next is asked for.
    """
    (T, J, _), k_values = q.shape, k.codes if isinstance(k, QuantizedTensor) else k
    S = len(k_values)
    size = query_tile(T, J)
    key_tile = min(S, MAX_KEYS, max(1, BUFFER_ELEMENTS // (size * J)))
    per_head_scores = PerHeadScores(q.flatten(0, 1), k_values, size * J, key_tile)
    w = w.to(per_head_scores.upcast.dtype)
    scores, summed = w.new_empty(size, S), w.new_empty(size * key_tile)
    for rows, seen in tiles(T, S, size):
        t = rows.stop - rows.start
        for begin in range(0, seen, key_tile):
            keys = slice(begin, min(begin + key_tile, seen))
            per_head = per_head_scores(slice(rows.start * J, rows.stop * J), keys).unflatten(0, (t, J))  # (t, J, keys)
            out = summed[: t * per_head.shape[2]].view(t, 1, -1)  # contiguous, as bmm writes it
            scores[:t, keys] = torch.bmm(w[rows, None], per_head, out=out)[:, 0]  # Eq. 1
        tile = scores[:t, :seen]
        if isinstance(k, QuantizedTensor):
            tile.mul_(k.scale[:seen].t())
        tile[:, seen - t :].masked_fill_(~causal_mask(t, t), float("-inf"))
        yield rows, tile
