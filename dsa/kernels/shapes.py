"""The operations on "meta" tensors, which have shapes and no numbers: the result's shape at once, whatever the sizes.

So a model of 671 B parameters can be laid out on a laptop, and every shape of a pass checked, before anything is
computed. Signatures are those of `loops`.
"""

import torch
from torch import Tensor

from dsa.kernels.reference import at_least_fp32


def unsupported_reason(operation: str, *tensors: Tensor) -> str:
    """Only tensors without numbers."""
    return (
        "" if all(x.is_meta for x in tensors) else "it returns shapes without numbers, and these tensors have numbers"
    )


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """I: (B, T, S)."""
    return at_least_fp32(w).new_empty(*q.shape[:2], k.shape[1])


def select(scores: Tensor, top_k: int) -> Tensor:
    """Selected: (B, T, min(K, S))."""
    return scores.new_empty(*scores.shape[:2], min(top_k, scores.shape[2]), dtype=torch.long)


def index_topk(q: Tensor, k: Tensor, w: Tensor, top_k: int) -> Tensor:
    """Selected: (B, T, min(K, S))."""
    return select(index_scores(q, k, w), top_k)


def sparse_attention(q: Tensor, kv: Tensor, selected: Tensor, scale: float, value_width: int) -> Tensor:
    """Attended latents: (B, T, H, C)."""
    return q.new_empty(*q.shape[:3], value_width)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attended values: (B, T, H, V)."""
    return v.new_empty(*q.shape[:3], v.shape[3])


def attention_mass(q: Tensor, k: Tensor, scale: float, selected: Tensor | None = None) -> Tensor:
    """Mass: (B, T, S) or (B, T, K)."""
    return at_least_fp32(q).new_empty(*q.shape[:2], k.shape[1] if selected is None else selected.shape[2])


def indexer_loss(
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    q: Tensor,
    k: Tensor,
    scale: float,
    selected: Tensor | None = None,
) -> Tensor:
    """A scalar."""
    return at_least_fp32(index_q).new_empty(())
