"""What is stored: the matrices of a model, its cache, and how many bytes they take in each precision.

A mixture of experts stores far more than it uses, and a cache grows with the text while weights do not. So the two are
counted apart, and each in three precisions. Two of them are plain. The third, "deployed", is what the published
DeepSeek-V3.2-Exp runs with: FP8 values with one fp32 scale for each 128 of them (in weights for each square of
128 x 128), and bf16 for what FP8 would hurt: rotary keys, head, router, the indexer's head weights.

Compare at equal precision first. In bf16 the index key makes the cache of sparse attention *larger*; that the deployed
cache is smaller is FP8's doing, and dense attention could have that too.

Sizes and published values: the config, checkpoint and inference code of DeepSeek-V3.2-Exp.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dsa.model.config import Config

PRECISIONS = ("fp32", "bf16", "deployed")
FP8_GROUP = 128  # values that share one fp32 scale


# weights --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """One kind of weight matrix: where it belongs, its size, how many there are, and how many a token passes."""

    part: str  # "attention", "feed-forward", "experts", "router", "head" or "indexer"
    outputs: int
    inputs: int
    stored: int
    used: int
    fp8: bool = True  # in the published checkpoint; the others are bf16
    split: bool = True  # over GPUs that share a model; each of them holds the whole of the others

    def bytes(self, precision: str) -> int:
        """Storage of one such matrix, scales included (published checkpoint: one for each 128 x 128 values)."""
        if precision != "deployed" or not self.fp8:
            return _row_bytes(self.outputs * self.inputs, "bf16" if precision == "deployed" else precision)
        scales = math.ceil(self.outputs / FP8_GROUP) * math.ceil(self.inputs / FP8_GROUP)
        return self.outputs * self.inputs + 4 * scales


def matrices(config: Config) -> Iterator[Matrix]:
    """List every matrix that a hidden state is multiplied with. Biases, norms and the embedding are none."""
    c, D, H, layers = config, config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    width, dense = c.qk_nope_head_dim + c.qk_rope_head_dim, c.first_k_dense_replace
    moe, E = layers - dense, c.n_routed_experts
    if c.q_lora_rank is not None:
        yield Matrix("attention", c.q_lora_rank, D, layers, layers, split=False)
    yield Matrix("attention", H * width, c.q_lora_rank or D, layers, layers)
    yield Matrix("attention", c.kv_lora_rank + c.qk_rope_head_dim, D, layers, layers, split=False)
    yield Matrix("attention", H * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank, layers, layers)
    yield Matrix("attention", D, H * c.v_head_dim, layers, layers)
    for outputs, inputs, count in ((c.intermediate_size, D, 2), (D, c.intermediate_size, 1)):
        yield Matrix("feed-forward", outputs, inputs, dense * count, dense * count)
    for outputs, inputs, count in ((c.moe_intermediate_size, D, 2 * moe), (D, c.moe_intermediate_size, moe)):
        yield Matrix("experts", outputs, inputs, E * count, c.num_experts_per_tok * count)
        shared = c.n_shared_experts * count
        yield Matrix("feed-forward", outputs, inputs, shared, shared)
    yield Matrix("router", E, D, moe, moe, fp8=False, split=False)
    yield Matrix("head", c.vocab_size, D, 1, 1, fp8=False)
    if c.index_topk is not None:
        (J, W, _), Q, each = c.indexer, c.q_lora_rank or D, (layers, layers)
        yield Matrix("indexer", J * W, Q, *each, split=False)
        yield Matrix("indexer", W, D, *each, split=False)
        yield Matrix("indexer", J, D, *each, fp8=False, split=False)


def active_parameters(config: Config) -> dict[str, int]:
    """Parameters that one token is multiplied with, by part. Real: 36.62 B, and 0.85 B in "indexer" beside them."""
    parts: dict[str, int] = {}
    for matrix in matrices(config):
        parts[matrix.part] = parts.get(matrix.part, 0) + matrix.used * matrix.outputs * matrix.inputs
    return parts


def stored_parameters(config: Config) -> int:
    """Parameters of all matrices and the embedding, indexers included. Real: 671.02 B + 0.85 B (norms: 1 M more)."""
    total = sum(matrix.stored * matrix.outputs * matrix.inputs for matrix in matrices(config))
    return total + config.vocab_size * config.hidden_size


def weight_bytes_read(config: Config, precision: str, tokens: int = 1, indexer: bool = True) -> int:
    """Bytes of weights that one pass over `tokens` tokens fetches, each matrix once.

    One token needs `num_experts_per_tok` experts in a layer; n tokens, if each chooses at random, on average
    E (1 - (1 - per token / E)^n) different ones.
    """
    _check_precision(precision)
    E, per_token = config.n_routed_experts, config.num_experts_per_tok
    share = 1 - (1 - per_token / E) ** tokens  # of the experts that somebody chose
    total = 0.0
    for matrix in matrices(config):
        if matrix.part != "indexer" or indexer:
            count = matrix.stored * share if matrix.part == "experts" else matrix.used
            total += count * matrix.bytes(precision)
    return round(total)


# the cache ------------------------------------------------------------------------------------------------------------


def latent_bytes(config: Config, precision: str) -> int:
    """Cache bytes of one token in one layer, latent and rotary key. Real: bf16 1152, deployed 512 + 16 + 128 = 656."""
    _check_precision(precision)
    C, R = config.kv_lora_rank, config.qk_rope_head_dim
    return _row_bytes(C, "fp8") + _row_bytes(R, "bf16") if precision == "deployed" else _row_bytes(C + R, precision)


def index_key_bytes(config: Config, precision: str) -> int:
    """Cache bytes of one token's index key in one layer. Real: bf16 256, deployed 128 + 4 = 132. Dense model: 0."""
    _check_precision(precision)
    return _row_bytes(config.indexer.head_dim, "fp8" if precision == "deployed" else precision)


def cache_bytes(config: Config, precision: str, indexer: bool = True) -> int:
    """Cache bytes of one token in all layers. Real: bf16 85,888, without index keys 70,272; deployed 48,068."""
    each = latent_bytes(config, precision) + (index_key_bytes(config, precision) if indexer else 0)
    return config.num_hidden_layers * each


# ----------------------------------------------------------------------------------------------------------------------


def _row_bytes(width: int, dtype: str) -> int:
    """Storage of `width` numbers; FP8 adds an fp32 scale for each group of 128."""
    if dtype == "fp8":
        return width + 4 * math.ceil(width / FP8_GROUP)
    return width * {"fp32": 4, "bf16": 2}[dtype]


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
