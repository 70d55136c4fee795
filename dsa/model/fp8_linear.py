"""A matrix that stays in FP8: codes and block scales are kept, and dequantized only while they are used.

Kept so, the published weights take one byte each and not two or four, which decides whether a model fits at all. What
it costs is time: each use dequantizes the whole matrix first, to what a model dequantized on loading would hold, so
both give the same logits bit for bit. Deployed kernels multiply the codes themselves (`dsa.kernels.fp8.matmul` shows
how) and round the activations too, which is faster and no longer the same.

Codes and scales are buffers, not parameters: what has been rounded to eight bits is not trained. Their names are the
published ones, `weight` and `weight_scale_inv`. (The latter is the scale that codes are *multiplied* by, despite its
name.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa.kernels import fp8

ROWS = 8 * fp8.BLOCK[0]  # dequantized at once: intermediate results stay small


class FP8Linear(nn.Module):
    """A linear layer without bias whose weight (out, in) is stored as e4m3 codes in blocks of 128 x 128."""

    weight: Tensor  # codes (out, in)
    weight_scale_inv: Tensor  # (ceil(out / 128), ceil(in / 128)) in fp32

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        weight = torch.zeros(out_features, in_features, dtype=fp8.E4M3)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale_inv", torch.ones(fp8.scale_shape(weight, fp8.BLOCK)))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in `dtype`."""
        codes, scale = to_local(self.weight), to_local(self.weight_scale_inv)
        return dequantize_into(torch.empty_like(codes, dtype=dtype), codes, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: x (..., in) -> (..., out), in x's dtype."""
        return F.linear(x, self.dequantized(x.dtype))


def dequantize_into(target: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Write codes (O, I) times their block scales (o, i) into `target` (O, I) of any dtype, and return it."""
    blocks = zip(target.split(ROWS), codes.split(ROWS), scale.split(ROWS // fp8.BLOCK[0]), strict=True)
    for out, codes_block, scale_block in blocks:
        out.copy_(fp8.dequantize(codes_block, scale_block, fp8.BLOCK))
    return target


def weight_of(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight (out, in), dequantized if it is kept in FP8."""
    if isinstance(linear, FP8Linear):
        return linear.dequantized(dtype)
    assert isinstance(linear, nn.Linear)
    return to_local(linear.weight)


def to_local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its own part if the model is split over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
