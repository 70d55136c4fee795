"""An independent implementation computes the same: logits, selected keys, chosen experts, greedy tokens.

`transformers` wrote its DeepSeek-V3.2 without us, and we wrote ours without it. Random models go over as files, so the
checkpoint layout is proven on the way. Top-k lies well below the length, because with K >= S every token is selected
and a broken indexer is invisible. One tolerance: 5e-5 on fp32 logits of deviation 2, and equal choices. (Choices can
only be equal where no tie is cut: with J = 16 index heads, that all ReLUs are zero at once does not happen.)
"""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV32Config, DeepseekV32ForCausalLM

import dsa
import oracle
import small
from dsa.model.config import Yarn

T = 48
V32 = {
    "groups, yarn, a first dense layer": {},
    "no groups": {"n_group": 1, "topk_group": 1},
    "no yarn": {"yarn": None, "rope_theta": 500.0},
    "a yarn ramp within the pairs": {"yarn": Yarn(4, 4096)},
    "a yarn ramp beyond the pairs": {"yarn": Yarn(8, 4096, beta_fast=500), "rope_theta": 10.0},
    "another mscale": {"yarn": Yarn(8, 16, mscale=0.707, mscale_all_dim=0.707)},
    "weights not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "experts everywhere, two of them shared": {"first_k_dense_replace": 0, "n_shared_experts": 2},
    "no experts at all": {"first_k_dense_replace": 3},
    "no rotary-free part in the index": {"index_head_dim": 8},
    "one selected key": {"index_topk": 1},
}
V3 = {
    "groups and yarn": small.DENSE,
    "another mscale": small.DENSE | {"yarn": Yarn(8, 16, mscale=0.707, mscale_all_dim=0.707)},
    "no query latent": small.DENSE | {"q_lora_rank": None},
    "no yarn, no groups": small.DENSE | {"yarn": None, "n_group": 1, "topk_group": 1},
}


def both(tmp_path, sizes, seed=1, gate_bias=0.0):
    """Our random model, and the same weights in their hands."""
    model = small.model(seed, small.config(**sizes), gate_bias)
    dsa.save_pretrained(model, tmp_path)
    return model, oracle.load(tmp_path)


@pytest.mark.parametrize("case", V32)
def test_sparse_models_agree(case, tmp_path):
    model, other = both(tmp_path, V32[case])
    tokens = small.tokens(2, T)
    found, expected = oracle.ours(model, tokens), oracle.theirs(other, tokens)
    assert 1 < expected.logits.std() < 4  # the scale that the tolerance is meant for
    assert len(found.kept) == 3 and len(found.experts) == 3 - model.config.first_k_dense_replace
    assert (found.kept[0][:, -1].sum(-1) == model.top_k).all()
    assert not oracle.differences(found, expected)


@pytest.mark.parametrize("gate_bias", [-3.0, 3.0])
def test_experts_agree_under_biases_of_either_sign(gate_bias, tmp_path):
    """With all biased scores below zero a group masked with 0 instead of -inf would win."""
    model, other = both(tmp_path, {}, gate_bias=gate_bias)
    tokens = small.tokens(2, T)
    assert not oracle.differences(oracle.ours(model, tokens), oracle.theirs(other, tokens))


@pytest.mark.parametrize("length", [1, 2, 6, 7])
def test_short_prompts_and_full_selection_agree(length, tmp_path):
    model, other = both(tmp_path, {})  # K = 6
    tokens = small.tokens(2, length)
    assert not oracle.differences(oracle.ours(model, tokens), oracle.theirs(other, tokens))


def test_our_dense_attention_is_theirs_with_all_keys_selected(tmp_path):
    model = small.model(2)
    model.attention = "dense"
    dsa.save_pretrained(model, tmp_path)
    tokens = small.tokens(1, T)
    assert (model(tokens) - oracle.theirs(oracle.load(tmp_path), tokens).logits).abs().max() < 5e-5


@pytest.mark.parametrize("case", V3)
def test_dense_predecessors_agree(case, tmp_path):
    model, other = both(tmp_path, V3[case])
    assert type(other).__name__ == "DeepseekV3ForCausalLM"
    tokens = small.tokens(2, T)
    assert not oracle.differences(oracle.ours(model, tokens), oracle.theirs(other, tokens))
    with pytest.raises(ValueError, match="dense and has no indexer"):
        model.attention = "sparse"


@pytest.mark.parametrize("sizes", [{}, small.DENSE], ids=["sparse", "dense"])
def test_greedy_tokens_agree_through_both_caches(sizes, tmp_path):
    model, other = both(tmp_path, sizes)
    prompt = small.tokens(2, 20)
    expected = other.generate(prompt, max_new_tokens=30, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert torch.equal(dsa.generate(model, prompt, max_new_tokens=30), expected)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("sizes", [{}, {"yarn": None}, small.DENSE, small.DENSE | {"q_lora_rank": None}])
def test_the_round_trip_through_their_files_is_exact(sizes, tmp_path):
    model, other = both(tmp_path / "ours", sizes)
    other.save_pretrained(tmp_path / "theirs")
    back = dsa.from_pretrained(tmp_path / "theirs")
    assert same_weights(model, back)
    assert back.config == model.config


SHARED = {
    **{name: size for name, size in small.SIZES.items() if name not in ("yarn", *small.DENSE)},
    "num_key_value_heads": small.SIZES["num_attention_heads"], "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                        "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["v32", "v3"])
def test_models_made_by_them_load_here(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "v32":
        index = {name: small.SIZES[name] for name in small.DENSE}
        other = DeepseekV32ForCausalLM(DeepseekV32Config(**SHARED, **index))
    else:
        other = DeepseekV3ForCausalLM(DeepseekV3Config(**SHARED))
    other.set_attn_implementation("eager")
    other.eval().save_pretrained(tmp_path)
    model, tokens = dsa.from_pretrained(tmp_path), small.tokens(2, T)
    expected = oracle.theirs(other, tokens)
    assert not oracle.differences(oracle.ours(model, tokens), expected, tolerance=2.5e-5 * expected.logits.std().item())
