"""The bills of the alternatives are what their code does, and at the real sizes what the chapter says."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dsa
import small
from course.experiments import variant_costs
from course.experiments.attention_variants import delta, moba, nsa, quest
from course.experiments.attention_variants.selective_attention import Budget
from course.experiments.variant_costs import DESIGNS, REAL, token_cost
from dsa.analysis.flops import decode_traffic, token_flops
from dsa.analysis.memory import cache_bytes

TINY, KEYS = Budget(keys=12, block=4, sinks=2, components=5), 24
REAL_SIZES = dsa.Config.v32_exp()


def counted(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def test_dsa_is_billed_as_in_the_roofline():
    for keys in (1, 100, 2048, 50_000):
        work = token_flops(REAL_SIZES, keys, "sparse", "decode")
        layers, found = REAL_SIZES.num_hidden_layers, token_cost("dsa", REAL_SIZES, keys)
        assert found.flops * layers == work.indexer_weights + work.scoring + work.attention
        dense = token_flops(REAL_SIZES, keys, "dense", "decode")
        assert token_cost("dense", REAL_SIZES, keys).flops * layers == dense.attention
        for name, kind in (("dense", "dense"), ("dsa", "sparse")):
            traffic = decode_traffic(REAL_SIZES, keys, kind, "bf16")
            assert 2 * token_cost(name, REAL_SIZES, keys).read * layers == traffic.cache
            assert 2 * token_cost(name, REAL_SIZES, keys).stored * layers == cache_bytes(
                REAL_SIZES, "bf16", kind == "sparse"
            )


def test_the_proxies_are_billed_as_their_code_computes_them():
    config = small.config()
    H, width = config.num_attention_heads, config.kv_lora_rank + config.qk_rope_head_dim
    q, kv = torch.randn(1, 1, H, width), torch.randn(1, KEYS, width)
    for name, scores in (("moba", moba.mean_logits), ("quest", quest.bounds)):
        assert counted(scores, q, kv, 4, 1.0) == token_cost(name, config, KEYS, TINY).scoring
    layer = nsa.Nsa(config, 0, TINY)
    attended = counted(
        layer.compressed, q, torch.cat([kv, kv[:, :1]], 1)
    )  # 25 tokens: six whole blocks and a begun one
    per_block = token_cost("nsa", config, KEYS, TINY).scoring / 6
    network = 2 * (TINY.block + 1) * width**2
    assert attended == 7 * (per_block + network)
    assert token_cost("nsa", config, KEYS, TINY).projections * TINY.block == network


def test_gated_deltanet_is_billed_as_its_recurrence_computes_it():
    H, W, V = 4, variant_costs.DELTA_WIDTH, 12
    config = small.config(v_head_dim=V)
    q = torch.randn(1, 1, H, W)
    flops = counted(delta.recurrent, q, q, torch.randn(1, 1, H, V), torch.zeros(1, 1, H), torch.ones(1, 1, H))
    full = token_cost("dense", config, KEYS)
    write = 2 * H * W * V  # an outer product, which the counter does not see
    assert token_cost("delta", config, KEYS).flops == 0.25 * full.flops + 0.75 * (flops + write)
    assert token_cost("delta", config, KEYS).state == 0.75 * H * W * V


@pytest.mark.parametrize("design", DESIGNS)
def test_a_longer_text_costs_more_or_the_same(design):
    costs = [token_cost(design, REAL_SIZES, keys) for keys in (1, 500, 2048, 10_000, 10**6)]
    assert all(a.flops <= b.flops and a.read <= b.read for a, b in pairwise(costs))
    assert all(math.isfinite(one.memory(10**6)) and one.flops > 0 for one in costs)


def test_who_wins_at_128k_and_who_below_the_budget():
    long = {design: token_cost(design, REAL_SIZES, 131_072) for design in DESIGNS}
    assert long["window"].flops < long["moba"].flops < long["nsa"].flops < long["quest"].flops < long["dsa"].flops
    assert long["dsa"].flops < long["delta"].flops < long["dense"].flops
    assert long["dsa"].flops == long["msa"].flops and long["msa"].candidates * REAL.block == long["dsa"].candidates
    assert long["dsa"].scoring == long["sparq"].scoring  # 64 heads of 128 are 128 heads of 64 components
    short = {design: token_cost(design, REAL_SIZES, 2048) for design in DESIGNS}
    assert short["dsa"].flops > short["dense"].flops
    assert max(DESIGNS, key=lambda design: long[design].memory(131_072)) in ("dsa", "msa")


@pytest.mark.parametrize(
    ("design", "keys", "message"), [("flash", 9, "design='flash' is unknown"), ("dsa", 0, "keys=0: a token sees")]
)
def test_what_cannot_be_billed_is_refused(design, keys, message):
    with pytest.raises(ValueError, match=message):
        token_cost(design, REAL_SIZES, keys)


def test_a_learned_proxy_needs_an_indexer():
    with pytest.raises(ValueError, match="this config is dense and has no indexer"):
        token_cost("dsa", small.config(**small.DENSE), 9)
