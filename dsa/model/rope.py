"""Rotary position embedding in its two conventions, with YaRN's frequencies.

A rotary embedding turns pairs of numbers by an angle that grows with the position. Which numbers form a pair is a mere
convention, and V3.2 uses both: MLA's are *interleaved* (2i, 2i + 1), the indexer's *half-split* (i, i + R/2). Weights
trained under one give nonsense under the other, and nothing crashes: the first published indexer code had it wrong,
and while K >= S nobody can see it, because every token is selected anyway.

Cosines and sines are computed once for all positions up to a power of two, and then looked up: a decoded token would
otherwise spend more on its angles than on turning by them.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from dsa.model.config import Config, Yarn


def frequencies(width: int, theta: float, yarn: Yarn | None) -> Tensor:
    """Angle per position of each of the R/2 pairs, stretched by YaRN if given: (R/2,) in fp32.

    YaRN leaves the fast pairs as they are, divides the slow ones by `factor`, and ramps linearly between the pairs
    that turn `beta_fast` and `beta_slow` times over the original context (Peng et al. 2023, section 3.2).
    """
    # One over the power, and not the power of minus: they differ in the last bit, which position 163,839 multiplies.
    freq = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)  # (R/2,)
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


@lru_cache(maxsize=16)
@torch.no_grad()
def rotary_table(
    width: int, theta: float, yarn: Yarn | None, positions: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles at positions 0, 1, ...: two tensors (positions, R/2) in fp32, made once."""
    with torch.inference_mode(False):  # whoever asks first, a later pass may want gradients through what they turn
        freq = frequencies(width, theta, yarn).to(device)
        angles = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * freq
        return angles.cos(), angles.sin()


@lru_cache(maxsize=16)
def partners(width: int, interleaved: bool, device: torch.device) -> Tensor:
    """Where each of R numbers has the other one of its pair: 1, 0, 3, 2, ... or R/2, ..., R - 1, 0, ..., R/2 - 1."""
    with torch.inference_mode(False):
        numbers = torch.arange(width, device=device)
        return numbers ^ 1 if interleaved else numbers.roll(width // 2)


@dataclass(frozen=True)
class Rope:
    """The angles of a run of positions, ready to turn queries and keys: cos and sin (T, R/2) in fp32."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, config: Config, start: int, length: int, device: torch.device | None = None) -> "Rope":
        """Angles of the positions `start ... start + length - 1`."""
        end = start + length
        # tables grow by doubling, so a generation of n tokens asks for log n of them
        positions = 1 << max(end - 1, 255).bit_length()
        cos, sin = rotary_table(config.qk_rope_head_dim, config.rope_theta, config.yarn, positions, device or "cpu")
        return cls(cos[start:end], sin[start:end])

    @cached_property
    def _interleaved(self) -> tuple[Tensor, Tensor, Tensor]:
        """What each of the R numbers is multiplied by, what its partner is, and where that stands."""
        cos, sin = (torch.stack(two, dim=-1).flatten(-2)[:, None] for two in self._signed)
        return cos, sin, partners(cos.shape[-1], True, cos.device)

    @cached_property
    def _half_split(self) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = (torch.cat(two, dim=-1)[:, None] for two in self._signed)
        return cos, sin, partners(cos.shape[-1], False, cos.device)

    @property
    def _signed(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of a pair (a, b): what each is multiplied by, and what the other one then is."""
        return [self.cos, self.cos], [-self.sin, self.sin]

    def interleaved(self, x: Tensor) -> Tensor:
        """Rotate the pairs (2i, 2i + 1), as MLA does: x (B, T, heads, R) -> the same shape and dtype."""
        return _rotate(x, *self._interleaved)

    def half_split(self, x: Tensor) -> Tensor:
        """Rotate the pairs (i, i + R/2), as the indexer does: x (B, T, heads, R) -> the same shape and dtype."""
        return _rotate(x, *self._half_split)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, partner: Tensor) -> Tensor:
    """Each number times its cosine, plus its partner times its signed sine; in fp32 or wider, whatever x is."""
    return (x * cos + x.index_select(-1, partner) * sin).to(x.dtype)
