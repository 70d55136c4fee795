"""How precisely a model ranks and remembers: as it is, or in eight bits as V3.2 is deployed.

Two switches, because they ask two questions. The *index* precision decides in which numbers the indexer compares
queries with keys, and nothing else: a mere ranking, the place to be coarse. The *cache* precision decides what
attention later reads. Both are rounded at the moment of writing, and a pass without a cache is rounded in the same way;
the published inference code does that too. So a prompt gives the same whether it is read at once or in chunks, up to
the order of sums: a product that differs in its last bit before it is rounded may fall on the other side of the middle
between two codes, and then differs by one code, 2^-3 of its size at most, in one number of one token. In full precision
the two agree to a few last bits; under an FP8 cache they agree as closely as two codes that are neighbours.

Index vectors are turned by a Hadamard matrix before they are rounded. What the cache holds stays codes with scales:
kernels that can multiply or read them do so, in place; for any other the chosen tokens are expanded (`kernels.ops`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa.kernels import fp8

INDEX = ("full", "fp8", "int8")
CACHE = ("full", "fp8")


@dataclass(frozen=True)
class Precision:
    """What a model's two switches say; "full" is the model's own dtype."""

    index: str = "full"
    cache: str = "full"

    def __post_init__(self) -> None:
        for name, value, known in (("index", self.index, INDEX), ("cache", self.cache, CACHE)):
            if value not in known:
                raise ValueError(f"{name}_precision={value!r} is unknown: use one of {', '.join(known)}")


FULL_PRECISION = Precision()


@dataclass(frozen=True)
class CacheCodec:
    """How vectors (..., width) are stored, as one tensor or several, and what these are given out as."""

    encode: Callable[[Tensor], tuple[Tensor, ...]]
    decode: Callable[..., Any]

    def rounded(self, x: Tensor) -> Tensor:
        """The numbers left of x once it was stored; only full precision passes a gradient, eight bits refuse to."""
        return x if self is FULL else _Rounded.apply(x, self)


class _Rounded(torch.autograd.Function):
    """Rounding is flat nearly everywhere: rather than a gradient that means nothing there is an error."""

    @staticmethod
    def forward(ctx, x: Tensor, codec: CacheCodec) -> Tensor:  # type: ignore[override]
        """Store and read."""
        return codec.decode(*codec.encode(x)).dequantize(x.dtype)

    @staticmethod
    def backward(ctx, *gradient: Tensor) -> Tensor:
        """Say what to do."""
        raise RuntimeError("rounding to eight bits passes no gradient: set model.cache_precision = 'full' to train")


FULL = CacheCodec(lambda x: (x,), lambda x: x)
INDEX_FP8 = CacheCodec(torch.no_grad()(lambda x: fp8.quantize(fp8.hadamard(x), check=False)), fp8.QuantizedTensor)
INDEX_INT8 = CacheCodec(torch.no_grad()(lambda x: fp8.quantize_int8(fp8.hadamard(x))), fp8.QuantizedTensor)


def index_codec(precision: Precision) -> CacheCodec:
    """How index keys (B, S, W) are stored: in eight bits W + 4 bytes each, and read back as `fp8.QuantizedTensor`."""
    return {"full": FULL, "fp8": INDEX_FP8, "int8": INDEX_INT8}[precision.index]


def latent_codec(precision: Precision, latent: int) -> CacheCodec:
    """How [latent C | rotary key R] is stored: FP8 for the latent, in groups of 128, and bf16 for the rotary key.

    What is read back is the numbers (B, S, C + R) themselves, or `fp8.QuantizedLatentKV`.
    """

    def encode(x: Tensor) -> tuple[Tensor, ...]:
        return *fp8.quantize(x[..., :latent], check=False), x[..., latent:].bfloat16()

    return CacheCodec(encode, fp8.QuantizedLatentKV) if precision.cache == "fp8" else FULL


def quantize_index_query(q: Tensor, w: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Round index queries (B, T, J, W) to codes; their scale goes behind the ReLU, into the head weights (B, T, J)."""
    if precision.index == "full":
        return q, w
    codes, scale = index_codec(precision).encode(q)
    return codes, w.float() * scale[..., 0]


def check_index_width(precision: Precision, width: int) -> None:
    """Refuse index vectors that eight bits with one scale cannot hold."""
    if precision.index != "full" and (width & (width - 1) or width > fp8.GROUP[1]):
        raise ValueError(
            f"index_precision={precision.index!r} needs an index_head_dim that is a power of two (for the Hadamard "
            f"transform) and at most {fp8.GROUP[1]} (one scale a vector), not {width}: leave it 'full'"
        )
