"""The exercises of chapter 02: count a cache and move projections to the other side; `rotary` has the other two.

Whoever absorbs nothing gets the right numbers too, only too late: so two of the checkers also count the
multiplications, however they are written: as a matrix product, as a loop over tokens, or as a sum of products.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from course.exercises import rotary
from course.exercises.exercise import Exercise, checker, require
from course.exercises.flop_counter import count_flops
from dsa.model.config import Config

H, N, R, C, V = 3, 8, 4, 16, 6  # sizes of the checkers' tiny attention


def my_cache_bytes(config, kind: str, groups: int = 8) -> int:
    """Bytes in bf16 that one token leaves in the caches of all layers.

    kind is "MHA", "GQA" (with so many groups), "MQA" or "MLA". In the
    first three a head's key has N + R numbers and its value V.
    """
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    each = key + config.v_head_dim
    numbers = {
        "MHA": config.num_attention_heads * each,
        "GQA": groups * each,
        "MQA": each,
        "MLA": config.kv_lora_rank + config.qk_rope_head_dim,
    }[kind]
    return 2 * numbers * config.num_hidden_layers


def _one_layer(config: Config, kind: str, groups: int = 8) -> int:
    """Counts one layer."""
    return my_cache_bytes(config, kind, groups) // config.num_hidden_layers


def _no_rotary(config: Config, kind: str, groups: int = 8) -> int:
    """Forgets that MLA also keeps the rotary key."""
    short = 2 * config.qk_rope_head_dim * config.num_hidden_layers if kind == "MLA" else 0
    return my_cache_bytes(config, kind, groups) - short


def _latent_twice(config: Config, kind: str, groups: int = 8) -> int:
    """Keeps the latent once as key and once as value: it is both at once."""
    more = 2 * config.kv_lora_rank * config.num_hidden_layers if kind == "MLA" else 0
    return my_cache_bytes(config, kind, groups) + more


def _one_byte(config: Config, kind: str, groups: int = 8) -> int:
    """Counts one byte a number: that is FP8."""
    return my_cache_bytes(config, kind, groups) // 2


def _published_only(config: Config, kind: str, groups: int = 8) -> int:
    """Has the head's sizes of the real model built in: 320 numbers for key and value."""
    heads = {"MHA": config.num_attention_heads, "GQA": groups, "MQA": 1}
    numbers = heads[kind] * 320 if kind in heads else config.kv_lora_rank + config.qk_rope_head_dim
    return 2 * numbers * config.num_hidden_layers


def _always_8(config: Config, kind: str, groups: int = 8) -> int:
    """Overlooks `groups`."""
    return my_cache_bytes(config, kind)


def _check_bytes(answer: Callable) -> None:
    real, small = Config.v32_exp(), Config.mini()
    right = {"MLA": 70_272, "MQA": 39_040, "GQA": 312_320, "MHA": 4_997_120}  # published sizes, by hand
    for kind, size in right.items():
        found = answer(real, kind, 8)
        require(found == size, f"{kind} at the real sizes leaves {size:,} bytes a token, yours says {found:,}")
    found = answer(small, "MLA", 8)
    require(found == 384, f"the laptop model leaves 3 layers x 64 numbers x 2 = 384 bytes, yours says {found}")
    found = answer(small, "MHA", 8)
    require(found == 1152, f"its 4 heads would leave 3 x 4 x (8 + 16 + 24) x 2 = 1,152 bytes, yours says {found}")
    found = answer(real, "GQA", 16)
    require(found == 624_640, f"16 groups leave twice what 8 do, 624,640 bytes, yours says {found:,}")


def my_scores(q: Tensor, kv: Tensor, w_k: Tensor) -> Tensor:
    """Scores of one query token against S cached latents: -> (H, S).

    q (H, N + R), laid out [nope | rope] and already rotated; kv (S, C + R),
    laid out [latent | rotated key]; w_k (H, N, C). No scale, no softmax.
    """
    N = w_k.shape[1]
    absorbed = torch.einsum("hn,hnc->hc", q[:, :N], w_k)  # once a query
    return torch.cat([absorbed, q[:, N:]], dim=-1) @ kv.T


