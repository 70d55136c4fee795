"""One layer's attention, sparse against dense: scoring, choosing and attending here, attending to all there.

Prefill is a block of queries at the end of its keys. Dense is multi-head attention on expanded keys and values, as a
server would do it; sparse scores FP8 codes and attends to latents in bf16. Decoding is one query of several sequences;
dense attends to all latents with our own kernel, since the library's fast ones end at a width of 256, over a cache in
bf16 and in FP8, and the quicker counts. Products with weights are left out on both sides: lengths do not change them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa.bench.gpu import baselines
from dsa.bench.gpu.benchmark_case import BenchmarkCase, Candidate, Candidates, Target
from dsa.bench.gpu.correctness import missed_share, relative_error
from dsa.bench.gpu.inputs import Inputs, Shape
from dsa.kernels import fp8, ops, reference
from dsa.kernels.triton.sparse_attention import LatentKV, attend, num_splits

Answer = tuple[Tensor, Tensor]  # attended latents (B, T, H, C) and selected positions (B, T, K)


def score_row(q: Tensor, k: Tensor, k_scale: Tensor, w: Tensor, t: int) -> Tensor:
    """One query's index scores in fp32, from codes: q (1, T, J, W), k (1, S, W), k_scale (1, S, 1) -> (1, 1, S)."""
    q, k, k_scale, w = (x if x.ndim == n else x[None] for x, n in ((q, 4), (k, 3), (k_scale, 3), (w, 3)))
    S, seen = k.shape[1], k.shape[1] - q.shape[1] + t + 1
    keys = fp8.QuantizedTensor(k[:, :seen], k_scale[:, :seen]).dequantize()
    scores = reference.index_scores(q[:, t : t + 1].float(), keys, w[:, t : t + 1])
    return F.pad(scores, (0, S - seen), value=-torch.inf)


def dequantized(kv: Tensor | fp8.QuantizedLatentKV, sequences: slice) -> Tensor:
    """Some sequences of a cache in fp32: (b, S, C + R)."""
    if isinstance(kv, fp8.QuantizedLatentKV):
        return fp8.QuantizedLatentKV(*(part[sequences] for part in kv)).dequantize(torch.float32)
    return kv[sequences].float()


def sparse(make: Inputs, shape: Shape, B: int, T: int, S: int, fp8_cache: bool) -> Candidate:
    """Score the codes of S keys, choose K of them, attend to these; the answer is (attended, chosen)."""
    J, W, C, K = shape.index_heads, shape.index_width, shape.latent, shape.top_k
    q = make.each(lambda: make.normal(B, T, shape.heads, shape.wide))
    kv: list[Tensor | fp8.QuantizedLatentKV] = make.each(
        lambda: make.cache(B, S, shape) if fp8_cache else make.normal(B, S, shape.wide)
    )
    codes = make.each(lambda: make.codes(B, T, J, W))
    keys = make.each(lambda: fp8.QuantizedTensor(make.codes(B, S, W), make.scales(B, S, 1)))
    w = make.normal(B, T, J, dtype=torch.float32)

    def call(n: int) -> Answer:
        chosen = ops.index_topk(codes[n], keys[n], w, K, backend=make.backend)
        return ops.sparse_attention(q[n], kv[n], chosen, shape.scale, C, backend=make.backend), chosen

    def error(answer: Answer) -> float:
        """Attention is held to what was chosen, and that to the scores, where a near tie may fall either way."""
        found = []
        for b, t in {(0, 0), (0, T - 1), (B - 1, T - 1)}:
            row, one = (slice(b, b + 1), slice(t, t + 1)), fp8.QuantizedTensor(*(part[b] for part in keys[0]))
            latents = dequantized(kv[0], row[0])
            right = reference.sparse_attention(q[0][row].float(), latents, answer[1][row], shape.scale, C)
            scores = score_row(codes[0][b], *one, w[b], t)
            found += [relative_error(answer[0][row], right), missed_share(answer[1][row], reference.select(scores, K))]
        return max(found)

    flop = B * T * (2 * J * W * (S - (T - 1) / 2) + 2 * shape.heads * (C + shape.wide) * K)
    return Candidate(call, error, flop=flop, cuda_graph=T == 1)


def prefill(make: Inputs, shape: Shape, S: int) -> Candidates:
    """A block of queries at the end of S keys."""
    ours = sparse(make, shape, 1, shape.chunk, S, fp8_cache=False)
    return {"sparse, ours": ours, **baselines.prompt(make, shape, shape.chunk, S)}


def dense_decode(make: Inputs, shape: Shape, B: int, S: int, fp8_cache: bool, library: bool = False) -> Candidate:
    """Attend from one query of B sequences to all S latents of each."""
    C = shape.latent
    q = make.each(lambda: make.normal(B, 1, shape.heads, shape.wide))
    kv: list[Tensor | fp8.QuantizedLatentKV] = make.each(
        lambda: make.cache(B, S, shape) if fp8_cache else make.normal(B, S, shape.wide)
    )
    splits = num_splits(B, shape.heads, S)

    def call(n: int) -> Tensor:
        cache = kv[n]
        if isinstance(cache, fp8.QuantizedLatentKV):
            return attend(q[n], LatentKV(cache.codes, cache.rope, cache.scale), None, shape.scale, splits)[0]
        if library:
            return baselines.latents(q[n], cache, shape.scale, C)
        return attend(q[n], LatentKV.split(cache, C), None, shape.scale, splits)[0]

    def error(out: Tensor) -> float:
        k = dequantized(kv[0], slice(B - 1, B))
        right = reference.dense_attention(q[0][-1:].float(), k[:, :, None], k[:, :, None, :C], shape.scale)
        return relative_error(out[-1:], right)

    return Candidate(call, error, flop=2 * shape.heads * (C + shape.wide) * B * S, cuda_graph=True)


def decode(make: Inputs, shape: Shape, S: int) -> Candidates:
    """One query of several sequences of S keys."""
    B = shape.layer_batch
    return {
        "sparse, ours": sparse(make, shape, B, 1, S, fp8_cache=True),
        "sparse, ours, cache in bf16": sparse(make, shape, B, 1, S, fp8_cache=False),
        "dense MLA, ours": dense_decode(make, shape, B, S, fp8_cache=False),
        "dense MLA, ours, FP8 cache": dense_decode(make, shape, B, S, fp8_cache=True),
        "dense MLA, torch, memory-efficient": dense_decode(make, shape, B, S, fp8_cache=False, library=True),
    }


def _cases_by_length(
    shape: Shape, phase: str, build: Callable[..., Candidates], tokens: int, target: Target, sets: int
) -> list[BenchmarkCase]:
    """One case for each length, the target at the longest."""

    def at(S: int) -> BenchmarkCase:
        return BenchmarkCase(
            f"layer, {phase}, {S} keys", lambda make: build(make, shape, S),
            target if shape.longest == S else None, sets, phase, S, tokens,
        )  # fmt: skip

    return [at(S) for S in shape.lengths]


def prefill_cases(shape: Shape) -> list[BenchmarkCase]:
    """Prefill by length; one set of inputs is far larger than any cache."""
    return _cases_by_length(shape, "prefill", prefill, shape.chunk, Target("times", 3.5, 2.5, dense=500), sets=1)


def decode_cases(shape: Shape) -> list[BenchmarkCase]:
    """Decoding by length."""
    return _cases_by_length(shape, "decode", decode, shape.layer_batch, Target("times", 6, 4), sets=3)
