"""Multi-head latent attention (MLA) under DeepSeek Sparse Attention (report section 1, Eq. 2, App. A).

MLA (DeepSeek-V3 report, Eq. 1 to 11) compresses what a token offers to later ones into one latent of C numbers, plus R
rotary numbers; all H heads expand their own keys and values from it. There are two ways to compute the same thing:

* **MHA mode** expands first: K and V per head, then ordinary attention. Few FLOPs per pair, much memory.
* **MQA mode** moves the expansion to the query's and the output's side ("absorption"): a head's key is W_k c, so
  q . (W_k c) = (W_k^T q) . c. All heads then share one key, the latent itself, which is its value too.

A selected token must be fetched once and serve all heads, so DSA is defined on the MQA mode. Dense prefill uses MHA,
dense decode MQA, as the real system does. MLA's layout is [nope | rope], its rotary convention interleaved: both the
opposite of the indexer's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsa.kernels import ops
from dsa.kernels.fp8 import QuantizedLatentKV
from dsa.model import baselines
from dsa.model.cache import LayerCache
from dsa.model.config import Config
from dsa.model.fp8_linear import weight_of
from dsa.model.indexer import Indexer, IndexFactors
from dsa.model.norm import RMSNorm
from dsa.model.precision import FULL_PRECISION, Precision, latent_codec
from dsa.model.rope import Rope

LATENT_NORM_EPS = 1e-6  # of the two latent norms, whatever the config's rms_norm_eps is: so in the published code


@dataclass(frozen=True)
class ForwardContext:
    """One forward pass as every layer sees it: where it starts, who chooses the keys, what is to be collected."""

    rope: Rope
    start: int  # position of the first query
    attention: str  # one of baselines.KINDS
    top_k: int
    dtype: torch.dtype  # of everything but norms, scores and the residual stream
    collect: str | None = None  # None, "trace" or "indexer_loss"
    precision: Precision = FULL_PRECISION  # of index vectors and of what the cache holds


@dataclass(frozen=True)
class Trace:
    """What one layer's attention did.

    Attributes:
        scores: the indexer's I (B, T, S), -inf in the future; None without an indexer.
        selected: the keys that each query kept (B, T, min(K, S)), -1 in empty slots. Under dense attention: the keys
            the indexer would keep. None if nothing chooses.
        mass: the dense attention that these queries would pay to each key (B, T, S), all heads together; rows sum to 1.
    """

    scores: Tensor | None
    selected: Tensor | None
    mass: Tensor


class LayerOutput(NamedTuple):
    """What comes out of attention, or of a whole layer.

    A tuple and no dataclass, because FSDP looks for tensors that carry gradients in tuples only.

    Attributes:
        hidden: (B, T, D).
        trace: what was looked at, if `collect` is "trace".
        indexer_loss: a scalar, if `collect` is "indexer_loss".
    """

    hidden: Tensor
    trace: Trace | None = None
    indexer_loss: Tensor | None = None


class Attention(nn.Module):
    """One layer's MLA with its indexer; x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.latent = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rotary, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scale = config.softmax_scale
        D, query_width = config.hidden_size, self.heads * (self.nope + self.rotary)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.has_query_latent = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(D, self.latent + self.rotary, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, D, bias=False)
        self.indexer = Indexer(config) if config.index_topk is not None else None
        self.all_heads = nn.Identity()  # where `tensor_parallel` averages with the heads of other ranks

    def forward(self, x: Tensor, context: ForwardContext, cache: LayerCache | None = None) -> LayerOutput:
        """Attend.

        Args:
            x: normed hidden state (B, T, D).
            context: the pass this belongs to.
            cache: earlier tokens' latents and index keys; these tokens' are added.

        Returns:
            (B, T, D), and what `context.collect` asks for.
        """
        q, query_latent = self.queries(x, context.rope)
        kv = self.compress(x, context, cache)
        index = self.index(x, query_latent, context, cache)
        selected = self.select(context, q, kv, index)
        heads = self.attend(q, kv, selected)
        return self.diagnose(self.o_proj(heads.flatten(-2)), context, q, kv, index, selected)

    # ---- the five steps

    def queries(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Make queries: x (B, T, D) -> q (B, T, H, N + R), and the normed query latent (B, T, Q) for the indexer."""
        if self.has_query_latent:
            query_latent = self.q_a_layernorm(self.q_a_proj(x))
            q = self.q_b_proj(query_latent)
        else:
            query_latent, q = x, self.q_proj(x)
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split_with_sizes([self.nope, self.rotary], dim=-1)
        return torch.cat([q_nope, rope.interleaved(q_rope)], dim=-1), query_latent

    def compress(self, x: Tensor, context: ForwardContext, cache: LayerCache | None) -> Tensor | QuantizedLatentKV:
        """Make latents, and remember them: x (B, T, D) -> all S tokens' so far (B, S, C + R)."""
        kv = self.compress_kv(x, context.rope)
        if cache is not None:
            return cache.append_latent(context.start, kv)
        return latent_codec(context.precision, self.latent).rounded(kv)

    def index(
        self, x: Tensor, query_latent: Tensor, context: ForwardContext, cache: LayerCache | None
    ) -> IndexFactors | None:
        """Prepare the indexer's scores, if somebody is to see them: under other attention they cost nothing."""
        if self.indexer is None or (context.attention != "sparse" and context.collect is None):
            return None
        return self.indexer(x, query_latent, context.rope, cache, context.start, context.precision)

    @torch.no_grad()
    def select(
        self, context: ForwardContext, q: Tensor, kv: Tensor | QuantizedLatentKV, index: IndexFactors | None
    ) -> Tensor | None:
        """Select the keys of every query: -> (B, T, min(K, S)), or None for all of them."""
        sizes = (q.shape[0], q.shape[1], context.start + q.shape[1], context.top_k)
        match context.attention:
            case "sparse":
                assert index is not None
                return ops.index_topk(*index, context.top_k)
            case "window":
                return baselines.window(*sizes, device=q.device)
            case "random":
                return baselines.random(*sizes, seed=1000 * context.start + self.layer, device=q.device)
            case "oracle":
                return baselines.oracle(self.attention_probs(q, kv), context.top_k)
        return None

    def attend(self, q: Tensor, kv: Tensor | QuantizedLatentKV, selected: Tensor | None) -> Tensor:
        """Attend to the selected keys, or to all: -> (B, T, H, V)."""
        if selected is None and q.shape[1] > 1:  # dense prefill; dense decode stays on the latents
            return self.attend_mha(q, kv)
        return self.attend_mqa(q, kv, selected)

    def diagnose(
        self,
        output: Tensor,
        context: ForwardContext,
        q: Tensor,
        kv: Tensor | QuantizedLatentKV,
        index: IndexFactors | None,
        selected: Tensor | None,
    ) -> LayerOutput:
        """Put beside the output what the pass is to collect: a trace, or the indexer's loss."""
        match context.collect:
            case "trace":
                return LayerOutput(output, trace=self.trace(context, q, kv, index, selected))
            case "indexer_loss":
                assert index is not None
                return LayerOutput(output, indexer_loss=self.indexer_loss(q, kv, index, selected))
        return LayerOutput(output)

    # ---- MLA's two modes

    def compress_kv(self, x: Tensor, rope: Rope) -> Tensor:
        """Compress tokens to what the cache holds: x (B, T, D) -> [normed latent | rotated key] (B, T, C + R)."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split_with_sizes([self.latent, self.rotary], dim=-1)
        k_rope = rope.interleaved(k_rope.unsqueeze(2)).squeeze(2)  # one rotary key for all heads
        return torch.cat([self.kv_a_layernorm(latent), k_rope], dim=-1)

    def up_projections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Each head's way from the latent to its key (H, N, C) and to its value (H, V, C)."""
        weight = weight_of(self.kv_b_proj, dtype).unflatten(0, (self.heads, -1))  # (H, N + V, C)
        return weight[:, : self.nope], weight[:, self.nope :]

    def expand_kv(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """MHA mode: latents (B, S, C + R) -> keys (B, S, H, N + R), values (B, S, H, V)."""
        latent, k_rope = kv.split_with_sizes([self.latent, self.rotary], dim=-1)
        k_nope, v = (
            self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).split_with_sizes([self.nope, self.value], dim=-1)
        )
        k_rope = k_rope[:, :, None].expand(-1, -1, self.heads, -1)
        return torch.cat([k_nope, k_rope], dim=-1), v

    def absorb_query(self, q: Tensor) -> Tensor:
        """MQA mode: queries (B, T, H, N + R) -> queries against the latent itself (B, T, H, C + R)."""
        q_nope, q_rope = q.split_with_sizes([self.nope, self.rotary], dim=-1)
        return torch.cat([per_head(q_nope, self.up_projections(q.dtype)[0]), q_rope], dim=-1)

    def attend_mha(self, q: Tensor, kv: Tensor | QuantizedLatentKV) -> Tensor:
        """Dense attention with expanded keys and values: -> (B, T, H, V)."""
        return ops.dense_attention(q, *self.expand_kv(dequantized(kv, q.dtype)), self.scale)

    def attend_mqa(self, q: Tensor, kv: Tensor | QuantizedLatentKV, selected: Tensor | None = None) -> Tensor:
        """Attention on the latents, dense or over the selected keys (Eq. 2): -> (B, T, H, V)."""
        absorbed = self.absorb_query(q)
        if selected is None:
            shared = dequantized(kv, q.dtype)[:, :, None]  # (B, S, 1, C + R): the first C numbers are the value too
            attended = ops.dense_attention(absorbed, shared, shared[..., : self.latent], self.scale)
        else:
            attended = ops.sparse_attention(absorbed, kv, selected, self.scale, self.latent)  # (B, T, H, C)
        return per_head(attended, self.up_projections(q.dtype)[1].mT)

    # ---- what a pass may collect

    def attention_probs(self, q: Tensor, kv: Tensor | QuantizedLatentKV) -> Tensor:
        """Dense attention averaged over heads: -> (B, T, S), rows sum to 1."""
        shared = dequantized(kv, q.dtype)[:, :, None]
        return self.all_heads(ops.attention_mass(self.absorb_query(q), shared, self.scale))

    @torch.no_grad()
    def trace(
        self,
        context: ForwardContext,
        q: Tensor,
        kv: Tensor | QuantizedLatentKV,
        index: IndexFactors | None,
        selected: Tensor | None,
    ) -> Trace:
        """Record scores, selection and mass."""
        scores = None if index is None else ops.index_scores(*index)
        if selected is None and scores is not None:
            selected = ops.select(scores, context.top_k)
        return Trace(scores, selected, self.attention_probs(q, kv))

    def indexer_loss(
        self, q: Tensor, kv: Tensor | QuantizedLatentKV, index: IndexFactors, selected: Tensor | None
    ) -> Tensor:
        """How far the indexer's ranking is from the attention (Eq. 3; over a selected set Eq. 4): a scalar."""
        with torch.no_grad():  # the attention is the target: the loss must not reach it
            absorbed = self.absorb_query(q)
        assert isinstance(kv, Tensor) and isinstance(index.k, Tensor)  # the model refuses to train in eight bits
        shared = kv.detach()[:, :, None]
        return ops.indexer_loss(index.q, index.k, index.w, absorbed, shared, self.scale, selected=selected)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply each head by a matrix of its own: x (B, T, H, M), weight (H, M, N) -> (B, T, H, N)."""
    B, T, *_ = x.shape
    return torch.bmm(x.flatten(0, 1).transpose(0, 1), weight).transpose(0, 1).unflatten(0, (B, T))


def dequantized(kv: Tensor | QuantizedLatentKV, dtype: torch.dtype) -> Tensor:
    """Latents (B, S, C + R) as numbers, for who looks at all of them."""
    return kv if isinstance(kv, Tensor) else kv.dequantize(dtype)
