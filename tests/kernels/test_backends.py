"""The right backend is taken without being asked for, and the wrong one says why it cannot and which can."""

import sys
from types import ModuleType

import pytest
import torch

import small
from dsa.kernels import backends, ops

B, T, S, H, J, W, C, R, K = 2, 3, 7, 4, 2, 8, 6, 2, 4
CALLS = {
    "index_scores": lambda d, b: ops.index_scores(*index(d), backend=b),
    "select": lambda d, b: ops.select(torch.zeros(B, T, S, device=d), K, backend=b),
    "index_topk": lambda d, b: ops.index_topk(*index(d), K, backend=b),
    "sparse_attention": lambda d, b: ops.sparse_attention(
        torch.ones(B, T, H, C + R, device=d), torch.ones(B, S, C + R, device=d), chosen(d), 0.5, C, backend=b
    ),
    "dense_attention": lambda d, b: ops.dense_attention(*qkv(d), 0.5, backend=b),
    "attention_mass": lambda d, b: ops.attention_mass(*qkv(d)[:2], 0.5, backend=b),
    "attention_mass, selected": lambda d, b: ops.attention_mass(*qkv(d)[:2], 0.5, chosen(d), backend=b),
    "indexer_loss": lambda d, b: ops.indexer_loss(*index(d), *qkv(d)[:2], 0.5, backend=b),
}


def index(device):
    return [torch.ones(*shape, device=device) for shape in ((B, T, J, W), (B, S, W), (B, T, J))]


def qkv(device):
    return [torch.ones(*shape, device=device) for shape in ((B, T, H, 8), (B, S, 1, 8), (B, S, 1, 5))]


def chosen(device):
    return torch.zeros(B, T, K, dtype=torch.long, device=device)


@pytest.mark.parametrize("operation", CALLS)
def test_tensors_without_numbers_give_the_shape_that_numbers_would(operation):
    made, shape = CALLS[operation]("cpu", "tiled"), CALLS[operation]("meta", None)
    assert shape.is_meta and shape.shape == made.shape and shape.dtype == made.dtype


def test_a_whole_model_runs_without_numbers():
    with torch.device("meta"):
        model = small.Transformer(small.config())  # experts too: whichever are chosen, shapes are the same
        tokens = torch.zeros(2, 20, dtype=torch.long)
    for kind in ("sparse", "dense"):
        model.attention = kind
        assert model(tokens).shape == (2, 20, 61)
        assert model(tokens, model.new_cache(2, 20)).is_meta


def test_a_forced_backend_that_cannot_says_why_and_who_can():
    with pytest.raises(ValueError, match=r"'meta' cannot compute select here, because it returns shapes.*loops"):
        CALLS["select"]("cpu", "meta")


@pytest.fixture
def picky(monkeypatch):
    """A backend for the CPU that knows one operation and wants fp64."""
    module = ModuleType("picky")
    module.select = lambda scores, top_k: "picked"
    module.unsupported_reason = lambda operation, *tensors: "" if tensors[0].dtype == torch.float64 else "it wants fp64"
    monkeypatch.setitem(sys.modules, "picky", module)
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "picky": "picky", "absent": "not_installed"})
    monkeypatch.setattr(backends, "PREFERRED", {"cpu": ("absent", "picky")})


def test_the_first_that_can_is_taken(picky):
    assert ops.select(torch.zeros(1, 2, 2).double(), 1) == "picked"
    assert ops.select(torch.zeros(1, 2, 2), 1).shape == (1, 2, 1)  # the next in the list
    assert torch.equal(CALLS["index_scores"]("cpu", None), CALLS["index_scores"]("cpu", "tiled"))


def test_reasons_are_told_apart(picky):
    for backend, operation, why in (
        ("picky", "select", "it wants fp64: use one of loops, .*, or None"),
        ("picky", "index_scores", "it has no index_scores"),
        ("absent", "select", "it needs not_installed, which is not installed"),
    ):
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot compute {operation} here, because {why}"):
            CALLS[operation]("cpu", backend)
