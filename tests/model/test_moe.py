"""Experts are visited in three ways that give the same; and a decode step waits for its device nowhere."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import small
from dsa.generation.decode import next_logits
from dsa.kernels import shapes
from dsa.model.moe import MoE


@pytest.fixture
def moe():
    [*_, layer] = small.model().model.layers
    assert isinstance(layer.mlp, MoE)
    return layer.mlp


def tokens(n, dtype=torch.float32):
    return torch.randn(n, 48, generator=torch.Generator().manual_seed(n)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 30])
def test_grouped_products_give_what_the_loop_over_experts_gives(moe, n):
    x = tokens(n)
    chosen, weights = moe.gate(x)
    expected = moe.expert_by_expert(x, chosen, weights)
    moe.pack()
    assert torch.allclose(moe.grouped(x, chosen, weights), expected, atol=1e-6)
    if n == 1:
        assert torch.equal(moe.one_token(x, chosen, weights), expected)


def test_packing_moves_weights_and_changes_none(moe):
    before = {name: p.clone() for name, p in moe.state_dict().items()}
    assert not moe.is_packed
    moe.pack()
    assert moe.is_packed and all(torch.equal(p, before[name]) for name, p in moe.state_dict().items())
    gate = moe.experts[1].gate_proj.weight
    assert gate.untyped_storage().data_ptr() == moe.experts[0].gate_proj.weight.untyped_storage().data_ptr()
    moe(tokens(4)[None]).sum().backward()
    assert any(expert.gate_proj.weight.grad is not None for expert in moe.experts)
    moe.to(torch.float64)
    assert not moe.is_packed, "weights of another type lie elsewhere"


def test_experts_on_another_rank_are_not_packed(moe):
    moe.experts[0] = None
    moe.pack()
    assert not moe.is_packed


class NoWaiting(TorchDispatchMode):
    """Refuses whatever reads a number back from the tensors' device, or makes a shape depend on one."""

    WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "bincount", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.WAITS, f"the step waits in {function}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["sparse", "dense", "window"])
@pytest.mark.parametrize("precision", ["full", "fp8"])
def test_a_decode_step_on_a_gpu_never_waits_for_it(attention, precision, monkeypatch):
    """The kernels' part is left out: they give shapes here, as on tensors without numbers.

    A step that waits nowhere can be recorded as a CUDA graph, and the device never idles between two layers.
    """
    monkeypatch.setattr("dsa.kernels.backends.PREFERRED", {"cpu": ("meta",)})
    monkeypatch.setattr(shapes, "unsupported_reason", lambda *_: "")
    for accepts in ("ACCEPTS_QUANTIZED_KV", "ACCEPTS_QUANTIZED_KEYS"):
        monkeypatch.setattr(shapes, accepts, True, raising=False)
    monkeypatch.setattr(MoE, "forward", as_on_a_gpu)
    model = small.model(sizes=small.config(kv_lora_rank=128))
    model.attention, model.cache_precision = attention, precision
    cache = model.new_cache(2, 40)
    next_logits(model, small.tokens(2, 20), cache)
    with NoWaiting():
        logits = next_logits(model, small.tokens(2, 1), cache)
    assert logits.shape == (2, 61) and cache.length == 21


def as_on_a_gpu(self, x):
    """The way a packed model goes there in bf16."""
    if not self.is_packed:
        self.pack()
    tokens = x.flatten(0, -2)
    return (self.grouped(tokens, *self.gate(tokens)) + self.shared_experts(tokens)).view_as(x)


def test_the_ways_that_wait_are_noticed():
    model = small.model()
    cache = model.new_cache(1, 40)
    next_logits(model, small.tokens(1, 20), cache)
    with pytest.raises(AssertionError, match="the step waits in aten"), NoWaiting():
        next_logits(model, small.tokens(1, 1), cache)  # on a processor, where waiting costs nothing
