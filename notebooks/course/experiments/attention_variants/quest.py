"""Blocks by a bound: Quest (arXiv 2406.10774).

For each block keep the least and the greatest value of every component of its keys. Then no key of the block can have
a product with q above sum_i max(q_i least_i, q_i greatest_i). A block whose bound is low can be left out without risk;
one whose bound is high may disappoint. A mean forgets an outlier and a bound never does, for twice the memory and
twice the products. Made for models that are trained already: there is nothing to learn.

Quest chooses per head and in decoding only; here one choice serves all heads, at every position.
"""

import torch
from torch import Tensor

from course.experiments.attention_variants import blocks
from course.experiments.attention_variants.selective_attention import SelectiveAttention
from dsa.model.indexer import IndexFactors


def bounds(q: Tensor, kv: Tensor, size: int, scale: float) -> Tensor:
    """The most that any key of a block could score, by head: (B, T, H, W), (B, S, W) -> (B, T, H, N).

    max(q_i a_i, q_i b_i) with a_i <= b_i takes b_i where q_i is positive and a_i where it is negative: two products.
    """
    # what fills the last block up must not become its least or greatest value
    least = blocks.cut(kv, size, float("inf")).amin(2)  # (B, N, W)
    greatest = blocks.cut(kv, size, float("-inf")).amax(2)
    above = torch.einsum("bthw,bnw->bthn", q.clamp(min=0), greatest)
    return scale * (above + torch.einsum("bthw,bnw->bthn", q.clamp(max=0), least))


class Quest(SelectiveAttention):
    """MLA over the query's own block and the past ones of highest bound."""

    def choose(self, q: Tensor, kv: Tensor, index: IndexFactors | None) -> Tensor:
        """Choose by the bound."""
        S, size = kv.shape[1], self.budget.block
        scores = blocks.shared(bounds(q, kv, size, self.scale), S, size)
        return blocks.tokens_of(blocks.best(scores, self.budget.blocks, S, size), S, size)
