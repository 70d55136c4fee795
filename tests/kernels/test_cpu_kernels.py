"""What runs on a processor by default equals the reference, at every edge of every tile, in little memory.

In fp64, and mostly with whole numbers: products are then exact in any order, ties are frequent, and selections must
agree to the last key. Tiles are made tiny, so that a few tokens cross all their edges.
"""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa.kernels import fp8, loops, ops, reference, tiled
from dsa.kernels.cpu import backend, dense, gathered, matmul_speed, scoring, topk
from dsa.kernels.loops import EMPTY
from memory import peak_of_script

B, H, J, W, C, R, SCALE = 2, 3, 2, 5, 6, 2, 0.7
SHAPES = [(1, 1), (6, 6), (9, 9), (3, 8), (4, 9), (1, 7), (2, 13)]  # (T, S)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for module, name, size in (
        (scoring, "MAX_ROWS", 6), (scoring, "MAX_QUERIES", 3), (scoring, "BUFFER_ELEMENTS", 24),
        (gathered, "GATHER_ELEMENTS", 70), (dense, "QUERY_TILE", 4), (dense, "KEY_TILE", 3),
        (topk, "GROUPS_PER_K", 2), (topk, "MIN_ELEMENTS", 0), (topk, "GROUP", 2),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, size)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def index_factors(T, S, dtype=torch.float64):
    shapes = (B, T, J, W), (B, S, W), (B, T, J)
    return [randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def as_sets(selected):
    return [[sorted(s for s in row if s != EMPTY) for row in batch] for batch in selected.tolist()]


def same(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(
        found.nan_to_num(neginf=0), expected.nan_to_num(neginf=0), atol=tolerance, rtol=tolerance
    )


# ---- scores and selection


@pytest.mark.parametrize(("T", "S"), SHAPES)
def test_scores_are_the_references(T, S):
    same(ops.index_scores(*index_factors(T, S), backend="cpu"), reference.index_scores(*index_factors(T, S)))


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_the_selection_is_the_references_with_ties_and_at_all_edges(data):
    T, K = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 24))
    S = T + data.draw(st.integers(0, 40))
    factors = [x.round() for x in index_factors(T, S)]  # whole numbers: many exact ties
    most = {"MAX_ROWS": 12, "MAX_QUERIES": 7, "BUFFER_ELEMENTS": 60}
    sizes = {name: data.draw(st.integers(1, size)) for name, size in most.items()}
    with mock.patch.multiple(scoring, **sizes), mock.patch.multiple(topk, GROUP=data.draw(st.integers(2, 5))):
        found = ops.index_topk(*factors, K, backend="cpu")
    assert found.shape == (B, T, min(K, S))
    assert as_sets(found) == as_sets(ops.index_topk(*factors, K, backend="reference"))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_two_levels_find_the_largest_and_know_whether_an_equal_was_left_out(data):
    S = data.draw(st.integers(1, 60))
    k = data.draw(st.integers(1, S))
    values = st.sampled_from([float("-inf"), -1.0, 0.0, 1.0, 2.0, 3.0])
    x = torch.tensor([data.draw(st.lists(values, min_size=S, max_size=S)) for _ in range(3)])
    places, least, left_out = topk.grouped_topk(x, k)
    right = x.sort(-1, descending=True).values
    assert torch.equal(x.gather(1, places).sort(-1, descending=True).values, right[:, :k])
    assert all(len(set(row)) == k for row in places.tolist())
    assert torch.equal(least[:, 0], right[:, k - 1])
    assert torch.equal(left_out, (x >= least).sum(-1) > k)


def test_grouping_looks_at_far_fewer_numbers(monkeypatch):
    """Of 65,536 numbers `topk`, which is slow, gets a few thousand."""
    monkeypatch.undo()
    x, seen, plain = randn(1, 65536, dtype=torch.float32), [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda row, *a, **b: seen.append(row.numel()) or plain(row, *a, **b))
    places, _, _ = topk.grouped_topk(x, 64)
    assert torch.equal(x[0, places[0]].sort().values, x.sort().values[0, -64:]) and sum(seen) < 65536 / 5


def test_prefill_chunks_and_decode_choose_alike():
    T = 23
    q, k, w = (x.round() for x in index_factors(T, T))
    for K in (1, 4, 9):
        whole = as_sets(ops.index_topk(q, k, w, K))
        for pieces in ([5, 16, T], range(1, T + 1)):
            begin, parts = 0, [[] for _ in range(B)]
            for end in pieces:
                chosen = as_sets(ops.index_topk(q[:, begin:end], k[:, :end], w[:, begin:end], K))
                parts = [found + more for found, more in zip(parts, chosen, strict=True)]
                begin = end
            assert parts == whole


# ---- eight bits


