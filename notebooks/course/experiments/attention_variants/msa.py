"""Blocks by a learned index: MSA, MiniMax Sparse Attention (arXiv 2606.13392).

An index branch scores every *token*, as DSA's does, and a block is worth what its best token is worth (max-pooling).
It is taught as DSA's indexer is, by its divergence from attention. So this square of the map differs from DSA in one
thing, blocks instead of tokens: reading is contiguous and the top-k is over N blocks instead of S tokens, but of the
products q . k none is saved, and of the K tokens read most are bystanders.

MiniMax-M3 has one index head for each group of its query heads, and each group chooses for itself. MLA is one group;
the indexer here is DSA's own, with its heads and its weights, so that nothing but the blocks differs.
"""

from torch import Tensor

from course.experiments.attention_variants import blocks
from course.experiments.attention_variants.selective_attention import SelectiveAttention
from dsa.kernels import ops
from dsa.model.indexer import IndexFactors


def best_token(scores: Tensor, size: int) -> Tensor:
    """The best index score in each block: (B, T, S), -inf in the future -> (B, T, N)."""
    by_block = blocks.cut(scores.transpose(1, 2), size, float("-inf"))  # (B, N, Z, T)
    return by_block.amax(2).transpose(1, 2)


class Msa(SelectiveAttention):
    """MLA over the query's own block and the past ones with the best-scored token."""

    def choose(self, q: Tensor, kv: Tensor, index: IndexFactors | None) -> Tensor:
        """Choose by the indexer, by block. Raises ValueError where there is none, or it was not asked."""
        if index is None:
            raise ValueError("this design asks the indexer: give the model one, and set attention='sparse'")
        S, size = kv.shape[1], self.budget.block
        scores = best_token(ops.index_scores(*index), size)
        return blocks.tokens_of(blocks.best(scores, self.budget.blocks, S, size), S, size)
