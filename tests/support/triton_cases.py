"""Runs every Triton kernel in the interpreter and prints one error a line: `name error`.

A script and no test file: kernels are interpreted in the whole process or not at all, so it has one of its own.
`test_triton_interpreter` starts it. Every number that a kernel forgets to write is NaN here, and NaN counts as
infinitely wrong.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import sys

import torch

from dsa.kernels import fp8, ops, reference
from dsa.kernels.triton import backend, index_logits, top_k
from dsa.kernels.triton.sparse_attention import LatentKV, attend, tile_config
from dsa.kernels.triton.sparse_backward import gradients as backward

torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
torch.manual_seed(0)
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def error(found, expected):
    """Largest distance in units of the answer's own size, infinite where -inf or NaN differ."""
    seen = expected > -torch.inf
    if found.shape != expected.shape or not torch.equal(found > -torch.inf, seen) or found[seen].isnan().any():
        return float("inf")
    return float((found[seen].double() - expected[seen].double()).norm() / expected[seen].double().norm())


def different(found, expected):
    """How many rows choose another set."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.sort(-1).values != expected.sort(-1).values).any(-1).sum())


def index(B=2, T=5, S=40, J=4, W=32, kind=torch.float32):
    return [x.to(kind) for x in (torch.randn(B, T, J, W), torch.randn(B, S, W), torch.randn(B, T, J))]


def attention(B=2, T=5, S=40, H=6, K=24, C=64, R=16, kind=torch.float32):
    selected = torch.stack([torch.randperm(S)[:K] for _ in range(B * T)]).view(B, T, K)
    selected[0, 0, K // 3 :] = -1  # an early query
    selected[0, -1, 3] = -1  # and a hole
    return torch.randn(B, T, H, C + R).to(kind), torch.randn(B, S, C + R).to(kind), selected


@case
def scores_of_a_prompt():
    inputs = index(T=40)
    return error(ops.index_scores(*inputs, backend="triton"), reference.index_scores(*inputs))


@case
def scores_of_odd_sizes_from_a_part_of_a_cache():
    q, k, w = index(T=3, S=37, J=5, W=24)
    k = torch.cat([k, torch.full_like(k, torch.nan)], dim=1)[:, :37]  # what lies behind must not be touched
    return error(ops.index_scores(q, k, w, backend="triton"), reference.index_scores(q, k, w))


@case
def scores_in_fp16():
    inputs = index(kind=torch.float16)
    return error(ops.index_scores(*inputs, backend="triton"), reference.index_scores(*inputs))


@case
def scores_in_fp8():
    q, k, w = index(J=8, W=128)
    codes = (*fp8.quantize(q), *fp8.quantize(k), w)
    return error(index_logits.index_logits_fp8(*codes), fp8.index_scores(*codes))


@case
def scores_of_codes_through_the_one_face():
    q, k, w = index(J=8, W=128)
    errors = []
    for quantize in (fp8.quantize, fp8.quantize_int8):
        (codes, scale), keys = quantize(q), fp8.QuantizedTensor(*quantize(k))
        found = ops.index_scores(codes, keys, w * scale[..., 0], backend="triton")
        errors.append(error(found, reference.index_scores(codes.float(), keys.dequantize(), w * scale[..., 0])))
    return max(errors)


@case
def choice_from_codes_in_tiles():
    backend.MAX_SCORE_BYTES = 4 * 2 * 40 * 3  # three queries at a time
    q, k, w = index(T=8, J=8, W=128)
    codes, keys = fp8.quantize(q)[0], fp8.QuantizedTensor(*fp8.quantize(k))
    scores = reference.index_scores(codes.float(), keys.dequantize(), w)
    return different(ops.index_topk(codes, keys, w, 7, backend="triton"), reference.select(scores, 7))


@case
def top_k_with_ties_and_unseen_keys():
    scores = reference.index_scores(*index(B=1, T=6, S=1500)).round()
    scores[0, 0, 5:900], scores[0, 0, 300:600] = 0.0, -0.0  # equal, whatever their sign
    scores[0, 1] = scores[0, 1].abs() * -1e-30
    scores[0, 2, 20:] = -torch.inf  # fewer than are wanted
    scores[0, 3] = 7.0
    return sum(
        different(found, reference.select(scores, k))
        for k in (1, 64)
        for found in (
            top_k.whole_rows(scores, k, 1500), top_k.in_segments(scores, k, 7), ops.select(scores, k, backend="triton")
        )
    )  # fmt: skip


@case
def top_k_takes_minus_zero_for_zero():
    """The ten best of a row are its four positive numbers and its last six zeros, whatever these zeros' sign."""
    scores = torch.full((1, 2, 64), -1.0)
    scores[..., [3, 20, 21, 50]] = torch.tensor([0.5, 2.0, 0.5, 1.0])
    scores[..., 4:16] = 0.0
    scores[0, 0, 30:36] = -0.0  # the later ones: they win
    scores[0, 1, 4:16:2] = -0.0
    right = torch.tensor([[3, 20, 21, 30, 31, 32, 33, 34, 35, 50], [3, 10, 11, 12, 13, 14, 15, 20, 21, 50]])[None]
    return sum(
        different(found, right) for found in (top_k.whole_rows(scores, 10, 64), top_k.in_segments(scores, 10, 2))
    )


@case
def top_k_of_everything():
    scores = reference.index_scores(*index(T=8))
    return sum(different(ops.select(scores, k, backend="triton"), reference.select(scores, k)) for k in (40, 99))


