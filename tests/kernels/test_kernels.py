"""Loops, masked reference and tiled kernels are one function: forward, every gradient, every shape of call.

Comparisons run in fp64, where different orders of summation agree to 1e-12, so that a wrong mask or a lost key cannot
hide behind rounding. The tiled kernels run with tiny tiles, so that a handful of tokens already crosses every edge.
Beside equality two costs are proven by counting instead of timing: scoring keeps nothing of size T x S, and a decoded
token pays for K keys whatever the context.
"""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right
from torch.utils.flop_counter import FlopCounterMode

from dsa.bench.memory import peak_bytes
from dsa.kernels import fp8, ops, reference, tiled

BACKENDS = ["reference", "tiled"]
SHAPES = [(1, 1), (6, 6), (9, 9), (3, 8), (4, 9), (1, 7)]  # (T, S): prompts, chunks, decoded tokens
B, H, J, W, C, R, SCALE = 2, 3, 4, 5, 6, 2, 0.7


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name, size in {"QUERY_TILE": 3, "KEY_TILE": 2, "DENSE_TILE": 4}.items():
        monkeypatch.setattr(tiled, name, size)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def index_factors(T, S, dtype=torch.float64):
    return [
        randn(B, T, J, W, seed=1, dtype=dtype),
        randn(B, S, W, seed=2, dtype=dtype),
        randn(B, T, J, seed=3, dtype=dtype),
    ]


def qkv(T, S, G, dtype=torch.float64):
    return [randn(B, T, H, C + R, seed=4, dtype=dtype), randn(B, S, G, C + R, seed=5, dtype=dtype),
            randn(B, S, G, C, seed=6, dtype=dtype)]  # fmt: skip


def some_keys(T, S, K=4):
    """Any selection will do: take the indexer's."""
    return ops.index_topk(*index_factors(T, S), K, backend="loops")


OPERATIONS = {
    "index_scores": lambda T, S: (index_factors(T, S), lambda x, b: ops.index_scores(*x, backend=b)),
    "sparse_attention": lambda T, S: (
        [randn(B, T, H, C + R), randn(B, S, C + R, seed=1)],
        lambda x, b: ops.sparse_attention(*x, some_keys(T, S), SCALE, C, backend=b),
    ),
    "dense_attention, a key per head": lambda T, S: (
        qkv(T, S, H), lambda x, b: ops.dense_attention(*x, SCALE, backend=b),
    ),
    "dense_attention, one shared key": lambda T, S: (
        qkv(T, S, 1), lambda x, b: ops.dense_attention(*x, SCALE, backend=b),
    ),
    "dense_attention, values wider than keys": lambda T, S: (
        [*qkv(T, S, H)[:2], randn(B, S, H, 11)], lambda x, b: ops.dense_attention(*x, SCALE, backend=b),
    ),
    "attention_mass, a key per head": lambda T, S: (
        qkv(T, S, H)[:2], lambda x, b: ops.attention_mass(*x, SCALE, backend=b),
    ),
    "attention_mass, one shared key": lambda T, S: (
        qkv(T, S, 1)[:2], lambda x, b: ops.attention_mass(*x, SCALE, backend=b),
    ),
    "attention_mass, selected, a key per head": lambda T, S: (
        qkv(T, S, H)[:2], lambda x, b: ops.attention_mass(*x, SCALE, some_keys(T, S), backend=b),
    ),
    "attention_mass, selected, one shared key": lambda T, S: (
        qkv(T, S, 1)[:2], lambda x, b: ops.attention_mass(*x, SCALE, some_keys(T, S), backend=b),
    ),
    "indexer_loss, warm-up": lambda T, S: (
        index_factors(T, S), lambda x, b: ops.indexer_loss(*x, *qkv(T, S, 1)[:2], SCALE, backend=b),
    ),
    "indexer_loss, sparse": lambda T, S: (
        index_factors(T, S), lambda x, b: ops.indexer_loss(*x, *qkv(T, S, 1)[:2], SCALE, some_keys(T, S), backend=b),
    ),
    "indexer_loss, sparse, a key per head": lambda T, S: (
        index_factors(T, S), lambda x, b: ops.indexer_loss(*x, *qkv(T, S, H)[:2], SCALE, some_keys(T, S), backend=b),
    ),
}  # fmt: skip


