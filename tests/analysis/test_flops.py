"""The counters of dsa.analysis: held against hand arithmetic, real parameters, real caches, and operations really run.

A kernel may do more than the mathematics needs. Here that is not waved away but computed: what PyTorch's counter sees
is the count plus named extras (the other half of the causal square, padded values, whole tiles), and both sides are
equal to the digit.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import small
from dsa.analysis import flops, memory
from dsa.kernels import tiled
from dsa.kernels.cpu.scoring import query_tile
from dsa.model.config import Config
from dsa.model.transformer import Transformer

REAL = Config.v32_exp()
H, N, R, V, C, D, Q, J, W, K = 128, 128, 64, 128, 512, 7168, 1536, 64, 128, 2048
UNEVEN = {"num_attention_heads": 6, "qk_nope_head_dim": 10, "v_head_dim": 14, "n_shared_experts": 2}


# hand arithmetic ------------------------------------------------------------------------------------------------------


def test_one_pair_of_the_real_model():
    assert flops.mha_pair_flops(REAL) == 2 * H * (N + R) + 2 * H * V == 81_920
    assert flops.mqa_pair_flops(REAL) == 2 * H * (C + R) + 2 * H * C == 278_528
    assert flops.index_pair_flops(REAL) == 2 * J * W == 16_384
    assert flops.head_sum_pair_flops(REAL) == 2 * J == 128
    assert flops.mha_pair_flops(REAL) == 5 * flops.index_pair_flops(REAL)
    assert flops.mqa_pair_flops(REAL) == 17 * flops.index_pair_flops(REAL)


def test_parameters_of_the_real_model():
    attention = D * Q + Q * H * (N + R) + D * (C + R) + C * H * (N + V) + H * V * D
    indexer = Q * J * W + D * W + D * J
    parts = memory.active_parameters(REAL)
    assert parts["attention"] == 61 * attention
    assert parts["indexer"] == 61 * indexer and indexer + 2 * W == 13_959_424  # with its LayerNorm
    assert parts["feed-forward"] == 3 * 3 * D * 18432 + 58 * 3 * D * 2048
    assert parts["experts"] == 58 * 8 * 3 * D * 2048
    assert parts["router"] == 58 * 256 * D and parts["head"] == 129280 * D
    main = sum(parts.values()) - parts["indexer"]
    assert round(main / 1e9, 2) == 36.62 and round(parts["indexer"] / 1e9, 2) == 0.85
    norms = 61 * (2 * D + Q + C) + D + 58 * 256  # and the router's biases
    assert round((memory.stored_parameters(REAL) - parts["indexer"] + norms) / 1e9, 2) == 671.03


def test_cache_of_the_real_model():
    assert memory.latent_bytes(REAL, "bf16") == 1152 and memory.index_key_bytes(REAL, "bf16") == 256
    assert memory.latent_bytes(REAL, "deployed") == 512 + 4 * 4 + 2 * 64 == 656
    assert memory.index_key_bytes(REAL, "deployed") == 128 + 4
    assert memory.cache_bytes(REAL, "bf16") == 85_888
    assert memory.cache_bytes(REAL, "bf16", indexer=False) == 70_272
    assert memory.cache_bytes(REAL, "deployed") == 48_068
    assert memory.cache_bytes(REAL, "fp32") == 2 * 85_888


def test_crossovers_of_the_real_model():
    assert flops.crossover(REAL, "prefill", weights=False) == 278_528 * 2048 / (81_920 - 16_384) == 8704
    assert flops.crossover(REAL, "decode", weights=False) == 278_528 * 2048 / (278_528 - 16_384) == 2176
    assert flops.crossover(REAL, "prefill") == 8704 + 2 * 13_959_168 / 65_536 == 9130
    assert flops.crossover(REAL, "decode") == 2176 + 2 * 13_959_168 / 262_144 == 2282.5
    assert round(flops.keys_at_index_share(REAL, 0.79)) == 130_974  # as good as 128 Ki
    work = flops.token_flops(REAL, 131_072, "sparse", "prefill")
    assert round(work.scoring / (work.scoring + work.attention), 2) == 0.79


# the definitions agree with each other --------------------------------------------------------------------------------


def configs():
    yield REAL
    yield Config.mini()
    yield small.config(**UNEVEN)
    yield REAL.replace(num_attention_heads=48)


@pytest.mark.parametrize("phase", flops.PHASES)
@pytest.mark.parametrize("config", list(configs()), ids=["real", "mini", "uneven", "48 heads"])
@pytest.mark.parametrize("heads", [1, 8, 64, 128])
def test_the_crossover_is_where_the_totals_meet(config, phase, heads):
    config = config.replace(num_attention_heads=heads)

    def gap(keys):
        dense, sparse = (flops.token_flops(config, keys, kind, phase).total for kind in flops.ATTENTIONS)
        return dense - sparse

    meet = flops.crossover(config, phase)
    if meet == math.inf:
        assert all(gap(10**power) <= 0 for power in range(10))
    else:
        assert gap(max(1, math.floor(meet))) <= 0 or meet < 1
        assert gap(math.floor(meet) + 1) > 0


def test_sparse_may_be_cheaper_before_anything_is_dropped_if_latents_are_narrow():
    narrow = REAL.replace(kv_lora_rank=16, index_n_heads=1)
    meet = flops.crossover(narrow, "prefill")
    assert meet < narrow.index_topk
    totals = [flops.token_flops(narrow, math.floor(meet) + 1, kind, "prefill").total for kind in flops.ATTENTIONS]
    assert totals[0] > totals[1]


@pytest.mark.parametrize("phase", flops.PHASES)
@pytest.mark.parametrize("kind", flops.ATTENTIONS)
@pytest.mark.parametrize("length", [1, 5, 6, 7, 40])
def test_a_prompt_is_the_sum_of_its_tokens(kind, phase, length):
    config = small.config()  # K = 6
    tokens = [flops.token_flops(config, keys, kind, phase) for keys in range(1, length + 1)]
    whole = flops.prompt_flops(config, length, kind, phase)
    assert whole.total == sum(work.total for work in tokens)
    assert whole.attention == sum(work.attention for work in tokens)
    assert whole.scoring == sum(work.scoring for work in tokens)


def test_the_share_of_the_growing_term_is_the_exponent_of_growth():
    def cost(keys):
        work = flops.token_flops(REAL, keys, "sparse", "decode")
        return work.scoring + work.attention

    exponent = math.log(cost(132_000) / cost(130_000)) / math.log(132_000 / 130_000)
    assert flops.keys_at_index_share(REAL, exponent) == pytest.approx(131_000, rel=1e-3)


# against modules, caches and operations -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, UNEVEN, small.DENSE, {**small.DENSE, "q_lora_rank": None}], ids=str)
def test_parameters_are_those_of_the_modules(changes):
    config = small.config(**changes)
    model = Transformer(config)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert memory.stored_parameters(config) == matrices
    assert memory.active_parameters(config).get("indexer", 0) == sum(
        p.numel() for name, p in model.named_parameters() if ".indexer." in name and p.ndim > 1
    )


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_cache_bytes_are_those_of_the_tensors(dtype, precision):
    config, tokens = small.config(), 10
    cache = Transformer(config).to(dtype).new_cache(1, tokens)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.latent, layer.index_key))
    assert held == tokens * memory.cache_bytes(config, precision)
    latents = sum(layer.latent.nbytes for layer in cache.layers)
    assert latents == tokens * memory.cache_bytes(config, precision, indexer=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_read_are_those_of_the_matrices_used(precision):
    size = {"fp32": 4, "bf16": 2}[precision]
    assert memory.weight_bytes_read(REAL, precision) == size * sum(memory.active_parameters(REAL).values())
    many = memory.weight_bytes_read(REAL, precision, tokens=10**6)  # every expert is chosen by somebody
    assert many == size * (memory.stored_parameters(REAL) - 129280 * D)


def test_deployed_weights_take_a_byte_and_their_scales():
    assert memory.Matrix("attention", 256, 300, 1, 1).bytes("deployed") == 256 * 300 + 4 * 2 * 3
    assert memory.Matrix("head", 256, 300, 1, 1, fp8=False).bytes("deployed") == 2 * 256 * 300
    wide = {m.part for m in memory.matrices(REAL) if not m.fp8}
    assert wide == {"router", "head", "indexer"}  # of the indexer its head weights alone
    assert [m.outputs for m in memory.matrices(REAL) if not m.fp8] == [256, 129280, J]


def test_a_group_that_is_not_full_has_a_scale_too():
    odd = REAL.replace(kv_lora_rank=300, index_head_dim=130)
    assert memory.latent_bytes(odd, "deployed") == 300 + 4 * 3 + 2 * R
    assert memory.index_key_bytes(odd, "deployed") == 130 + 4 * 2


def executed(model, tokens, cache=None):
    """FLOP that PyTorch counts in one forward pass. Its fused attention for processors is invisible to the counter, so
    it is switched off."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tokens, cache)
    return counter.get_total_flops()


