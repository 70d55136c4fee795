"""What kernels are fed with: random numbers of the real shape, several sets of them, made where they are needed.

Random because zeros hide mistakes and run faster; new in each run because a kernel must be right for any. Codes of
eight bits are rounded normal numbers with scales that are powers of two. Selected positions are one from each of K
equal stretches of what a query sees: as scattered as a real choice, in rising order, none twice.

On "meta" the same calls make tensors without numbers, from which a test counts the memory that the real ones will take.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dsa.kernels.fp8 import E4M3, QuantizedLatentKV, power_of_two

Made = TypeVar("Made")


@dataclass(frozen=True)
class Shape:
    """Sizes of what is measured; as they stand, those of DeepSeek-V3.2-Exp and of the targets."""

    heads: int = 128  # H
    nope: int = 128  # N
    rotary: int = 64  # R
    value: int = 128  # V
    latent: int = 512  # C
    index_heads: int = 64  # J
    index_width: int = 128  # W
    top_k: int = 2048  # K
    prompt: int = 2048  # queries at once for one kernel
    chunk: int = 4096  # queries at once for a layer
    lengths: tuple[int, ...] = (32768, 65536, 131072)  # S
    indexer_batch: int = 16  # sequences decoded together, for the indexer,
    layer_batch: int = 32  # a layer,
    attention_batch: int = 128  # and sparse attention
    square: int = 8192  # of the matrix product that shows the machine's own rate

    @property
    def wide(self) -> int:
        """C + R, the width of a latent with its rotary key."""
        return self.latent + self.rotary

    @property
    def longest(self) -> int:
        """The most keys."""
        return self.lengths[-1]

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by before the softmax; of some size or other."""
        return (self.nope + self.rotary) ** -0.5


@dataclass(frozen=True)
class Inputs:
    """Makes tensors on one device: numbers in `kind`, as many sets as are to be rotated, and the backend they go to."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    sets: int = 3
    backend: str = "triton"

    def each(self, make: Callable[[], Made], sets: int | None = None) -> list[Made]:
        """Several sets of the same."""
        return [make() for _ in range(sets or self.sets)]

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def codes(self, *shape: int) -> Tensor:
        """Normal numbers rounded to e4m3."""
        return self.normal(*shape, dtype=torch.bfloat16).to(E4M3)

    def scales(self, *shape: int) -> Tensor:
        """Powers of two from 1/4 to 2 in fp32."""
        return power_of_two(torch.randint(-2, 2, shape, device=self.device))

    def cache(self, B: int, S: int, shape: Shape) -> QuantizedLatentKV:
        """An FP8 cache of S tokens."""
        codes, scale = self.codes(B, S, shape.latent), self.scales(B, S, shape.latent // 128)
        return QuantizedLatentKV(codes, scale, self.normal(B, S, shape.rotary))

    def positions(self, B: int, T: int, S: int, K: int) -> Tensor:
        """K positions for each of the last T of S queries, which the first of them sees too: (B, T, K), rising."""
        stretch = (S - T + 1) // K
        first = stretch * torch.arange(K, device=self.device)
        return first + torch.randint(stretch, (B, T, K), device=self.device)