def forward_and_gradients(inputs, call, backend):
    """The result and the gradient of each input, for one random cotangent."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = call(leaves, backend)
    finite = out.masked_fill(out == float("-inf"), 0)
    (finite * randn(*out.shape, seed=9)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def error_ratio(found, expected):
    """Size of the error in units of what was expected; equal infinities are no error."""
    assert torch.equal(found.isinf(), expected.isinf())
    found, expected = found.nan_to_num(neginf=0), expected.nan_to_num(neginf=0)
    return (found - expected).norm() / expected.norm().clamp(min=1e-3)  # some gradients are exactly 0


@pytest.mark.parametrize(("T", "S"), SHAPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_three_ways_agree_forward_and_backward(operation, T, S):
    inputs, call = OPERATIONS[operation](T, S)
    expected = forward_and_gradients(inputs, call, "loops")
    for backend in BACKENDS:
        for found, wanted in zip(forward_and_gradients(inputs, call, backend), expected, strict=True):
            assert error_ratio(found, wanted) < 1e-12, f"{backend} differs from loops"


@pytest.mark.parametrize("operation", ["indexer_loss, warm-up", "indexer_loss, sparse"])
def test_no_gradient_of_the_loss_enters_the_attention(operation):
    T, S = 5, 5
    q, k = (x.requires_grad_() for x in qkv(T, S, 1)[:2])
    for backend in ["loops", *BACKENDS]:
        selected = some_keys(T, S) if "sparse" in operation else None
        index = [x.requires_grad_() for x in index_factors(T, S)]
        ops.indexer_loss(*index, q, k, SCALE, selected, backend=backend).backward()
        assert q.grad is None and k.grad is None and all(x.grad is not None for x in index)


def as_sets(selected):
    return [[set(row.tolist()) for row in batch] for batch in selected]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_selection_is_the_first_k_by_score_then_by_recency(data):
    """Scores from a few values only, so that nearly every row has ties, at the edge of the selection too."""
    T = data.draw(st.integers(1, 7))
    S = data.draw(st.integers(T, 12))
    K = data.draw(st.integers(1, 14))
    rows = data.draw(
        st.lists(st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=S, max_size=S), min_size=T, max_size=T)
    )
    scores = torch.tensor(rows)[None].masked_fill(~tiled.causal_mask(T, S), float("-inf"))
    for backend in ["loops", *BACKENDS]:
        selected = ops.select(scores, K, backend=backend)
        assert selected.shape == (1, T, min(K, S)) and selected.dtype == torch.int64
        for t in range(T):
            visible = range(S - T + t + 1)
            best = sorted(visible, key=lambda s, row=rows[t]: (-row[s], -s))[:K]
            kept = [s for s in selected[0, t].tolist() if s != ops.EMPTY]
            assert sorted(kept) == sorted(best), f"{backend}, row {t}"  # no key twice, none from the future


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 20), st.integers(1, 10), st.integers(1, 10))
def test_fused_selection_is_scoring_then_selecting_for_any_tiles(T, earlier, K, query_tile, key_tile):
    S = T + earlier
    factors = [x.round() for x in index_factors(T, S)]  # whole numbers: many exact ties
    expected = as_sets(ops.index_topk(*factors, K, backend="loops"))
    with mock.patch.multiple(tiled, QUERY_TILE=query_tile, KEY_TILE=key_tile):
        assert as_sets(ops.index_topk(*factors, K)) == expected
        assert as_sets(ops.select(ops.index_scores(*factors), K)) == expected
    assert as_sets(ops.index_topk(*factors, K, backend="reference")) == expected


def test_a_prompt_in_one_go_in_chunks_and_token_by_token_is_the_same():
    T = 11
    q, k, w = index_factors(T, T)
    aq, kv = randn(B, T, H, C + R), randn(B, T, C + R, seed=1)

    def run(pieces):
        out, sets, begin = [], [], 0
        for end in pieces:
            chosen = ops.index_topk(q[:, begin:end], k[:, :end], w[:, begin:end], 4)
            out.append(ops.sparse_attention(aq[:, begin:end], kv[:, :end], chosen, SCALE, C))
            sets.append(as_sets(chosen))
            begin = end
        joined = [[row - {ops.EMPTY} for piece in sets for row in piece[b]] for b in range(B)]
        return torch.cat(out, dim=1), joined

    whole, sets = run([T])
    for pieces in ([4, 5, T], range(1, T + 1)):
        found, found_sets = run(pieces)
        assert found_sets == sets and error_ratio(found, whole) < 1e-12


def test_all_keys_selected_is_dense_attention():
    T, S = 4, 9
    q, k, _ = qkv(T, S, 1)
    selected = ops.index_topk(*index_factors(T, S), 100)
    sparse = ops.sparse_attention(q, k[:, :, 0], selected, SCALE, C)
    assert error_ratio(sparse, ops.dense_attention(q, k, k[..., :C], SCALE)) < 1e-12
    mass = ops.attention_mass(q, k, SCALE)
    gather_selected = mass.gather(-1, selected.clamp(min=0)).masked_fill(selected == ops.EMPTY, 0)
    assert error_ratio(ops.attention_mass(q, k, SCALE, selected), gather_selected) < 1e-12


def test_one_key_selected_is_that_key():
    q, kv, selected = randn(B, 1, H, C + R), randn(B, 5, C + R, seed=1), torch.tensor([[[3]], [[1]]])
    expected = torch.stack([kv[0, 3, :C], kv[1, 1, :C]])[:, None, None].expand(-1, -1, H, -1)
    for backend in ["loops", *BACKENDS]:
        assert torch.equal(ops.sparse_attention(q, kv, selected, SCALE, C, backend=backend), expected)


def test_mass_rows_sum_to_one_even_where_dense_attention_underflows():
    """A selected key may have next to no dense attention: its share among the selected is still a number."""
    q, k, _ = qkv(4, 6, 1, torch.float32)
    selected = torch.tensor([0, 1, ops.EMPTY]).expand(B, 4, -1)
    for backend in ["loops", *BACKENDS]:
        mass = ops.attention_mass(200 * q, k, SCALE, selected, backend=backend)
        assert torch.allclose(mass.sum(-1), torch.ones(B, 4)) and (mass[..., 2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_goes_in_and_scores_stay_wide(backend):
    half = torch.bfloat16
    T, S = 6, 6
    factors, (q, k, v) = index_factors(T, S, half), qkv(T, S, 1, half)
    selected = some_keys(T, S)
    assert ops.index_scores(*factors, backend=backend).dtype == torch.float32
    for name, call in {
        "sparse": lambda d: ops.sparse_attention(q.to(d), k[:, :, 0].to(d), selected, SCALE, C, backend=backend),
        "dense": lambda d: ops.dense_attention(q.to(d), k.to(d), v.to(d), SCALE, backend=backend),
    }.items():
        found = call(half)
        assert found.dtype == half and error_ratio(found.double(), call(torch.float64)) < 0.02, name
    index = [x.requires_grad_() for x in factors]
    loss = ops.indexer_loss(*index, q, k, SCALE, selected, backend=backend)
    loss.backward()
    wide = [x.detach().double().requires_grad_() for x in index]
    expected = ops.indexer_loss(*wide, q.double(), k.double(), SCALE, selected, backend="reference")
    expected.backward()
    assert loss.dtype == torch.float32 and error_ratio(loss, expected) < 0.02
    for found, wanted in zip(index, wide, strict=True):
        assert found.grad.dtype == half and error_ratio(found.grad.double(), wanted.grad) < 0.03


LONG = {
    "index_topk": lambda T, backend: ops.index_topk(*long_factors(T), 16, backend=backend),
    "warm-up loss": lambda T, backend: long_loss(T, None, backend),
    "sparse loss": lambda T, backend: long_loss(T, torch.arange(16).expand(1, T, -1), backend),
}


def long_factors(T):
    return (
        randn(1, T, 2, 8, dtype=torch.float32),
        randn(1, T, 8, dtype=torch.float32),
        randn(1, T, 2, dtype=torch.float32),
    )


def long_loss(T, selected, backend):
    index = [x.requires_grad_() for x in long_factors(T)]
    q, k = randn(1, T, 2, 8, dtype=torch.float32), randn(1, T, 1, 8, dtype=torch.float32)
    loss = ops.indexer_loss(*index, q, k, 1.0, selected, backend=backend)
    loss.backward()
    return loss


@pytest.mark.parametrize("operation", LONG)
def test_nothing_of_size_t_x_s_is_kept(operation, monkeypatch):
    """Doubling the text doubles the peak memory of the tiled kernel, and quadruples the reference's."""
    monkeypatch.setattr(tiled, "QUERY_TILE", 32)
    monkeypatch.setattr(tiled, "KEY_TILE", 128)
    T = 512
    peak = {(b, n): peak_bytes(lambda b=b, n=n: LONG[operation](n, b)) for b in BACKENDS for n in (T, 2 * T)}
    matrix = 4 * (2 * T) ** 2
    assert peak["tiled", 2 * T] < matrix / 2 < matrix < peak["reference", 2 * T]
    assert peak["tiled", 2 * T] < 2.4 * peak["tiled", T]
    assert peak["reference", 2 * T] > 3 * peak["reference", T]


