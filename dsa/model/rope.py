"""Rotary position embedding in its two conventions, with YaRN's frequencies.

A rotary embedding turns pairs of numbers by an angle that grows with the position. Which numbers form a pair is a mere
convention, and V3.2 uses both: MLA pairs *neighbours* (2i, 2i + 1), the indexer pairs *halves* (i, i + R/2). Weights
trained under one give nonsense under the other, and nothing crashes: the first published indexer code had it wrong,
and while K >= S nobody can see it, because every token is selected anyway.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa.model.config import Config, Yarn


def frequencies(width: int, theta: float, yarn: Yarn | None) -> Tensor:
    """Angle per position of each of the R/2 pairs, stretched by YaRN if given: (R/2,) in fp32.

    YaRN leaves the fast pairs as they are, divides the slow ones by `factor`, and ramps linearly between the pairs
    that turn `beta_fast` and `beta_slow` times over the original context (Peng et al. 2023, section 3.2).
    """
    freq = theta ** -(torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)  # (R/2,)
    if yarn is None:
        return freq

    def pair_turning(times: float) -> float:
        """Which (fractional) pair turns so many times over the original context."""
        return width * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    smooth = 1 - ramp.clamp(0, 1)  # 1: keep the frequency, 0: stretch it
    return freq / yarn.factor * (1 - smooth) + freq * smooth


@dataclass(frozen=True)
class Rope:
    """The angles of a run of positions, ready to turn queries and keys: cos and sin (T, R/2) in fp32."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, config: Config, start: int, length: int, device: torch.device | None = None) -> "Rope":
        """Angles of the positions `start ... start + length - 1`."""
        freq = frequencies(config.qk_rope_head_dim, config.rope_theta, config.yarn).to(device)
        angles = torch.arange(start, start + length, dtype=torch.float32, device=device)[:, None] * freq  # (T, R/2)
        return cls(angles.cos(), angles.sin())

    def _turn(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the pairs (a, b), each (B, T, heads, R/2), in fp32 or wider."""
        cos, sin = self.cos[:, None], self.sin[:, None]  # (T, 1, R/2)
        return a * cos - b * sin, b * cos + a * sin

    def neighbours(self, x: Tensor) -> Tensor:
        """Rotate the pairs (2i, 2i + 1), as MLA does: x (B, T, heads, R) -> the same shape and dtype."""
        a, b = self._turn(x[..., 0::2], x[..., 1::2])
        return torch.stack([a, b], dim=-1).flatten(-2).to(x.dtype)

    def halves(self, x: Tensor) -> Tensor:
        """Rotate the pairs (i, i + R/2), as the indexer does: x (B, T, heads, R) -> the same shape and dtype."""
        a, b = self._turn(*x.chunk(2, dim=-1))
        return torch.cat([a, b], dim=-1).to(x.dtype)
