"""Multi-head latent attention (MLA) under DeepSeek Sparse Attention (report section 1, Eq. 2, App. A).

MLA (DeepSeek-V3 report, Eq. 1 to 11) compresses what a token offers to later ones into one latent of C numbers, plus R
rotary numbers; all H heads expand their own keys and values from it. There are two ways to compute the same thing:

* **MHA mode** expands first: K and V per head, then ordinary attention. Few FLOPs per pair, much memory.
* **MQA mode** moves the expansion to the query's and the output's side ("absorption"): a head's key is W_k c, so
  q . (W_k c) = (W_k^T q) . c. All heads then share one key, the latent itself, which is its value too.

A selected token must be fetched once and serve all heads, so DSA is defined on the MQA mode. Dense prefill uses MHA,
dense decode MQA, as the real system does. MLA's layout is [nope | rope], its rotary convention neighbours: both the
opposite of the indexer's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsa.kernels import ops
from dsa.kernels.fp8 import QuantizedTensor
from dsa.model import baselines
from dsa.model.cache import LayerCache
from dsa.model.config import Config
from dsa.model.fp8_linear import weight_of
from dsa.model.indexer import Indexer
from dsa.model.norm import RMSNorm
from dsa.model.precision import FULL_PRECISION, Precision, latent_format
from dsa.model.rope import Rope

IndexFactors = tuple[Tensor, Tensor | QuantizedTensor, Tensor]  # q (B, T, J, W), k (B, S, W), w (B, T, J) of Eq. 1
LATENT_NORM_EPS = 1e-6  # of the two latent norms, whatever the config's rms_norm_eps is: so in the published code


@dataclass(frozen=True)
class Step:
    """One forward pass as every layer sees it: where it starts, who chooses the keys, what is to be recorded."""

    rope: Rope
    start: int  # position of the first query
    attention: str  # one of selection.KINDS
    top_k: int
    dtype: torch.dtype  # of everything but norms, scores and the residual stream
    record: str | None = None  # None, "trace" or "indexer_loss"
    precision: Precision = FULL_PRECISION  # of index vectors and of what the cache holds

    def reads_few(self, queries: int) -> bool:
        """Whether only selected latents are looked at: then an FP8 cache need not be expanded as a whole."""
        chosen_elsewhere = self.attention in ("sparse", "window", "random")
        return self.precision.cache != "full" and queries == 1 and chosen_elsewhere and self.record is None


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


class Attention(nn.Module):
    """One layer's MLA with its indexer; x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.latent = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rotary, self.value = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.scale = config.softmax_scale
        D, query_width = config.hidden_size, self.heads * (self.nope + self.rotary)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, self.latent + self.rotary, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, D, bias=False)
        self.indexer = Indexer(config) if config.index_topk is not None else None
        self.all_heads = nn.Identity()  # where `tensor_parallel` averages with the heads of other ranks

    def queries(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Make queries: x (B, T, D) -> q (B, T, H, N + R), and the normed query latent (B, T, Q) for the indexer."""
        if hasattr(self, "q_proj"):
            query_latent, q = x, self.q_proj(x)
        else:
            query_latent = self.q_a_layernorm(self.q_a_proj(x))
            q = self.q_b_proj(query_latent)
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split([self.nope, self.rotary], dim=-1)
        return torch.cat([q_nope, rope.neighbours(q_rope)], dim=-1), query_latent

    def latents(self, x: Tensor, rope: Rope) -> Tensor:
        """Compress tokens to what the cache holds: x (B, T, D) -> [normed latent | rotated key] (B, T, C + R)."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent, self.rotary], dim=-1)
        k_rope = rope.neighbours(k_rope.unsqueeze(2)).squeeze(2)  # one rotary key for all heads
        return torch.cat([self.kv_a_layernorm(latent), k_rope], dim=-1)

    def up_projections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Each head's way from the latent to its key (H, N, C) and to its value (H, V, C)."""
        weight = weight_of(self.kv_b_proj, dtype).unflatten(0, (self.heads, -1))  # (H, N + V, C)
        w_k, w_v = weight.split([self.nope, self.value], dim=1)
        return w_k, w_v

    def expand(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """MHA mode: latents (B, S, C + R) -> keys (B, S, H, N + R), values (B, S, H, V)."""
        latent, k_rope = kv.split([self.latent, self.rotary], dim=-1)
        k_nope, v = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).split([self.nope, self.value], dim=-1)
        k_rope = k_rope[:, :, None].expand(-1, -1, self.heads, -1)
        return torch.cat([k_nope, k_rope], dim=-1), v

    def absorb(self, q: Tensor) -> Tensor:
        """MQA mode: queries (B, T, H, N + R) -> queries against the latent itself (B, T, H, C + R)."""
        q_nope, q_rope = q.split([self.nope, self.rotary], dim=-1)
        q_latent = torch.einsum("bthn,hnc->bthc", q_nope, self.up_projections(q.dtype)[0])
        return torch.cat([q_latent, q_rope], dim=-1)

    def attend_mha(self, q: Tensor, kv: Tensor) -> Tensor:
        """Dense attention with expanded keys and values: -> (B, T, H, V)."""
        return ops.dense_attention(q, *self.expand(kv), self.scale)

    def attend_mqa(self, q: Tensor, kv: Tensor, selected: Tensor | None = None) -> Tensor:
        """Attention on the latents, dense or over the selected keys (Eq. 2): -> (B, T, H, V)."""
        absorbed = self.absorb(q)
        if selected is None:
            shared = kv[:, :, None]  # (B, S, 1, C + R), of which the first C numbers are the value too
            attended = ops.dense_attention(absorbed, shared, shared[..., : self.latent], self.scale)
        else:
            attended = ops.sparse_attention(absorbed, kv, selected, self.scale, self.latent)  # (B, T, H, C)
        return torch.einsum("bthc,hvc->bthv", attended, self.up_projections(q.dtype)[1])

    def mass(self, q: Tensor, kv: Tensor) -> Tensor:
        """Dense attention summed over heads: -> (B, T, S), rows sum to 1."""
        return self.all_heads(ops.attention_mass(self.absorb(q), kv[:, :, None], self.scale))

    @torch.no_grad()
    def choose(self, step: Step, q: Tensor, kv: Tensor, index: IndexFactors | None) -> Tensor | None:
        """Select the keys of every query: -> (B, T, min(K, S)), or None for all of them."""
        sizes = (q.shape[0], q.shape[1], step.start + q.shape[1], step.top_k)
        match step.attention:
            case "sparse":
                assert index is not None
                return ops.index_topk(*index, step.top_k)
            case "window":
                return baselines.window(*sizes, device=q.device)
            case "random":
                return baselines.random(*sizes, seed=1000 * step.start + self.layer, device=q.device)
            case "oracle":
                return baselines.oracle(self.mass(q, kv), step.top_k)
        return None

    @torch.no_grad()
    def trace(self, step: Step, q: Tensor, kv: Tensor, index: IndexFactors | None, selected: Tensor | None) -> Trace:
        """Record scores, selection and mass."""
        scores = None if index is None else ops.index_scores(*index)
        if selected is None and scores is not None:
            selected = ops.select(scores, step.top_k)
        return Trace(scores, selected, self.mass(q, kv))

    def indexer_loss(self, q: Tensor, kv: Tensor, index: IndexFactors, selected: Tensor | None) -> Tensor:
        """How far the indexer's ranking is from the attention (Eq. 3; over a selected set Eq. 4): a scalar."""
        with torch.no_grad():
            absorbed = self.absorb(q)
        index_q, index_k, index_w = index
        assert isinstance(index_k, Tensor)  # the model refuses to train in eight bits
        return ops.indexer_loss(
            index_q, index_k, index_w, absorbed, kv.detach()[:, :, None], self.scale, selected=selected
        )

    def forward(self, x: Tensor, step: Step, cache: LayerCache | None = None) -> tuple[Tensor, Trace | Tensor | None]:
        """Attend.

        Args:
            x: normed hidden state (B, T, D).
            step: the pass this belongs to.
            cache: earlier tokens' latents and index keys; these tokens' are added.

        Returns:
            (B, T, D), and what `step.record` asks for.
        """
        q, query_latent = self.queries(x, step.rope)
        kv = self.latents(x, step.rope)
        few = cache is not None and step.reads_few(x.shape[1])
        if cache is None:
            kv = latent_format(step.precision, self.latent, kv.dtype).rounded(kv)
        elif few:
            cache.latents.write(step.start, kv)
        else:
            kv = cache.append_latent(step.start, kv)
        index = None
        if self.indexer is not None and (step.attention == "sparse" or step.record):
            index = self.indexer(x, query_latent, step.rope, cache, step.start, step.precision)
        selected = self.choose(step, q, kv, index)
        if few:
            assert cache is not None and selected is not None
            kv, selected = cache.chosen_latents(selected)
        expanded = selected is None and x.shape[1] > 1  # dense prefill; dense decode stays on the latents
        heads = self.attend_mha(q, kv) if expanded else self.attend_mqa(q, kv, selected)
        record: Trace | Tensor | None = None
        if step.record == "trace":
            record = self.trace(step, q, kv, index, selected)
        elif step.record == "indexer_loss":
            assert index is not None
            record = self.indexer_loss(q, kv, index, selected)
        return self.o_proj(heads.flatten(-2)), record
