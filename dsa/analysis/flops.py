"""What a model must do, counted from its sizes: FLOPs, bytes and parameters, before anything is run.

A count is worth more than a stopwatch where the question is *why*. It is exact, it needs no machine, and it works for a
model of 671 B parameters on a laptop. Three kinds of work are kept apart, because each grows in its own way with the
number S of tokens a query may see: products with weights do not depend on S, index scoring grows with S for ever, and
attention over selected tokens grows until S = K.

The rules, where published counts differ. One multiplication with its addition is 2 FLOP. Only products of matrices
count: norms, softmax, rotations and the top-k are left out, and so is the embedding, which is a look-up. Causal
attention is counted as the triangle that it is, L (L + 1) / 2 pairs, and not as the square that most kernels, and
PyTorch's own counter, go by. Each number holds for one token, or one sequence, unless it says otherwise. What a kernel
does beyond that (squares, padding, tiles) is its own affair; `tests/analysis/test_flops.py` accounts for it to the
digit.

Sizes and published values: DeepSeek-V3.2-Exp report, section 2, Eq. 1 and 2, and the published config and code.
"""

import math
from dataclasses import astuple, dataclass

from dsa.analysis.memory import active_parameters, index_key_bytes, latent_bytes, weight_bytes_read
from dsa.model.config import Config

PHASES = ("prefill", "decode")
ATTENTIONS = ("dense", "sparse")


# one pair of a query and a key ----------------------------------------------------------------------------------------


def mha_pair_flops(config: Config) -> int:
    """FLOP for one pair in one layer, all heads, keys and values expanded: 2 H (N + R + V). Real: 81,920."""
    return 2 * config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)


def mqa_pair_flops(config: Config) -> int:
    """FLOP for one pair in one layer on the latents, the mode DSA runs in (App. A): 2 H (2 C + R). Real: 278,528."""
    return 2 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)


def index_pair_flops(config: Config) -> int:
    """FLOP of the indexer's products q . k for one pair in one layer (Eq. 1): 2 J W. Real: 16,384."""
    _require_indexer(config)
    return 2 * config.indexer.heads * config.indexer.head_dim


def head_sum_pair_flops(config: Config) -> int:
    """FLOP of Eq. 1's weighted sum over index heads: 2 J. Real: 128; under 1 %, and by custom not in the 16,384."""
    _require_indexer(config)
    return 2 * config.indexer.heads


def dense_pair_flops(config: Config, phase: str) -> int:
    """FLOP for one pair under dense attention: MHA in "prefill", where expanding pays, MQA in "decode"."""
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r} is unknown: use one of {', '.join(PHASES)}")
    return mha_pair_flops(config) if phase == "prefill" else mqa_pair_flops(config)


# how many pairs -------------------------------------------------------------------------------------------------------


def causal_pairs(length: int) -> int:
    """Pairs of a whole prompt under dense attention, each token with itself and all before: L (L + 1) / 2."""
    return length * (length + 1) // 2


def selected_pairs(length: int, top_k: int) -> int:
    """Pairs of a whole prompt that attend under top-k: the first K tokens see all there is, the others K each."""
    few = min(length, top_k)
    return causal_pairs(few) + (length - few) * top_k


# a forward pass -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlopCount:
    """FLOP of a pass, by what they are spent on."""

    weights: int  # the main model's matrices, head included
    indexer_weights: int  # the indexer's matrices
    scoring: int  # Eq. 1's products
    attention: int  # Eq. 2, or dense attention

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))


def token_flops(config: Config, keys: int, attention: str, phase: str) -> FlopCount:
    """FLOP of one token that may see `keys` tokens, itself included: at position p, counted from 0, p + 1.

    Both modes cost the same in weights: MHA expands a token's latent once, with the very parameters that MQA absorbs.
    That holds for a prompt read in one go; in chunks, MHA expands the earlier chunks again.
    """
    return _count_flops(config, 1, keys, _attended_keys(config, keys, attention), attention, phase)


