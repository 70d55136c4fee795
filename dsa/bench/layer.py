"""One layer's attention at the true size, on the processor at hand: seconds of one token, dense and sparse.

No laptop holds the model, but any runs one layer of it, and lengths, not layers, are the question. Random numbers do:
time does not depend on what is attended to. What is left out of both kinds alike are the products with weights, which
do not depend on length.

Decoding is one query. Prefill is measured on the last block of a prompt: for dense attention `DENSE_QUERIES` queries in
one of the 128 heads, since all heads' keys and values at 128 Ki would take 20 GB and heads do the same work; for sparse
attention as many queries as have `SPARSE_INDEX_HEADS` index heads together (16 at the true size), with all heads.
(Dense attention wants large blocks: with 256 queries it is up to 1.5 times slower, which would flatter sparse.)
`timing` says how it is timed; `cpu` does it at many lengths and writes it down.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsa.analysis.flops import PHASES
from dsa.bench.timing import cpu_seconds
from dsa.kernels import ops
from dsa.model.config import Config
from dsa.model.precision import Precision, index_codec, quantize_index_query

DENSE_QUERIES, DENSE_HEADS = 1024, 1  # of a prompt's last block, in one call
SPARSE_INDEX_HEADS = 1024  # over all queries of one call


def sparse_call(
    config: Config, keys: int, queries: int, index: str = "full", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Callable[[], Tensor]:
    """Score `keys` keys for the last `queries` queries, choose K of them, attend to these: -> (1, T, H, C).

    `index` is the precision in which they are scored (`precision.INDEX`); writing keys so is not part of the call.
    """
    random = _random(seed, dtype)
    c, H, ranking = config, config.num_attention_heads, Precision(index=index)
    J, W, K = c.indexer
    wide = c.kv_lora_rank + c.qk_rope_head_dim
    q, kv = random(1, queries, H, wide), random(1, keys, wide)  # (B, T, H, C + R), (B, S, C + R)
    index_q, w = quantize_index_query(random(1, queries, J, W), random(1, queries, J), ranking)
    index_k = index_codec(ranking).decode(*index_codec(ranking).encode(random(1, keys, W)))

    def call() -> Tensor:
        chosen = ops.index_topk(index_q, index_k, w, K)  # (B, T, K)
        return ops.sparse_attention(q, kv, chosen, wide**-0.5, c.kv_lora_rank)

    return call


def dense_call(
    config: Config, phase: str, keys: int, queries: int, heads: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Callable[[], Tensor]:
    """Attend to all keys with `heads` heads: MQA on the latents in "decode", MHA expanded in "prefill"."""
    random, c = _random(seed, dtype), config
    if phase == "decode":
        wide = c.kv_lora_rank + c.qk_rope_head_dim
        q, k = random(1, queries, heads, wide), random(1, keys, 1, wide)
        return lambda: ops.dense_attention(q, k, k[..., : c.kv_lora_rank], wide**-0.5)
    wide = c.qk_nope_head_dim + c.qk_rope_head_dim
    q, k = random(1, queries, heads, wide), random(1, keys, heads, wide)
    v = random(1, keys, heads, c.v_head_dim)
    return lambda: ops.dense_attention(q, k, v, wide**-0.5)


def token_seconds(config: Config, phase: str, keys: int, repeats: int = 3) -> tuple[float, float]:
    """CPU seconds of one token that sees `keys` keys in one layer: (dense, sparse)."""
    check_measurable(phase, keys)
    queries, sparse_queries, heads = work_per_call(config, phase, keys)
    calls = {
        "dense": dense_call(config, phase, keys, queries, heads),
        "sparse": sparse_call(config, keys, sparse_queries),
    }
    with torch.no_grad():
        seconds = cpu_seconds(calls, repeats)
    return seconds["dense"] * config.num_attention_heads / heads / queries, seconds["sparse"] / sparse_queries


def work_per_call(config: Config, phase: str, keys: int) -> tuple[int, int, int]:
    """What one call computes: queries of dense attention, queries of sparse attention, heads of dense attention."""
    if phase == "decode":
        return 1, 1, config.num_attention_heads
    sparse_queries = SPARSE_INDEX_HEADS // (config.index_n_heads or 1)
    return min(DENSE_QUERIES, keys // 4), min(sparse_queries, keys // 4), DENSE_HEADS


def check_measurable(phase: str, keys: int) -> None:
    """Refuse what cannot be measured."""
    if keys < 64:
        raise ValueError(f"keys={keys}: a block needs room before it, so give 64 or more")
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r} is unknown: use one of {', '.join(PHASES)}")


def _random(seed: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *sizes: torch.randn(sizes, generator=generator).to(dtype)