def codes(T, S, width=16):
    q, k, w = randn(B, T, J, width), randn(B, S, width, seed=1), randn(B, T, J, seed=2, dtype=torch.float32)
    (q8, q_scale), k8 = fp8.quantize_int8(q), fp8.QuantizedTensor(*fp8.quantize_int8(k))
    return (q8, k8, w * q_scale[..., 0]), fp8.index_scores(q8, q_scale, *k8, w)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("T", "S"), SHAPES)
def test_codes_are_multiplied_as_they_are_or_widened_with_the_same_scores(T, S, fast, monkeypatch):
    monkeypatch.setattr(scoring, "is_fast", lambda dtype: fast)
    factors, expected = codes(T, S)
    with mock.patch.object(torch, "_int_mm", wraps=torch._int_mm) as product:
        found = ops.index_scores(*factors)
    assert bool(product.call_count) == fast
    same(found, expected, 1e-5)
    assert as_sets(ops.index_topk(*factors, 3)) == as_sets(ops.select(found, 3))
    same(ops.index_scores(*factors, backend="tiled"), expected, 1e-5)  # which gets them expanded


def test_fp8_codes_are_widened():
    q, k, w = randn(B, 5, J, 16), randn(B, 9, 16, seed=1), randn(B, 5, J, seed=2, dtype=torch.float32)
    (q8, q_scale), k8 = fp8.quantize(q), fp8.QuantizedTensor(*fp8.quantize(k))
    same(ops.index_scores(q8, k8, w * q_scale[..., 0]), fp8.index_scores(q8, q_scale, *k8, w), 1e-5)


def test_a_machine_that_multiplies_wrongly_or_not_at_all_is_not_fast(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b, out=None: torch.zeros(256, 256, dtype=torch.int32))
    assert matmul_speed.matmul_seconds(torch.int8) == float("inf")
    monkeypatch.delattr(torch, "_int_mm")
    assert matmul_speed.matmul_seconds(torch.int8) == float("inf")
    assert 0 < matmul_speed.matmul_seconds(torch.float32) < 1


# ---- attention


@pytest.mark.parametrize(("T", "S"), SHAPES)
@pytest.mark.parametrize("K", [1, 4, 30])
def test_sparse_attention_is_the_references(T, S, K):
    q, kv = randn(B, T, H, C + R), randn(B, S, C + R, seed=1)
    selected = ops.index_topk(*index_factors(T, S), K)
    expected = reference.sparse_attention(q, kv, selected, SCALE, C)
    same(ops.sparse_attention(q, kv, selected, SCALE, C, backend="cpu"), expected)
    inside_a_cache = randn(B, S + 3, C + R, seed=7)
    inside_a_cache[:, :S] = kv
    same(ops.sparse_attention(q, inside_a_cache[:, :S], selected, SCALE, C, backend="cpu"), expected)


@pytest.mark.parametrize(("T", "S"), SHAPES)
@pytest.mark.parametrize("G", [1, H])
def test_the_dense_baseline_is_the_references(T, S, G):
    q, k, v = randn(B, T, H, C + R), randn(B, S, G, C + R, seed=1), randn(B, S, G, C, seed=2)
    same(ops.dense_attention(q, k, v, SCALE, backend="cpu"), reference.dense_attention(q, k, v, SCALE))


@pytest.mark.parametrize("few", [0, H])
@pytest.mark.parametrize("shared", [True, False])
def test_one_token_is_decoded_by_the_fused_kernel_or_in_tiles_without_a_copy_of_shared_values(few, shared, monkeypatch):
    monkeypatch.setattr(dense, "FUSED_DECODE_HEADS", few)
    q, k = randn(B, 1, H, C + R, dtype=torch.float32), randn(B, 9, 1, C + R, seed=1, dtype=torch.float32)
    v = k[..., :C] if shared else randn(B, 9, 1, C, seed=2, dtype=torch.float32)
    with (
        mock.patch.object(dense, "flash_attention", wraps=dense.flash_attention) as fused,
        mock.patch.object(tiled.F, "pad", wraps=tiled.F.pad) as padded,
    ):
        found = ops.dense_attention(q, k, v, SCALE, backend="cpu")
    assert (fused.call_count, padded.call_count) == (B * bool(few), B * bool(few and not shared))
    same(found, reference.dense_attention(q, k, v, SCALE), 1e-6)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_the_wide_result_and_keeps_its_type(dtype, fast, monkeypatch):
    monkeypatch.setattr(scoring, "is_fast", lambda dtype: fast)
    T, S = 5, 9
    q, kv = randn(B, T, H, C + R, dtype=dtype), randn(B, S, C + R, seed=1, dtype=dtype)
    selected = ops.index_topk(*index_factors(T, S), 4)
    for found, wide in (
        (
            ops.sparse_attention(q, kv, selected, SCALE, C, backend="cpu"),
            reference.sparse_attention(q.double(), kv.double(), selected, SCALE, C),
        ),
        (
            ops.dense_attention(q[:, -1:], kv[:, :, None], kv[:, :, None, :C], SCALE, backend="cpu"),
            reference.dense_attention(q[:, -1:].double(), kv[:, :, None].double(), kv[:, :, None, :C].double(), SCALE),
        ),
    ):
        assert found.dtype == dtype and (found.double() - wide).norm() < 0.01 * wide.norm()
    factors = index_factors(T, S, dtype)
    scores = ops.index_scores(*factors, backend="cpu")
    same(scores, reference.index_scores(*factors), 0.05)
    assert scores.dtype == torch.float32


