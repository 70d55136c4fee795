"""Does a model fit on these GPUs, and how fast could it be: memory counted, speed bounded by the roofline.

Memory is counted as `tensor_parallel` deals it out. Heads, feed-forward columns, experts, embedding and head are
divided by the number of GPUs. Indexer, router and the projections into the latents are on each of them, and so is the
whole cache, because one latent serves all heads: **more GPUs make room for weights, not for longer texts.** (Servers
that deal out *sequences* to GPUs as well, "data-parallel attention", divide the cache too.)

Speed is a bound and no forecast. A decoding step takes the longer of two times, its FLOP at the machine's peak and its
bytes at its bandwidth; communication, launches and imperfect kernels come on top. Kernels as published are assumed,
which multiply FP8 codes as they are. This package's own FP8 weights save the memory and not the time: they are expanded
at each use.

Sizes and rates of GPUs: their makers' data sheets, dense and without sparsity; memory in 10^9 bytes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dsa.analysis.flops import FlopCount, decode_traffic, prompt_flops, token_flops
from dsa.analysis.memory import Matrix, cache_bytes, matrices
from dsa.model.config import Config

RESERVE = 6 * 10**9
"""Bytes of a GPU left for CUDA itself, its libraries, and a prompt's chunk on its way through a layer: assumed."""


@dataclass(frozen=True)
class GPU:
    """Memory in bytes, bandwidth in bytes/s, peaks in FLOP/s; `fp8` is that of bf16 where there is no FP8."""

    memory: float
    bandwidth: float
    bf16: float
    fp8: float


GPUS: Mapping[str, GPU] = MappingProxyType(
    {
        "A100 80 GB": GPU(80e9, 2.04e12, 312e12, 312e12),
        "H100 80 GB": GPU(80e9, 3.35e12, 989e12, 1979e12),
        "H200 141 GB": GPU(141e9, 4.8e12, 989e12, 1979e12),
        "B200 180 GB": GPU(180e9, 8e12, 2250e12, 4500e12),
    }
)


@dataclass(frozen=True)
class Fit:
    """What one of the GPUs holds, in bytes, and the bounds on time, in seconds."""

    weights: int
    cache: int
    memory: int
    batch: int
    cache_per_sequence: int
    decode_seconds: float  # decoding one token for each sequence
    prefill_seconds: float  # reading one sequence's prompt

    @property
    def total(self) -> int:
        """Weights, cache and reserve."""
        return self.weights + self.cache + RESERVE

    @property
    def fits(self) -> bool:
        """Whether that is no more than the GPU has."""
        return self.total <= self.memory

    @property
    def largest_batch(self) -> int:
        """Sequences of this length that there is room for, beside the weights."""
        return max(0, (self.memory - self.weights - RESERVE) // self.cache_per_sequence)


def parameters_per_gpu(config: Config, ranks: int) -> int:
    """Matrix parameters, embedding included, on the fullest of `ranks` GPUs."""
    held = sum(_copies_per_gpu(m, config, ranks) * m.outputs * m.inputs for m in matrices(config))
    return math.ceil(held + math.ceil(config.vocab_size / ranks) * config.hidden_size)


def weight_bytes(config: Config, precision: str, ranks: int) -> int:
    """Bytes of weights on the fullest of `ranks` GPUs."""
    held = sum(_copies_per_gpu(m, config, ranks) * m.bytes(precision) for m in matrices(config))
    return math.ceil(held + config.vocab_size / ranks * config.hidden_size * (4 if precision == "fp32" else 2))


def fit(
    config: Config, gpu: GPU, ranks: int, context: int, batch: int, precision: str, attention: str = "sparse"
) -> Fit:
    """Plan `batch` sequences of `context` tokens each, prompt and answer together, on `ranks` GPUs.

    Args:
        config: the model.
        gpu: one of GPUS, or one of your own.
        ranks: how many of it; they share every layer.
        context: tokens of each sequence.
        batch: sequences at the same time.
        precision: of weights and cache, one of `memory.PRECISIONS`.
        attention: "sparse" or "dense". A sparse model's index keys and indexers are counted in either case.

    Raises:
        ValueError: for a number that cannot be.
    """
    _check(config, ranks, context, batch)
    one = context * cache_bytes(config, precision, indexer=config.index_topk is not None)
    return Fit(
        weights=weight_bytes(config, precision, ranks),
        cache=batch * one,
        memory=int(gpu.memory),
        batch=batch,
        cache_per_sequence=one,
        decode_seconds=_decode_seconds(config, gpu, ranks, context, batch, precision, attention),
        prefill_seconds=_compute_seconds(config, gpu, ranks, prompt_flops(config, context, attention), precision),
    )


def _decode_seconds(
    config: Config, gpu: GPU, ranks: int, context: int, batch: int, precision: str, attention: str
) -> float:
    """Seconds in which one GPU reads, or multiplies, what one token for each sequence needs."""
    traffic = decode_traffic(config, context, attention, precision, batch)
    replicated = sum(  # read by every GPU, as the cache is
        m.used * m.bytes(precision)
        for m in matrices(config)
        if not m.split and (m.part != "indexer" or attention == "sparse")
    )
    memory_seconds = ((traffic.weights - replicated) / ranks + replicated + traffic.cache) / gpu.bandwidth
    flops = token_flops(config, context, attention, "decode")
    return max(memory_seconds, batch * _compute_seconds(config, gpu, ranks, flops, precision))


def _compute_seconds(config: Config, gpu: GPU, ranks: int, flops: FlopCount, precision: str) -> float:
    """Seconds in which one GPU multiplies its share: attention in bf16, all else in FP8 where that is stored."""
    fast = gpu.fp8 if precision == "deployed" else gpu.bf16
    used = sum(m.used * m.outputs * m.inputs for m in matrices(config) if m.part != "indexer")
    replicated = sum(m.used * m.outputs * m.inputs for m in matrices(config) if m.part != "indexer" and not m.split)
    weights = flops.weights * (replicated + (used - replicated) / ranks) / used  # this GPU's part
    return (weights + flops.indexer_weights + flops.scoring) / fast + flops.attention / ranks / gpu.bf16


def _copies_per_gpu(matrix: Matrix, config: Config, ranks: int) -> float:
    """How many of a kind of matrix the fullest GPU holds; a part of one counts as that part."""
    if matrix.part == "experts":
        E = config.n_routed_experts
        return matrix.stored / E * math.ceil(E / ranks)
    return matrix.stored / ranks if matrix.split else matrix.stored


def _check(config: Config, ranks: int, context: int, batch: int) -> None:
    heads, longest = config.num_attention_heads, config.max_position_embeddings
    if ranks < 1 or heads % ranks:
        raise ValueError(f"{ranks} GPUs cannot share {heads} heads evenly: take a divisor of {heads}")
    if not 1 <= context <= longest:
        raise ValueError(f"context={context}: the model reads 1 to {longest} tokens")
    if batch < 1:
        raise ValueError(f"batch={batch}: there is at least one sequence")
