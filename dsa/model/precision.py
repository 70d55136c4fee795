"""How precisely a model ranks and remembers: as it is, or in eight bits as V3.2 is deployed.

Two switches, because they ask two questions. The *index* precision decides in which numbers the indexer compares
queries with keys, and nothing else: a mere ranking, the place to be coarse. The *cache* precision decides what
attention later reads. Both are rounded at the moment of writing, and a pass without a cache is rounded in the same way,
so that a prompt gives the same whether read at once or in chunks; the published inference code does that too.

Index vectors are turned by a Hadamard matrix before they are rounded, and stay codes with a scale: the kernels multiply
them as they are where the machine can. Latents are expanded when they are read: there this file shows which numbers
eight bits can hold, not how fast a fused kernel would be.
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
class Format:
    """How vectors (..., width) are stored: as one tensor or several."""

    encode: Callable[[Tensor], tuple[Tensor, ...]]
    decode: Callable[..., Any]

    def rounded(self, x: Tensor) -> Tensor:
        """What is left of x once it has been stored; only full precision passes a gradient, eight bits refuse to."""
        return x if self is FULL else _Rounded.apply(x, self)


class _Rounded(torch.autograd.Function):
    """Rounding is flat nearly everywhere: rather than a gradient that means nothing there is an error."""

    @staticmethod
    def forward(ctx, x: Tensor, form: Format) -> Tensor:  # type: ignore[override]
        """Store and read."""
        return form.decode(*form.encode(x))

    @staticmethod
    def backward(ctx, *gradient: Tensor) -> Tensor:
        """Say what to do."""
        raise RuntimeError("rounding to eight bits passes no gradient: set model.cache_precision = 'full' to train")


FULL = Format(lambda x: (x,), lambda x: x)
INDEX_FP8 = Format(torch.no_grad()(lambda x: fp8.quantize(fp8.hadamard(x))), fp8.QuantizedTensor)
INDEX_INT8 = Format(torch.no_grad()(lambda x: fp8.quantize_int8(fp8.hadamard(x))), fp8.QuantizedTensor)


def index_format(precision: Precision) -> Format:
    """How index keys (B, S, W) are stored: in eight bits W + 4 bytes each, and read back as `fp8.QuantizedTensor`."""
    return {"full": FULL, "fp8": INDEX_FP8, "int8": INDEX_INT8}[precision.index]


def latent_format(precision: Precision, latent: int, dtype: torch.dtype) -> Format:
    """How [latent C | rotary key R] is stored: FP8 for the latent, in groups of 128, and bf16 for the rotary key."""

    def encode(x: Tensor) -> tuple[Tensor, ...]:
        return *fp8.quantize(x[..., :latent]), x[..., latent:].bfloat16()

    def decode(codes: Tensor, scale: Tensor, rotary: Tensor) -> Tensor:
        return torch.cat([fp8.dequantize(codes, scale).to(dtype), rotary.to(dtype)], dim=-1)

    return Format(encode, decode) if precision.cache == "fp8" else FULL


def index_query(q: Tensor, w: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Round index queries (B, T, J, W) to codes; their scale goes behind the ReLU, into the head weights (B, T, J)."""
    if precision.index == "full":
        return q, w
    codes, scale = index_format(precision).encode(q)
    return codes, w.float() * scale[..., 0]


def check_index_width(precision: Precision, width: int) -> None:
    """Refuse index vectors that eight bits with one scale cannot hold."""
    if precision.index != "full" and (width & (width - 1) or width > fp8.GROUP[1]):
        raise ValueError(
            f"index_precision={precision.index!r} needs an index_head_dim that is a power of two (for the Hadamard "
            f"transform) and at most {fp8.GROUP[1]} (one scale a vector), not {width}: leave it 'full'"
        )