def attention_flops(q, k, v, *_, **__):
    """What the library's counter does not know: fused attention on the CPU, from its arguments' shapes."""
    batch, heads, T, width = q
    return 2 * batch * heads * T * k[2] * (width + v[3])


def decode_cost(S, backend):
    """FLOPs and peak bytes of one decoded token over S cached ones, two sequences side by side."""
    q, kv = torch.randn(2, 1, 4, 40), torch.randn(2, S + 8, 40)[:, :S]  # a slice, as a cache gives it
    selected = torch.randint(S, (2, 1, 64))

    def call():
        if backend == "dense":
            return ops.dense_attention(q, kv[:, :, None], kv[:, :, None, :32], 1.0)
        return ops.sparse_attention(q, kv, selected, 1.0, 32, backend=backend)

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        call()
    return counter.get_total_flops(), peak_bytes(call)


def test_a_decoded_token_pays_for_k_keys_whatever_the_context():
    short, long = decode_cost(1024, "tiled"), decode_cost(16384, "tiled")
    assert short == long  # not one FLOP, not one byte more
    assert short[0] == 2 * 2 * 4 * 64 * (40 + 32)  # 2 FLOPs, 2 sequences, 4 heads, K keys, key and value width
    masked = [decode_cost(S, "reference")[0] for S in (1024, 16384)]
    dense = [decode_cost(S, "dense")[0] for S in (1024, 16384)]
    assert masked[1] == 16 * masked[0] and dense[1] == 16 * dense[0]  # masking saves nothing
    assert dense[1] == 2 * 2 * 4 * 16384 * (40 + 40)  # the fused kernel takes values as wide as keys