def tiles(T, size):
    """(queries, keys) of each tile in which chunked kernels work off a prompt."""
    return [(rows.stop - rows.start, seen) for rows, seen in tiled.tiles(T, T, size)]


def dense_extras(config, T):
    """What dense prefill does beyond the triangle: the rest of each tile, and values padded to the keys' width."""
    c = config
    square = sum(rows * seen for rows, seen in tiles(T, tiled.DENSE_TILE))
    key = c.qk_nope_head_dim + c.qk_rope_head_dim
    padding = 2 * c.num_attention_heads * max(0, key - c.v_head_dim)
    other_half = (square - flops.causal_pairs(T)) * flops.mha_pair_flops(c)
    return c.num_hidden_layers * (other_half + square * padding)


def sparse_extras(config, T):
    """What sparse prefill does beyond Eq. 1 and 2: the rest of each tile, the sum over index heads, empty slots."""
    c = config
    scored = sum(rows * seen for rows, seen in tiles(T, query_tile(T, c.index_n_heads)))
    slots = T * min(T, c.index_topk)
    rest = (scored - flops.causal_pairs(T)) * flops.index_pair_flops(c)
    empty = (slots - flops.selected_pairs(T, c.index_topk)) * flops.mqa_pair_flops(c)
    return c.num_hidden_layers * (rest + scored * flops.head_sum_pair_flops(c) + empty)


