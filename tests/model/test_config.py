"""A config is refused before a tensor is built, and the published one has the published number of parameters.

An error names the field, its value and the limit. Published files of either style read in; what is not computed here is
refused instead of ignored. The real model is built on the meta device and counted part by part.
"""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import small
from dsa.model.config import Config, Yarn
from dsa.model.transformer import Transformer

REFUSED = {
    "zero width": ({"hidden_size": 0}, "hidden_size=0 must be a whole number of at least 1"),
    "fraction": ({"kv_lora_rank": 2.5}, "kv_lora_rank=2.5 must be a whole number"),
    "text": ({"vocab_size": "61"}, "vocab_size='61' must be a whole number"),
    "bool": ({"num_hidden_layers": True}, "num_hidden_layers=True must be a whole number"),
    "top-k": ({"index_topk": 0}, "index_topk=0 must be a whole number of at least 1"),
    "negative": ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1 must be a whole number of at least 0"),
    "odd": ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 must be even"),
    "theta": ({"rope_theta": 0.0}, "rope_theta=0.0 must be a number above 0"),
    "eps": ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a number above 0"),
    "scaling": ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor='2.5' must be a number above 0"),
    "flag": ({"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
    "half an indexer": ({"index_n_heads": None}, r"index_n_heads, .* = \[None, 16, 6\]: give all three, or none"),
    "narrow": ({"index_head_dim": 4}, "index_head_dim=4 must be at least qk_rope_head_dim=8"),
    "groups": ({"n_group": 3}, "n_routed_experts=8 must be a multiple of n_group=3"),
    "kept groups": ({"topk_group": 5}, "topk_group=5 exceeds n_group=4"),
    "experts": ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 exceeds the 4 experts in topk_group=2 groups"),
    "lonely": ({"n_group": 8, "topk_group": 8}, "n_group=8 leaves 1 expert a group.*at most 4 groups"),
    "dense": ({"first_k_dense_replace": 4}, "first_k_dense_replace=4 exceeds num_hidden_layers=3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_name_field_value_and_limit(case):
    changes, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        small.config(**changes)
    with pytest.raises(ValueError, match=words):
        small.config().replace(**changes)


def test_yarn_is_checked_too():
    with pytest.raises(ValueError, match=r"YaRN factor=0\.5 must be at least 1"):
        Yarn(0.5, 16)
    with pytest.raises(ValueError, match=r"mscale=1\.0 and mscale_all_dim=0\.7 differ"):
        Yarn(4, 16, mscale_all_dim=0.7)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small.config().hidden_size = 5


PUBLISHED = {  # as the file beside the published weights has it, sizes in the old style
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def test_old_and_new_style_files_are_the_real_model():
    assert Config.from_dict(PUBLISHED) == Config.v32_exp()
    old = dict(PUBLISHED)
    scaling = old.pop("rope_scaling")
    rope = {"rope_type": "yarn", "rope_theta": old.pop("rope_theta")}
    rope |= {name: value for name, value in scaling.items() if name != "type"}
    assert Config.from_dict(old | {"rope_parameters": rope}) == Config.v32_exp()
    plain = Config.from_dict(old | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    assert plain.yarn is None and plain.rope_theta == 500.0
    dense = Config.from_dict(PUBLISHED | {"model_type": "deepseek_v3"})
    assert dense.index_topk is None and dense.hidden_size == 7168


UNSUPPORTED = {
    "model_type": "llama", "hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": True,
    "scoring_func": "softmax", "topk_method": "greedy", "moe_layer_freq": 2, "mlp_bias": True, "rope_interleave": False,
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_features_that_are_not_computed_are_refused(name):
    value = UNSUPPORTED[name]
    with pytest.raises(ValueError, match=f"config has {name}={value!r}, but only"):
        Config.from_dict(PUBLISHED | {name: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 8}, "num_key_value_heads=8 must equal num_attention_heads=128"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear' is not computed here"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1.0}}, "yarn rope needs mscale_all_dim too"),
        (
            {"rope_scaling": PUBLISHED["rope_scaling"] | {"truncate": False}},
            "a yarn rope with {'truncate': False} is not computed here",
        ),
        ({"mlp_layer_types": ["sparse"] * 61}, "is not 3 dense layers"),
    ],
)
def test_other_combinations_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Config.from_dict(PUBLISHED | changes)


def test_missing_sizes_are_listed():
    lacking = {name: value for name, value in PUBLISHED.items() if name not in ("v_head_dim", "hidden_size")}
    with pytest.raises(ValueError, match=r"config lacks hidden_size, v_head_dim: add these sizes"):
        Config.from_dict(lacking)


@given(
    layers=st.integers(1, 4), rank=st.one_of(st.none(), st.integers(1, 9)), indexed=st.booleans(),
    yarn=st.none() | st.builds(Yarn, st.floats(1, 50), st.integers(1, 9999), st.floats(2, 64), st.floats(0.1, 2)),
    theta=st.floats(1, 1e7), scaling=st.floats(0.1, 5), eps=st.floats(1e-9, 1e-3),
)  # fmt: skip
def test_writing_and_reading_a_config_is_exact(layers, rank, indexed, yarn, theta, scaling, eps):
    config = small.config(
        num_hidden_layers=layers, q_lora_rank=rank, yarn=yarn, rope_theta=theta, routed_scaling_factor=scaling,
        rms_norm_eps=eps, first_k_dense_replace=1, **({} if indexed else small.DENSE),
    )  # fmt: skip
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# ---- the real model, counted


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def real():
    with torch.device("meta"):
        return Transformer(Config.v32_exp())


def billions(n):
    return round(n / 1e9, 2)


def test_parameters_of_the_real_model_part_by_part(real):
    layers = real.model.layers
    indexers = sum(count(layer.self_attn.indexer) for layer in layers)
    attention = sum(count(layer.self_attn) for layer in layers) - indexers
    dense = sum(count(layer.mlp) for layer in layers[:3])
    experts = sum(count(layer.mlp) for layer in layers[3:])
    assert [count(layer.self_attn.indexer) for layer in layers] == [13_959_424] * 61
    assert round(indexers / 1e6, 1) == 851.5
    assert billions(count(real.model.embed_tokens)) == billions(count(real.lm_head)) == 0.93
    assert (billions(attention), billions(dense), round(experts / 1e9, 1)) == (11.41, 1.19, 656.6)
    assert billions(count(real) - indexers) == 671.03


def test_the_published_685_billion_include_multi_token_prediction(real):
    """One more decoder layer, a projection of two states to one, and copies of embedding and head."""
    D, indexer = real.config.hidden_size, 13_959_424
    norms = 3 * D  # of the embedding, of the hidden state, before the head
    own = count(real.model.layers[-1]) - indexer + 2 * D * D + norms
    assert round(own / 1e9, 1) == 11.6
    copies = count(real.model.embed_tokens) + count(real.lm_head)
    assert round((count(real) + own + indexer + copies) / 1e9) == 685


def test_about_37_billion_are_active_per_token(real):
    idle = sum(count(expert) for layer in real.model.layers[3:] for expert in layer.mlp.experts[8:])
    active = count(real) - idle - count(real.model.embed_tokens)  # one row of the embedding is read
    indexers = 61 * 13_959_424
    assert round((active - indexers) / 1e9, 1) == 36.6 and round(active / 1e9) == 37


def test_the_laptop_model_is_small():
    assert 0.5e6 < count(Transformer(Config.mini())) < 0.8e6
