"""Each kernel at the real shape against its target; `layers` has whole layers, `baselines` what stands beside.

An answer is checked where it is timed, at full size: for a few of its queries, or sequences, the reference computes in
fp32 what it should be. Gradients of latents, to which every query adds, are computed anew as a whole.
"""

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from dsa.bench.gpu import baselines, layers
from dsa.bench.gpu.benchmark_case import COPY, BenchmarkCase, Candidate, Candidates, Target
from dsa.bench.gpu.correctness import missed_share, relative_error
from dsa.bench.gpu.inputs import Inputs, Shape
from dsa.kernels import fp8, ops, reference

FP32 = torch.float32
CHUNK = 64  # queries whose gradient the reference finds at once


def sample(T: int) -> list[int]:
    """Queries that stand for all T: the first, the last, and two between."""
    return sorted({0, T // 3, T // 2 + 1, T - 1} & set(range(T)))


def index_logits(make: Inputs, shape: Shape, S: int) -> Candidates:
    """FP8 scores of a block of queries at the end of S keys."""
    T, J, W = shape.prompt, shape.index_heads, shape.index_width
    q, k = make.each(lambda: make.codes(1, T, J, W)), make.each(lambda: make.codes(1, S, W))
    w, k_scale = make.normal(1, T, J, dtype=FP32), make.scales(1, S, 1)

    def error(scores: Tensor) -> float:
        return relative_error(
            scores[:, sample(T)], torch.cat([layers.score_row(q[0], k[0], k_scale, w, t) for t in sample(T)], dim=1)
        )

    def ours(n: int) -> Tensor:
        return ops.index_scores(q[n], fp8.QuantizedTensor(k[n], k_scale), w, backend=make.backend)

    pairs = T * S - T * (T - 1) / 2
    return {
        "ours": Candidate(ours, error, flop=2 * J * W * pairs),
        "torch._scaled_mm, products alone": baselines.product(make, q, k),
    }


def sparse_prefill(make: Inputs, shape: Shape) -> Candidates:
    """Attention of a block of queries to K tokens each, latents in bf16."""
    T, S, H, C, K = shape.prompt, shape.longest, shape.heads, shape.latent, shape.top_k
    q, kv = make.each(lambda: make.normal(1, T, H, shape.wide)), make.each(lambda: make.normal(1, S, shape.wide))
    chosen = make.each(lambda: make.positions(1, T, S, K))

    def error(out: Tensor) -> float:
        rows = sample(T)
        right = reference.sparse_attention(q[0][:, rows].float(), kv[0].float(), chosen[0][:, rows], shape.scale, C)
        return relative_error(out[:, rows], right)

    def by(backend: str) -> Candidate:
        return Candidate(
            lambda n: ops.sparse_attention(q[n], kv[n], chosen[n], shape.scale, C, backend=backend),
            error, flop=2 * H * (C + shape.wide) * K * T,
        )  # fmt: skip

    return {"ours": by(make.backend), "plain torch: gather, two products": by("tiled")}


def sparse_decode(make: Inputs, shape: Shape) -> Candidates:
    """One query of many sequences, K tokens each out of a long cache, in FP8 and as it is."""
    B, S, H, C, K = shape.attention_batch, shape.longest, shape.heads, shape.latent, shape.top_k
    q = make.each(lambda: make.normal(B, 1, H, shape.wide))
    chosen = make.each(lambda: make.positions(B, 1, S, K))
    codes, plain = make.each(lambda: make.cache(B, S, shape)), make.each(lambda: make.normal(B, S, shape.wide))

    def by(kv: Sequence[Tensor | fp8.QuantizedLatentKV], backend: str) -> Candidate:
        def error(out: Tensor) -> float:
            found = []
            for b in sample(B):
                row = slice(b, b + 1)
                latents = layers.dequantized(kv[0], row)
                found.append(reference.sparse_attention(q[0][row].float(), latents, chosen[0][row], shape.scale, C))
            return relative_error(out[sample(B)], torch.cat(found))

        flop, size = 2 * H * (C + shape.wide) * K * B, (C + C / 32 + 2 * shape.rotary) * K * B
        return Candidate(
            lambda n: ops.sparse_attention(q[n], kv[n], chosen[n], shape.scale, C, backend=backend),
            error, flop=flop, bytes=size, cuda_graph=True,
        )  # fmt: skip

    return {
        "ours": by(codes, make.backend),
        "ours, cache in bf16": by(plain, make.backend),
        "plain torch, cache in bf16": by(plain, "tiled"),
    }


def index_decode(make: Inputs, shape: Shape) -> Candidates:
    """FP8 scores of one query of several sequences: every key is read, and hardly anything is computed."""
    B, S, J, W = shape.indexer_batch, shape.longest, shape.index_heads, shape.index_width
    q, k = make.each(lambda: make.codes(B, 1, J, W)), make.each(lambda: make.codes(B, S, W))
    w, k_scale = make.normal(B, 1, J, dtype=FP32), make.each(lambda: make.scales(B, S, 1))

    def error(scores: Tensor) -> float:
        rows = [layers.score_row(q[0][b], k[0][b], k_scale[0][b], w[b], 0) for b in sample(B)]
        return relative_error(scores[sample(B)], torch.cat(rows))

    def ours(n: int) -> Tensor:
        return ops.index_scores(q[n], fp8.QuantizedTensor(k[n], k_scale[n]), w, backend=make.backend)

    size = B * S * (W + 4 + 4) + B * J * (W + 4)  # codes, scales and scores; queries and weights
    return {
        "ours": Candidate(ours, error, flop=2 * J * W * B * S, bytes=size, cuda_graph=True),
        COPY: baselines.copy(make, size),
    }


def top_k(make: Inputs, shape: Shape) -> Candidates:
    """The exact K best of every row."""
    T, S, K = shape.chunk, shape.longest, shape.top_k
    scores = make.each(lambda: make.normal(1, T, S, dtype=FP32))

    def error(found: Tensor) -> float:
        return missed_share(found[:, sample(T)], reference.select(scores[0][:, sample(T)], K))

    size = 4 * T * S + 8 * T * K
    return {
        "ours": Candidate(lambda n: ops.select(scores[n], K, backend=make.backend), error, 0, bytes=size),
        "torch.topk": Candidate(lambda n: scores[n].topk(K, dim=-1, sorted=False).indices, error, 1e-6, bytes=size),
    }


def gradient_of(x: Tensor) -> Tensor:
    """What backward passes have added up."""
    assert x.grad is not None
    return x.grad


def backward(make: Inputs, shape: Shape) -> Candidates:
    """Gradients of queries and latents: five products are needed, and counted."""
    T, S, H, C, K = shape.prompt, shape.lengths[0], shape.heads, shape.latent, shape.top_k
    q, kv = make.each(lambda: make.normal(1, T, H, shape.wide)), make.each(lambda: make.normal(1, S, shape.wide))
    chosen, grad = make.positions(1, T, S, K), make.normal(1, T, H, C)

    @cache
    def graph(n: int, backend: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        factors = (q[n].detach().requires_grad_(), kv[n].detach().requires_grad_())
        with torch.enable_grad():
            return ops.sparse_attention(*factors, chosen, shape.scale, C, backend=backend), factors

    def by(backend: str) -> Candidate:
        return Candidate(
            lambda n: torch.autograd.grad(*graph(n, backend), grad, retain_graph=True), error,
            flop=2 * H * (3 * shape.wide + 2 * C) * K * T,
        )  # fmt: skip

    def error(found: tuple[Tensor, Tensor]) -> float:
        latents, queries = kv[0].float().requires_grad_(), []
        for begin in range(0, T, CHUNK):
            rows = slice(begin, begin + CHUNK)
            x = q[0][:, rows].float().requires_grad_()
            out = ops.sparse_attention(x, latents, chosen[:, rows], shape.scale, C, backend="tiled")
            out.backward(grad[:, rows].float())
            queries.append(gradient_of(x))
        return max(relative_error(found[0], torch.cat(queries, dim=1)), relative_error(found[1], gradient_of(latents)))

    return {"ours": by(make.backend), "plain torch, autograd": by("tiled")}


def case_groups(shape: Shape) -> dict[str, list[BenchmarkCase]]:
    """All that is measured: name -> cases, which share a process."""
    return {
        "machine": [BenchmarkCase("machine", lambda make: baselines.machine(make, shape))],
        "index logits": [
            BenchmarkCase(
                f"index logits, {S} keys", partial(index_logits, shape=shape, S=S), Target("TFLOP/s", 700, 500)
            )
            for S in shape.lengths
        ],
        "sparse prefill": [
            BenchmarkCase("sparse prefill", lambda make: sparse_prefill(make, shape), Target("TFLOP/s", 350, 250))
        ],
        "sparse decode": [
            BenchmarkCase("sparse decode", lambda make: sparse_decode(make, shape), Target("TFLOP/s", 200, 120), sets=2)
        ],
        "index decode": [
            BenchmarkCase("index decode", lambda make: index_decode(make, shape), Target("of bandwidth", 0.70, 0.50))
        ],
        "top-k": [BenchmarkCase("top-k", lambda make: top_k(make, shape), Target("ms", 3, 6))],
        "backward": [BenchmarkCase("backward", lambda make: backward(make, shape), Target("TFLOP/s", 60, 30), sets=2)],
        "layer, prefill": layers.prefill_cases(shape),
        "layer, decode": layers.decode_cases(shape),
    }