def test_gradients_are_left_to_those_who_keep_what_it_takes():
    q, kv = randn(1, 2, H, C + R).requires_grad_(), randn(1, 4, C + R)
    selected = torch.zeros(1, 2, 1, dtype=torch.long)
    assert ops.sparse_attention(q, kv, selected, SCALE, C).requires_grad
    with pytest.raises(
        ValueError, match="'cpu' cannot compute sparse_attention here, because it keeps nothing to find a"
    ):
        ops.sparse_attention(q, kv, selected, SCALE, C, backend="cpu")
    with torch.no_grad(), mock.patch.object(gathered, "attend", wraps=gathered.attend) as ours:
        ops.sparse_attention(q, kv, selected, SCALE, C)
    assert ours.called


def test_the_baseline_respects_a_switched_off_fused_kernel_and_wide_values():
    q, k, v = randn(1, 3, H, 4), randn(1, 5, H, 4), randn(1, 5, H, 9)
    assert "wider" in backend.unsupported_reason("dense_attention", q, k, v)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "switched off" in backend.unsupported_reason("dense_attention", q, k, k)


# ---- what it takes

LAYER = """
import sys, torch
from dsa.bench import layer
from dsa.bench.cpu import SHAPES
torch.set_num_threads(1)
torch.set_grad_enabled(False)
shape, keys, queries = SHAPES[sys.argv[1]](), int(sys.argv[2]), int(sys.argv[3])
layer.sparse_call(shape, 512, min(queries, 64))()  # libraries loaded
call = layer.sparse_call(shape, keys, queries)
"""


@pytest.mark.parametrize(("shape", "queries"), [("s2", 2048), ("real", 16)])
def test_the_operating_system_sees_less_than_200_mb_at_32k(shape, queries):
    """Beside its inputs, for the last queries of 32,768 tokens, the dearest; a T x S matrix of one head is 4 GB."""
    assert peak_of_script(LAYER, "call()", shape, 32768, queries) < 200e6


@pytest.mark.parametrize("operation", ["index_topk", "sparse_attention", "dense_attention"])
def test_many_short_sequences_are_done_together(operation, monkeypatch):
    from dsa.kernels.cpu import backend

    random = torch.Generator().manual_seed(0)
    make = {
        "index_topk": lambda B: (*(torch.randn(B, *n, generator=random) for n in ((2, 2, 8), (40, 8), (2, 2))), 4),
        "sparse_attention": lambda B: (
            torch.randn(B, 1, 2, 8, generator=random), torch.randn(B, 40, 8, generator=random),
            torch.arange(4).expand(B, 1, 4), 0.3, 6,
        ),
        "dense_attention": lambda B: (
            torch.randn(B, 1, 2, 8, generator=random), *[torch.randn(B, 40, 1, 8, generator=random)] * 2, 0.3
        ),
    }[operation]  # fmt: skip
    called = []
    together = getattr(backend.tiled, operation)
    monkeypatch.setattr(backend.tiled, operation, lambda *given: called.append(1) or together(*given))
    getattr(ops, operation)(*make(backend.BATCHED_FROM - 1))
    assert not called
    getattr(ops, operation)(*make(backend.BATCHED_FROM))
    assert called == [1]


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("top_k", [1, 5, 40, 64])
def test_a_decoded_token_chooses_and_attends_as_the_loops_say(B, top_k):
    """One query a sequence takes a way of its own; half of the scores are equal, and zero."""
    random = torch.Generator().manual_seed(top_k)
    q, k, w = (torch.randn(B, *n, generator=random) for n in ((1, 2, 8), (40, 8), (1, 2)))
    k[:, ::2] = 0
    right = loops.index_topk(q, k, w, top_k)
    found = ops.index_topk(q, k, w, top_k, backend="cpu")
    assert torch.equal(found.sort(-1).values, right.sort(-1).values)
    latents = torch.randn(B, 40, 8, generator=random)
    queries = torch.randn(B, 1, 4, 8, generator=random)
    found[:, :, 1:3] = ops.EMPTY
    one = ops.sparse_attention(queries, latents, found, 0.3, 6, backend="cpu")
    assert torch.allclose(one, loops.sparse_attention(queries, latents, found, 0.3, 6), atol=1e-6)