EXTRAS = {"dense": dense_extras, "sparse": sparse_extras}


@pytest.mark.parametrize("changes", [{}, UNEVEN, {"index_topk": 60}], ids=str)
@pytest.mark.parametrize("kind", flops.ATTENTIONS)
@pytest.mark.parametrize("T", [2, 40, 128, 300])
def test_prefill_runs_what_is_counted_and_named_extras(kind, T, changes):
    config = small.config(**changes, max_position_embeddings=400)
    model = small.model(sizes=config)
    model.attention = kind
    counted = flops.prompt_flops(config, T, kind).total
    assert executed(model, small.tokens(1, T)) == counted + EXTRAS[kind](config, T)


@pytest.mark.parametrize("kind", flops.ATTENTIONS)
@pytest.mark.parametrize("S", [3, 41, 129])
def test_decoding_runs_what_is_counted_and_named_extras(kind, S):
    config = small.config(max_position_embeddings=400)
    model = small.model(sizes=config)
    model.attention = kind
    cache = model.new_cache(1, S)
    with torch.no_grad():
        model(small.tokens(1, S - 1), cache)
    counted = flops.token_flops(config, S, kind, "decode").total
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    value_as_wide_as_key = 2 * heads * S * config.qk_rope_head_dim  # cut off afterwards
    extra = value_as_wide_as_key if kind == "dense" else S * flops.head_sum_pair_flops(config)
    assert executed(model, small.tokens(1, 1), cache) == counted + layers * extra


def test_the_counter_sees_nothing_of_fused_attention_on_a_processor():
    """Why `executed` switches it off: left alone, dense attention would seem to cost nothing."""
    model = small.model()
    model.attention = "dense"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(small.tokens(1, 40))
    assert counter.get_total_flops() == 2 * 40 * (
        sum(memory.active_parameters(model.config).values()) - memory.active_parameters(model.config)["indexer"]
    )


# traffic --------------------------------------------------------------------------------------------------------------


def test_traffic_by_hand():
    dense = flops.decode_traffic(REAL, 131_072, "dense", "bf16")
    sparse = flops.decode_traffic(REAL, 131_072, "sparse", "bf16")
    assert dense.latents == 131_072 * 70_272 and dense.index_keys == 0
    assert sparse.latents == 61 * 2048 * 1152 and sparse.index_keys == 61 * 131_072 * 256
    assert sparse.weights - dense.weights == 2 * 61 * 13_959_168
    eight = flops.decode_traffic(REAL, 131_072, "dense", "bf16", batch=8)
    assert eight.latents == 8 * dense.latents and dense.weights < eight.weights < 8 * dense.weights
    assert dense.total == dense.weights + dense.latents


# refusals -------------------------------------------------------------------------------------------------------------

DENSE = REAL.replace(**small.DENSE)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: flops.token_flops(REAL, 10, "window", "prefill"), "attention='window'"),
        (lambda: flops.token_flops(REAL, 10, "sparse", "training"), "phase='training'"),
        (lambda: flops.token_flops(REAL, 0, "dense", "decode"), "keys=0"),
        (lambda: flops.prompt_flops(REAL, 0, "dense"), "keys=0"),
        (lambda: flops.token_flops(DENSE, 10, "sparse", "decode"), "no indexer"),
        (lambda: flops.crossover(DENSE, "decode"), "no indexer"),
        (lambda: flops.keys_at_index_share(REAL, 1.0), "share=1.0"),
        (lambda: flops.keys_at_index_share(REAL, 0.01), "share=0.01"),
        (lambda: memory.cache_bytes(REAL, "fp4"), "precision='fp4'"),
        (lambda: memory.weight_bytes_read(REAL, "int8"), "precision='int8'"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_dense_model_is_counted_too():
    assert flops.token_flops(DENSE, 131_072, "dense", "decode") == replace(
        flops.token_flops(REAL, 131_072, "dense", "decode")
    )
    assert memory.cache_bytes(DENSE, "bf16") == 70_272
