"""Whatever sizes a model has: it is saved, it loads, and `transformers` computes the same from the folder.

Sizes are drawn, odd ones and single ones included, and with them everything a size can upset: heads of unequal widths,
one expert for each token or all of them, groups, YaRN, layers that are all dense or all experts, FP8 blocks of which
only a corner is filled. Index heads are 12 or more: with few of them all ReLUs may be zero at once, and of equal scores
anyone may choose any.
"""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import dsa
import oracle
import small
from dsa.checkpoint import inspect
from dsa.model.config import Config, Yarn

T = 24
quickly = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.generate],
)


@st.composite
def configs(draw, dense=False):
    """Any small config that `Config` accepts and the format can express."""

    def number(low, high):
        return draw(st.integers(low, high))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    experts = groups * number(2, 4)  # transformers scores even a single group by two experts
    kept = number(1, groups)
    layers, rotary = number(1, 3), 2 * number(1, 5)
    sizes = {
        "vocab_size": number(2, 70), "hidden_size": number(3, 40), "num_hidden_layers": layers,
        "num_attention_heads": number(1, 5), "q_lora_rank": number(2, 20), "kv_lora_rank": number(2, 20),
        "qk_nope_head_dim": number(1, 10), "qk_rope_head_dim": rotary, "v_head_dim": number(1, 14),
        "intermediate_size": number(1, 50), "moe_intermediate_size": number(1, 30), "n_routed_experts": experts,
        "num_experts_per_tok": number(1, min(4, kept * experts // groups)), "n_shared_experts": number(1, 3),
        "n_group": groups, "topk_group": kept, "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "norm_topk_prob": draw(st.booleans()), "first_k_dense_replace": number(0, layers),
        "rope_theta": draw(st.sampled_from([10.0, 1e4])), "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "max_position_embeddings": number(32, 200),
        "yarn": draw(st.none() | st.builds(Yarn, factor=st.sampled_from([1.0, 2.0, 40.0]),
                                           original_max_position_embeddings=st.sampled_from([16, 4096]))),
    }  # fmt: skip
    if not dense:
        sizes |= {"index_n_heads": number(12, 20), "index_head_dim": rotary + number(0, 9), "index_topk": number(1, 30)}
    return Config(**sizes)


def agrees(config, folder):
    """Save, load, and ask both."""
    model = small.model(1, config)
    dsa.save_pretrained(model, folder)
    back = dsa.from_pretrained(folder)
    a, b = model.state_dict(), back.state_dict()
    assert back.config == config and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert inspect.inspect_folder(folder).problem is None
    tokens = small.tokens(2, T, vocab=config.vocab_size)
    found, expected = oracle.ours(back, tokens), oracle.theirs(oracle.load(folder), tokens)
    assume(expected.logits.std() < 20)  # weights drawn at the very edge of what the tolerance is meant for
    tolerance = 5e-5 * max(1, expected.logits.std().item() / 2)
    assert not oracle.differences(found, expected, tolerance)


@pytest.mark.slow
@given(config=configs())
@quickly
def test_any_sparse_model_saves_loads_and_agrees(config):
    with tempfile.TemporaryDirectory() as folder:
        agrees(config, Path(folder))


@pytest.mark.slow
@given(config=configs(dense=True))
@quickly
def test_any_dense_model_saves_loads_and_agrees(config):
    with tempfile.TemporaryDirectory() as folder:
        agrees(config, Path(folder))


@given(config=configs())
@quickly
@torch.no_grad()
def test_any_model_goes_through_fp8(config):
    model, tokens = small.model(2, config), small.tokens(1, T, vocab=config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        dsa.save_pretrained(model, folder, fp8=True)
        wide, kept = (dsa.from_pretrained(folder, keep_fp8=keep) for keep in (False, True))
        assert torch.equal(wide(tokens), kept(tokens))
        assert inspect.inspect_folder(Path(folder)).problem is None
    for name, tensor in wide.state_dict().items():
        assert (tensor - model.state_dict()[name]).abs().max() <= model.state_dict()[name].abs().max() / 16, name