BAD_CALLS = {
    "width": (lambda: ops.index_scores(randn(2, 3, 4, 5), randn(2, 3, 6), randn(2, 3, 4)), r"k has shape \(2, 3, 6\)"),
    "ndim": (lambda: ops.index_scores(*[randn(2, 3, 4)] * 3), r"q has shape .* \(B, T, J, W\)"),
    "T > S": (lambda: ops.index_scores(randn(1, 4, 1, 2), randn(1, 3, 2), randn(1, 4, 1)), "4 queries but only 3 keys"),
    "backend": (lambda: ops.select(randn(1, 2, 2), 1, backend="cuda"), "backend='cuda' is unknown: use one of loops"),
    "top_k 0": (lambda: ops.select(randn(1, 2, 2), 0), "top_k=0: it must be a whole number of at least 1"),
    "top_k 1.5": (lambda: ops.index_topk(*index_factors(2, 2), 1.5), "top_k=1.5"),
    "top_k True": (lambda: ops.select(randn(1, 2, 2), True), "top_k=True"),
    "value width": (
        lambda: ops.sparse_attention(randn(1, 1, 1, 4), randn(1, 2, 4), torch.zeros(1, 1, 1).long(), 1.0, 5),
        "value_width=5: it must lie in 1 ... 4",
    ),
    "groups": (lambda: ops.dense_attention(randn(1, 2, 4, 3), *[randn(1, 2, 2, 3)] * 2, 1.0), "k has 2 heads and q 4"),
    "selected": (
        lambda: ops.attention_mass(randn(1, 2, 4, 3), randn(1, 2, 1, 3), 1.0, torch.zeros(1, 3, 1).long()),
        r"selected has shape \(1, 3, 1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_wrong_arguments_are_named(case):
    call, words = BAD_CALLS[case]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("backend", ["reference", "tiled", "cpu"])
def test_latents_in_eight_bits_are_what_they_stand_for(backend):
    generator = torch.Generator().manual_seed(4)
    q, kv = torch.randn(2, 3, 4, 260, generator=generator), torch.randn(2, 9, 260, generator=generator)
    selected = torch.randint(7, (2, 3, 5), generator=generator)
    cache = fp8.QuantizedLatentKV(*fp8.quantize(kv[..., :256]), kv[..., 256:].bfloat16())
    with torch.no_grad():
        found = ops.sparse_attention(q, cache, selected, 0.1, 256, backend=backend)
        right = ops.sparse_attention(q, cache.dequantize(torch.float32), selected, 0.1, 256, backend=backend)
    assert torch.equal(found, right)
    with pytest.raises(ValueError, match=r"kv has shape \(2, 9, 256\)"):
        ops.sparse_attention(q, cache._replace(rope=cache.rope[..., :0]), selected, 0.1, 256)


def test_the_mask_that_a_gpu_knows_by_name_is_ours():
    """On a GPU a block of a prompt is masked by `causal_lower_right`: its rows must see what ours see."""
    mask = causal_lower_right(3, 8)._materialize()
    assert torch.equal(mask, reference.causal_mask(3, 8))


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("T", [1, 3])
def test_values_that_are_a_view_of_the_keys_are_not_copied_and_have_the_right_gradient(T, detached):
    q, kv = randn(1, T, H, C + R), randn(1, 9, 1, C + R, seed=1)
    found = []
    for backend in ("reference", "tiled"):
        k = kv.clone().requires_grad_()
        v = (k.detach() if detached else k)[..., :C]
        with mock.patch.object(tiled.F, "pad", wraps=tiled.F.pad) as padded:
            out = ops.dense_attention(q, k, v, SCALE, backend=backend)
        assert padded.call_count == (backend == "tiled" and detached)
        out.square().sum().backward()
        found += [out, k.grad]
    assert error_ratio(found[2], found[0]) < 1e-12 and error_ratio(found[3], found[1]) < 1e-12