def prompt_flops(config: Config, length: int, attention: str, phase: str = "prefill") -> FlopCount:
    """FLOP of a whole prompt, the head applied at each position: the sum of `token_flops` over 1 ... length keys."""
    last = _attended_keys(config, length, attention)  # the last token attends to most
    return _count_flops(config, length, causal_pairs(length), selected_pairs(length, last), attention, phase)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one decoding pass reads from memory."""

    weights: int
    index_keys: int
    latents: int

    @property
    def cache(self) -> int:
        """What it reads of the cache."""
        return self.index_keys + self.latents

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))


def decode_traffic(config: Config, keys: int, attention: str, precision: str, batch: int = 1) -> Traffic:
    """Bytes read to decode one token for each of `batch` sequences that hold `keys` tokens each, the new one included.

    Weights are read once for the batch, a cache once for its sequence: all latents, or all index keys and K latents.
    """
    sparse = attention == "sparse"
    per_layer = batch * config.num_hidden_layers
    return Traffic(
        weights=weight_bytes_read(config, precision, batch, indexer=sparse),
        index_keys=per_layer * keys * index_key_bytes(config, precision) if sparse else 0,
        latents=per_layer * _attended_keys(config, keys, attention) * latent_bytes(config, precision),
    )


# where the curves cross -----------------------------------------------------------------------------------------------


def crossover(config: Config, phase: str, weights: bool = True) -> float:
    """Visible keys at which a token costs the same under dense and sparse attention; above, sparse needs fewer FLOP.

    With `weights` the indexer's matrices are on sparse attention's bill, as they are in a real pass. Real: prefill
    8,704 without, 9,130 with them; decode 2,176 and 2,282.5. `math.inf` when sparse attention never gets cheaper.
    """
    dense, index, sparse = dense_pair_flops(config, phase), index_pair_flops(config), mqa_pair_flops(config)
    top_k = config.indexer.top_k
    fixed = 2 * active_parameters(config)["indexer"] / config.num_hidden_layers if weights else 0.0
    if (dense - index - sparse) * top_k > fixed:  # cheaper before a single key is dropped
        return fixed / (dense - index - sparse)
    return (sparse * top_k + fixed) / (dense - index) if dense > index else math.inf


def keys_at_index_share(config: Config, share: float) -> float:
    """Visible keys at which scoring is `share` of scoring and attention together, K or more. Real: 79 % at 130,974.

    Raises ValueError for a share that is not reached, or is reached before the selection begins to drop keys.
    """
    index, attention = index_pair_flops(config), mqa_pair_flops(config)
    lowest = index / (index + attention)
    if not lowest <= share < 1:
        raise ValueError(f"share={share}: scoring takes between {lowest:.3f} (up to K keys) and, at no length, 1")
    return share / (1 - share) * config.indexer.top_k * attention / index


# ----------------------------------------------------------------------------------------------------------------------


def _count_flops(config: Config, tokens: int, seen: int, attended: int, attention: str, phase: str) -> FlopCount:
    """FLOP of `tokens` tokens that see and attend to so many pairs together."""
    sparse, layers = attention == "sparse", config.num_hidden_layers
    dense_pair = dense_pair_flops(config, phase)
    parts = active_parameters(config)
    indexer = parts.pop("indexer", 0)
    return FlopCount(
        weights=2 * tokens * sum(parts.values()),
        indexer_weights=2 * tokens * indexer if sparse else 0,
        scoring=layers * seen * index_pair_flops(config) if sparse else 0,
        attention=layers * attended * (mqa_pair_flops(config) if sparse else dense_pair),
    )


def _attended_keys(config: Config, keys: int, attention: str) -> int:
    """How many of the visible keys a query attends to."""
    if attention not in ATTENTIONS:
        raise ValueError(f"attention={attention!r} cannot be counted: use one of {', '.join(ATTENTIONS)}")
    if keys < 1:
        raise ValueError(f"keys={keys}: a token sees at least itself, so give 1 or more")
    if attention == "dense":
        return keys
    _require_indexer(config)
    return min(keys, config.index_topk or keys)


def _require_indexer(config: Config) -> None:
    if config.index_topk is None:
        raise ValueError("this config is dense and has no indexer: give index_n_heads, index_head_dim and index_topk")
