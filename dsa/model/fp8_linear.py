"""A matrix that stays in FP8: codes and block scales are kept; the numbers exist only while they are used.

Kept so, the published weights take one byte each and not two or four, which decides whether a model fits at all. What
it costs is time: each use expands the whole matrix first, into the numbers that an expanded model would hold, so both
give the same logits bit for bit. Deployed kernels multiply the codes themselves (`dsa.kernels.fp8.matmul` shows how)
and round the activations too, which is faster and no longer the same.

Codes and scales are buffers, not parameters: what has been rounded to eight bits is not trained. Their names are the
published ones, `weight` and `weight_scale_inv`. (The latter is the scale that codes are *multiplied* by, despite its
name.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa.kernels import fp8

ROWS = 8 * fp8.BLOCK[0]  # expanded at once: intermediate results stay small


class FP8Linear(nn.Module):
    """A linear layer without bias whose weight (out, in) is stored as e4m3 codes in blocks of 128 x 128."""

    weight: Tensor  # codes (out, in)
    weight_scale_inv: Tensor  # (ceil(out / 128), ceil(in / 128)) in fp32

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        weight = torch.zeros(out_features, in_features, dtype=fp8.E4M3)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale_inv", torch.ones(fp8.scale_shape(weight, fp8.BLOCK)))

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as numbers."""
        codes, scale = here(self.weight), here(self.weight_scale_inv)
        return expand_into(torch.empty_like(codes, dtype=dtype), codes, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: x (..., in) -> (..., out), in x's dtype."""
        return F.linear(x, self.expanded(x.dtype))


def expand_into(target: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Write codes (O, I) times their block scales (o, i) into `target` (O, I) of any dtype, and return it."""
    parts = zip(target.split(ROWS), codes.split(ROWS), scale.split(ROWS // fp8.BLOCK[0]), strict=True)
    for out, some, their_scale in parts:
        out.copy_(fp8.dequantize(some, their_scale, fp8.BLOCK))
    return target


def weight_of(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight (out, in) as numbers, however it is kept."""
    if isinstance(linear, FP8Linear):
        return linear.expanded(dtype)
    assert isinstance(linear, nn.Linear)
    return here(linear.weight)


def here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its own part if the model is split over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
