"""The lightning indexer: a second, much cheaper attention whose only product is a ranking (report Eq. 1).

For a query token t and each earlier token s it computes I[t, s] = sum_j w[t, j] * ReLU(q[t, j] . k[s]), over J small
heads with one shared key, and the main attention then looks at the K best s only. It has a rotary convention
(half-split) and a layout ([rope | nope]) of its own, and its key is normalised by a LayerNorm with bias where all else
uses RMSNorm.

Its inputs are **detached**. Selection passes no gradient anyway, and the loss that does teach the indexer (its
divergence from the attention, Eq. 3 and 4) must change the indexer alone: the main model is not to become easier to
predict, only the indexer is to predict better. The report trains the two with separate losses for that reason.

The published code also multiplies query and key by a Hadamard matrix. That leaves every q . k as it is; it prepares
the vectors for FP8 and has no place in fp32: see `precision`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsa.kernels.fp8 import QuantizedTensor
from dsa.model.cache import LayerCache
from dsa.model.config import Config
from dsa.model.precision import FULL_PRECISION, Precision, index_codec, quantize_index_query
from dsa.model.rope import Rope


class IndexFactors(NamedTuple):
    """What Eq. 1 multiplies.

    Attributes:
        q: index queries (B, T, J, W); in eight bits codes, whose scale is in `w` too.
        k: index keys (B, S, W), one for all heads; in eight bits `fp8.QuantizedTensor`.
        w: head weights (B, T, J), with J^-0.5 * W^-0.5 included.
    """

    q: Tensor
    k: Tensor | QuantizedTensor
    w: Tensor


class Indexer(nn.Module):
    """One layer's indexer: hidden states in, index queries, keys and head weights out.

    `detached` says whether its inputs are; only an experiment that asks what the detaching is for turns it off.
    """

    detached = True

    def __init__(self, config: Config):
        super().__init__()
        if config.index_topk is None:
            raise ValueError("this config has no indexer: give index_n_heads, index_head_dim and index_topk")
        self.heads, self.width, _ = config.indexer
        self.rotary = config.qk_rope_head_dim
        # a model whose query has no low-rank latent lends the indexer its normed hidden state instead
        query_input = config.q_lora_rank or config.hidden_size
        self.wq_b = nn.Linear(query_input, self.heads * self.width, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.width, bias=False)
        self.k_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)

    def _rotate(self, x: Tensor, rope: Rope) -> Tensor:
        """Turn the first R dimensions: x (B, T, heads, W), laid out [rope | nope]."""
        turned, still = x.split_with_sizes([self.rotary, self.width - self.rotary], dim=-1)
        return torch.cat([rope.half_split(turned), still], dim=-1)

    def _key(self, x: Tensor) -> Tensor:
        """One index key a token, shared by all heads, not yet rotated: x (B, T, D) -> (B, T, W)."""
        raw = self.wk(x)
        # LayerNorm, with a bias, in its weights' own precision, fp32
        return self.k_norm(raw.to(self.k_norm.weight.dtype)).to(raw.dtype)

    def forward(
        self,
        x: Tensor,
        query_latent: Tensor,
        rope: Rope,
        cache: LayerCache | None = None,
        start: int = 0,
        precision: Precision = FULL_PRECISION,
    ) -> IndexFactors:
        """Prepare the three factors of Eq. 1, each of this pass's T queries and of all S keys so far.

        Args:
            x: the attention-normed hidden state (B, T, D), the same that MLA gets.
            query_latent: MLA's RMS-normalised query latent (B, T, Q).
            rope: the angles of these T positions.
            cache: where earlier keys are, and these go, from position `start` on.
            precision: of queries and keys.
        """
        if self.detached:
            x, query_latent = x.detach(), query_latent.detach()
        q = self.wq_b(query_latent).unflatten(-1, (self.heads, self.width))  # (B, T, J, W)
        k = self._key(x).unsqueeze(2)  # (B, T, 1, W)
        q, k = self._rotate(torch.cat([q, k], dim=2), rope).split_with_sizes([self.heads, 1], dim=2)  # both at once
        # fp32 whatever the model is, and no softmax: a weight may be negative
        w = self.weights_proj(x.to(self.weights_proj.weight.dtype)) * (self.heads * self.width) ** -0.5
        q, w = quantize_index_query(q, w, precision)
        if cache is not None:
            return IndexFactors(q, cache.append_index_key(start, k.squeeze(2)), w)
        codec = index_codec(precision)
        return IndexFactors(q, codec.decode(*codec.encode(k.squeeze(2))), w)