def _expands(q: Tensor, kv: Tensor, w_k: Tensor) -> Tensor:
    """Expands a key for every head and every token: the right numbers, and all the work."""
    _, N, C = w_k.shape
    keys = torch.einsum("sc,hnc->hsn", kv[:, :C], w_k)
    return torch.einsum("hn,hsn->hs", q[:, :N], keys) + q[:, N:] @ kv[:, C:].T


def _token_by_token(q: Tensor, kv: Tensor, w_k: Tensor) -> Tensor:
    """Makes each key in a loop: fewer numbers at a time, and all the work."""
    _, N, C = w_k.shape
    rows = [[q[h, :N] @ (w @ k[:C]) + q[h, N:] @ k[C:] for k in kv] for h, w in enumerate(w_k)]
    return torch.stack([torch.stack(row) for row in rows])


def _broadcasts(q: Tensor, kv: Tensor, w_k: Tensor) -> Tensor:
    """Makes all keys without a matrix product: the same multiplications under another name."""
    _, N, C = w_k.shape
    keys = (w_k[:, None] * kv[:, None, :C]).sum(-1)  # (H, S, N)
    return (q[:, None, :N] * keys).sum(-1) + q[:, N:] @ kv[:, C:].T


def _no_rope(q: Tensor, kv: Tensor, w_k: Tensor) -> Tensor:
    """Leaves the rotary part out: no score knows where a token stands."""
    _, N, C = w_k.shape
    return torch.einsum("hn,hnc->hc", q[:, :N], w_k) @ kv[:, :C].T


def _rope_first(q: Tensor, kv: Tensor, w_k: Tensor) -> Tensor:
    """Reads the query as [rope | nope]: that is the indexer's layout."""
    _, N, C = w_k.shape
    R = q.shape[1] - N
    return torch.einsum("hn,hnc->hc", q[:, R:], w_k) @ kv[:, :C].T + q[:, :R] @ kv[:, C:].T


def _one_key(q: Tensor, kv: Tensor, w_k: Tensor) -> Tensor:
    """Absorbs the first head's projection into all queries: then all heads read the same key."""
    N = w_k.shape[1]
    return torch.cat([q[:, :N] @ w_k[0], q[:, N:]], dim=-1) @ kv.T


def _check_scores(answer: Callable) -> None:
    generator = torch.Generator().manual_seed(2)
    S = 60
    q, kv = torch.randn(H, N + R, generator=generator), torch.randn(S, C + R, generator=generator)
    w_k = torch.randn(H, N, C, generator=generator)
    found, flops = count_flops(lambda: answer(q.clone(), kv.clone(), w_k.clone()))
    require(getattr(found, "shape", None) == (H, S), f"{H} heads and {S} tokens give scores of shape ({H}, {S})")
    keys = torch.stack([torch.cat([kv[:, :C] @ w_k[h].T, kv[:, C:]], dim=-1) for h in range(H)])  # (H, S, N + R)
    right = torch.stack([keys[h] @ q[h] for h in range(H)])
    gap = float((found - right).abs().max())
    require(gap < 1e-3, f"the scores differ from those of expanded keys by up to {gap:.1f}")
    limit = 2 * H * N * C + 2 * H * S * (C + R)
    require(
        flops <= limit,
        f"the numbers are right, but you spend {flops:,} FLOP where {limit:,} are enough: move w_k to the query",
    )


def my_output(weights: Tensor, kv: Tensor, w_v: Tensor) -> Tensor:
    """What each head reads: -> (H, V).

    weights (H, S), rows sum to 1; kv (S, C + R), laid out
    [latent | rotated key]; w_v (H, V, C).
    """
    attended = weights @ kv[:, : w_v.shape[-1]]  # (H, C), latents mixed
    return torch.einsum("hc,hvc->hv", attended, w_v)  # expanded once


def _expands_values(weights: Tensor, kv: Tensor, w_v: Tensor) -> Tensor:
    """Expands a value for every head and every token: the right numbers, and all the work."""
    values = torch.einsum("sc,hvc->hsv", kv[:, : w_v.shape[-1]], w_v)
    return torch.einsum("hs,hsv->hv", weights, values)


