"""Blocks by their mean key: MoBA, mixture of block attention (arXiv 2502.13189).

A block's proxy is the mean of its keys, and the gate has no parameters at all: q . mean(k). Attention becomes a router
with blocks for experts. Cheap, N = S / Z products a query instead of S, and trained like any other model. What it
cannot see is a single good key among Z: its share of the mean is 1 / Z.

MoBA chooses per head; here one choice serves all (see `selective_attention`).
"""

import torch
from torch import Tensor

from course.experiments.attention_variants import blocks
from course.experiments.attention_variants.selective_attention import SelectiveAttention
from dsa.model.indexer import IndexFactors


def mean_logits(q: Tensor, kv: Tensor, size: int, scale: float) -> Tensor:
    """Compare each head's query with each block's mean key: (B, T, H, W), (B, S, W) -> (B, T, H, N).

    The last block's mean is wrong unless it is full, and is never asked for: no query has it in its past.
    """
    return scale * torch.einsum("bthw,bnw->bthn", q, blocks.cut(kv, size).mean(2))


class Moba(SelectiveAttention):
    """MLA over the query's own block and the past ones of best mean."""

    def choose(self, q: Tensor, kv: Tensor, index: IndexFactors | None) -> Tensor:
        """Choose by q . mean(k)."""
        S, size = kv.shape[1], self.budget.block
        scores = blocks.shared(mean_logits(q, kv, size, self.scale), S, size)
        return blocks.tokens_of(blocks.best(scores, self.budget.blocks, S, size), S, size)