@case
def scores_and_top_k_in_tiles():
    backend.MAX_SCORE_BYTES = 4 * 2 * 40 * 3  # three queries at a time
    inputs = index(T=8)
    return different(ops.index_topk(*inputs, 7, backend="triton"), reference.index_topk(*inputs, 7))


@case
def sparse_attention():
    inputs = attention()
    with torch.no_grad():
        return error(ops.sparse_attention(*inputs, 0.2, 64, backend="triton"),
                     reference.sparse_attention(*inputs, 0.2, 64))  # fmt: skip


@case
def sparse_attention_of_odd_sizes():
    q, kv, selected = attention(T=2, H=19, K=23, C=40, R=8)
    kv = torch.cat([kv, torch.full_like(kv, torch.nan)], dim=1)[:, :40]
    return error(ops.sparse_attention(q, kv, selected, 0.2, 40, backend="triton"),
                 reference.sparse_attention(q, kv, selected, 0.2, 40))  # fmt: skip


@case
def sparse_attention_in_fp16():
    inputs = attention(kind=torch.float16)
    exact = reference.sparse_attention(inputs[0].double(), inputs[1].double(), inputs[2], 0.2, 64)
    return error(ops.sparse_attention(*inputs, 0.2, 64, backend="triton"), exact)


def gradients(backend):
    torch.manual_seed(1)
    q, kv, selected = attention()
    q.requires_grad_(), kv.requires_grad_()
    ops.sparse_attention(q, kv, selected, 0.2, 64, backend=backend).backward(torch.randn(2, 5, 6, 64))
    return q.grad, kv.grad


@case
def gradient_of_queries():
    return error(gradients("triton")[0], gradients("reference")[0])


@case
def gradient_of_latents():
    return error(gradients("triton")[1], gradients("reference")[1])


@case
def decode_in_four_parts():
    q, kv, selected = attention(T=1, S=300, K=256)
    selected[1, 0, 64:128] = -1  # a part without any token
    out, lse = attend(q, LatentKV.split(kv, 64), selected, 0.2, splits=4)
    whole = attend(q, LatentKV.split(kv, 64), selected, 0.2)
    return max(error(out, reference.sparse_attention(q, kv, selected, 0.2, 64)), error(lse, whole[1]))


@case
def decode_from_an_fp8_cache():
    q, kv, selected = attention(T=1, S=90, K=70, C=256)
    codes, scale = fp8.quantize(kv[..., :256])
    rope = kv[..., 256:].half()
    out, _ = attend(q.half(), LatentKV(codes, rope, scale), selected, 0.1, splits=2)
    read = torch.cat([fp8.dequantize(codes, scale), rope.float()], dim=-1)
    return error(out, reference.sparse_attention(q.half().float(), read, selected, 0.1, 256))


@case
def decode_from_an_fp8_cache_through_the_one_face():
    q, kv, selected = attention(T=1, S=400, K=300, C=256)
    cache = fp8.QuantizedLatentKV(*fp8.quantize(kv[..., :256]), kv[..., 256:])
    with torch.no_grad():
        errors = [
            error(ops.sparse_attention(q, cache, selected, 0.1, width, backend="triton"),
                  reference.sparse_attention(q, cache.dequantize(torch.float32), selected, 0.1, width))
            for width in (256, 128)
        ]  # fmt: skip
    q.requires_grad_()
    ops.sparse_attention(q, cache, selected, 0.1, 256, backend="triton").sum().backward()  # no gradient is lost
    return max(errors) if q.grad.abs().sum() > 0 else float("inf")


def in_tiles(tile):
    """Launch kernels with this configuration instead of the smallest."""

    def launcher(kernel, grid, **arguments):
        chosen = tile.kwargs if "BLOCK_H" in kernel.function.arg_names else {}
        kernel.function[grid(chosen)](**arguments, **chosen)

    return launcher


@case
def weights_behind_a_branch():
    inputs = attention(H=19, K=23)
    launcher = in_tiles(tile_config(16, 16, 4, branch_softmax=True))
    out, _ = attend(inputs[0], LatentKV.split(inputs[1], 64), inputs[2], 0.2, launcher=launcher)
    return error(out, reference.sparse_attention(*inputs, 0.2, 64))


@case
def gradients_behind_a_branch():
    q, kv, selected = attention(H=19, K=23)
    out, lse = attend(q, LatentKV.split(kv, 64), selected, 0.2)
    plain, branched = (
        backward(q, kv, selected, out, lse, torch.ones_like(out), 0.2, in_tiles(tile_config(16, 16, 4, 2, branch)))
        for branch in (False, True)
    )
    return max(error(one, other) for one, other in zip(branched, plain, strict=True))


@case
def dense_decode():
    q, kv, _ = attention(T=1, S=300, K=24)
    k = kv[:, :, None]
    return error(ops.dense_attention(q, k, k[..., :64], 0.2, backend="triton"),
                 reference.dense_attention(q, k, k[..., :64], 0.2))  # fmt: skip


@case
def a_query_without_any_token_gets_zeros():
    q, kv, selected = attention(T=1)
    out = ops.sparse_attention(q, kv, selected.fill_(-1), 0.2, 64, backend="triton")
    return float(out.abs().max()) if out.isfinite().all() else float("inf")


@case
def bf16_is_refused():
    try:
        ops.sparse_attention(*attention(kind=torch.bfloat16), 0.2, 64, backend="triton")
    except ValueError as refusal:
        return 0.0 if "bf16" in str(refusal) and "tiled" in str(refusal) else 1.0
    return float("inf")


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        print(name, CASES[name](), flush=True)