def _values_one_by_one(weights: Tensor, kv: Tensor, w_v: Tensor) -> Tensor:
    """Expands in a loop over the tokens: no large tensor, and all the work."""
    C = w_v.shape[-1]
    rows = [sum(p * (w @ k[:C]) for p, k in zip(row, kv, strict=True)) for row, w in zip(weights, w_v, strict=True)]
    return torch.stack([torch.as_tensor(row) for row in rows])


def _wrong_end(weights: Tensor, kv: Tensor, w_v: Tensor) -> Tensor:
    """Takes the last C numbers of the cache: the rotary key is no part of the value."""
    return torch.einsum("hc,hvc->hv", weights @ kv[:, -w_v.shape[-1] :], w_v)


def _heads_mixed(weights: Tensor, kv: Tensor, w_v: Tensor) -> Tensor:
    """Lets all heads read the mean of what they attend to."""
    return torch.einsum("c,hvc->hv", (weights @ kv[:, : w_v.shape[-1]]).mean(0), w_v)


def _one_value(weights: Tensor, kv: Tensor, w_v: Tensor) -> Tensor:
    """Expands with the first head's matrix only."""
    return weights @ kv[:, : w_v.shape[-1]] @ w_v[0].T


def _check_output(answer: Callable) -> None:
    generator = torch.Generator().manual_seed(3)
    S = 60
    weights = torch.randn(H, S, generator=generator).softmax(-1)
    kv, w_v = torch.randn(S, C + R, generator=generator), torch.randn(H, V, C, generator=generator)
    found, flops = count_flops(lambda: answer(weights.clone(), kv.clone(), w_v.clone()))
    require(getattr(found, "shape", None) == (H, V), f"{H} heads of value width {V} give shape ({H}, {V})")
    right = torch.stack([weights[h] @ (kv[:, :C] @ w_v[h].T) for h in range(H)])
    gap = float((found - right).abs().max())
    require(gap < 1e-4, f"the output differs from that of expanded values by up to {gap:.2f}")
    limit = 2 * H * S * (C + R) + 2 * H * C * V  # who mixes whole rows of the cache and cuts afterwards is right too
    require(
        flops <= limit,
        f"the numbers are right, but you spend {flops:,} FLOP where {limit:,} are enough: mix latents, expand once",
    )


EXERCISES = (
    Exercise(
        "Count the cache", 1, 5,
        "What does one token leave behind, in all layers together? The four kinds differ in one line each. The checker "
        "knows the published sizes.",
        ("Per layer it is numbers times 2 bytes; the layers are `config.num_hidden_layers`.",
         "MHA, GQA and MQA are one formula: `num_attention_heads`, `groups` or 1 different keys and values.",
         "MLA keeps `kv_lora_rank + qk_rope_head_dim` numbers, and the latent serves as key and as value."),
        my_cache_bytes, (_one_layer, _no_rotary, _latent_twice, _one_byte, _published_only, _always_8), _check_bytes,
    ),
    Exercise(
        "Absorb the key projection", 2, 10,
        "Score one query against S cached tokens without ever making a key. The checker compares your scores with "
        "those of expanded keys, and then counts your multiplications.",
        ("With a latent c, q . (W c) is (Wᵀ q) . c: `w_k` belongs to the query, and is used once, whatever S is.",
         "`torch.einsum(\"hn,hnc->hc\", ...)` does it for all heads.",
         "Put the rotary part of the query behind what you have, and one matrix product with `kv.T` gives both parts."),
        my_scores, (_expands, _token_by_token, _broadcasts, _no_rope, _rope_first, _one_key), _check_scores,
    ),
    Exercise(
        "Absorb the value projection", 2, 10,
        "The other side: from attention weights to what each head reads, without ever making a value. Multiplications "
        "are counted again.",
        ("With latents c, a weighted sum of W c is W times the weighted sum of c.",
         "Only the first C numbers of the cache are the value; C is `w_v.shape[-1]`.",
         "First `weights @ latents`, one row of C numbers a head; then each head's own `w_v`, once."),
        my_output, (_expands_values, _values_one_by_one, _wrong_end, _heads_mixed, _one_value), _check_output,
    ),
    *rotary.EXERCISES,
)  # fmt: skip
check = checker(*EXERCISES)
