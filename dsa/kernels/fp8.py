"""FP8 by the published rules: one sign, four exponent and three fraction bits, and a scale for each block of numbers.

Eight bits hold 253 different numbers, the largest 448, the smallest above zero 2^-9: `e4m3`. That is far too few for a
whole tensor and enough for 128 neighbours, if these are divided by a scale of their own first. Activations get one
scale for each run of 128 in a row (GROUP), weights one for each square of 128 x 128 (BLOCK), so that a matrix product
can be summed block by block and each partial sum multiplied by two scales.

Scales here are powers of two (`ue8m0`: eight bits, exponent only). Dividing by one is exact, and multiplying by it
commutes with every other rounding; the price is up to one bit of the range. The power is usually found with log2 and
ceil in floating point, which can miss by one at the boundary. Here it is read off the number's own exponent: exact.

All of it is plain torch, meant to be read, and to be what faster kernels are held against. Eight bits with one scale a
row (`quantize_int8`) stand in on processors that multiply whole numbers fast and FP8 slowly.
"""

from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa.kernels import reference
from dsa.kernels.reference import at_least_fp32

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # 1.75 * 2^8; there is no infinity
MIN_AMAX = 1e-4  # a block of zeros has a scale too
GROUP = (1, 128)  # activations: runs of a row
BLOCK = (128, 128)  # weights: squares


class QuantizedTensor(NamedTuple):
    """Vectors in eight bits with one scale each, as a cache stores them: codes (..., W), scale (..., 1) in fp32."""

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """What the codes stand for (..., W), in fp32."""
        return self.codes.float() * self.scale


class QuantizedLatentKV(NamedTuple):
    """What an FP8 cache holds of S tokens: latent codes (B, S, C), scales (B, S, C / 128), rotary keys (B, S, R)."""

    codes: Tensor
    scale: Tensor
    rope: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """What it stands for (B, S, C + R)."""
        return torch.cat([dequantize(self.codes, self.scale).to(dtype), self.rope.to(dtype)], dim=-1)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, exactly, for whole exponents -126 ... 127: the exponent is written into the bits."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def round_to(x: Tensor, fraction_bits: int = 3, least_exponent: int = -6, largest: float = E4M3_MAX) -> Tensor:
    """Round to a small floating-point format, by default e4m3: fp32 -> the nearest of its numbers, still fp32.

    Between 2^e and 2^(e + 1) neighbours lie 2^(e - fraction_bits) apart; below 2^least_exponent they keep that
    distance down to zero (subnormals). A tie goes to the even neighbour; what is too large becomes +-`largest`.
    For finite x with exponents under 127; a property test holds it to torch's own casts.
    """
    exponent = torch.frexp(x).exponent - 1  # 2^exponent <= |x| < 2^(exponent + 1)
    step = power_of_two(exponent.clamp(min=least_exponent) - fraction_bits)
    return ((x / step).round() * step).clamp(-largest, largest)


def scales(amax: Tensor, ue8m0: bool = True) -> Tensor:
    """Scales that bring largest magnitudes `amax` into the range of e4m3: same shape, fp32.

    max(amax, 1e-4) / 448, with `ue8m0` rounded up to a power of two: 2^ceil(log2(amax / 448)).
    """
    amax = amax.float().clamp(min=MIN_AMAX)
    if not ue8m0:
        return amax / E4M3_MAX
    fraction, exponent = torch.frexp(amax)  # amax = fraction * 2^exponent, and 448 = 0.875 * 2^9
    return power_of_two(exponent - 9 + (fraction > 0.875))


def scale_shape(x: Tensor, block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks cover the last two dimensions: the shape of the scales, ceil(M / rows) x ceil(N / columns)."""
    return ceil(x.shape[-2] / block[0]), ceil(x.shape[-1] / block[1])


def expand_scale(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Repeat each scale over its block: (..., m, n) -> (..., M, N), blocks at the edges cut."""
    wide = scale.repeat_interleave(block[0], dim=-2).repeat_interleave(block[1], dim=-1)
    return wide[..., : shape[-2], : shape[-1]]


def quantize(
    x: Tensor, block: tuple[int, int] = GROUP, ue8m0: bool = True, *, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Divide each block by its scale and round to e4m3.

    Args:
        x: (..., M, N), taken in fp32. M and N need not be multiples of the block.
        block: rows and columns that share a scale: GROUP for activations, BLOCK for weights.
        ue8m0: scales are powers of two.
        check: look for infinities and NaN. That waits for the device; a cache, written in every layer, does without.

    Returns:
        codes (..., M, N) in e4m3 and scales (..., ceil(M / rows), ceil(N / columns)) in fp32; x is about codes * scale.

    Raises:
        ValueError: for infinities and NaN, which would spoil the scale of their whole block, and vectors.
    """
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, blocks need two dimensions: give x[None]")
    x = x.float()
    if check and (broken := int((~x.isfinite()).sum())):
        raise ValueError(f"{broken} of {x.numel()} numbers are infinite or NaN, and a scale must be finite: mend them")
    scale = scales(block_amax(x, block), ue8m0)
    scaled = x / expand_scale(scale, x.shape, block)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude in each block: (..., M, N) -> (..., m, n)."""
    (rows, columns), (m, n) = block, scale_shape(x, block)
    padded = F.pad(x.abs(), (0, n * columns - x.shape[-1], 0, m * rows - x.shape[-2]))
    return padded.unflatten(-1, (n, columns)).unflatten(-3, (m, rows)).amax((-3, -1))  # (..., m, rows, n, columns)


def dequantize(codes: Tensor, scale: Tensor, block: tuple[int, int] = GROUP) -> Tensor:
    """Multiply each block by its scale: codes (..., M, N), scale (..., m, n) -> fp32 (..., M, N)."""
    if tuple(scale.shape[-2:]) != scale_shape(codes, block):
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} in blocks of {block} need scales (..., {scale_shape(codes, block)}), "
            f"not {tuple(scale.shape)}"
        )
    return codes.float() * expand_scale(scale, codes.shape, block)


def matmul(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Multiply quantized activations with quantized weights: x (..., M, N), w (O, N) -> x w^T (..., M, O) in fp32.

    The sum runs over blocks of 128 columns. Within a block codes are multiplied and summed in fp32; then the partial
    sum gets its two scales, x's of this row and block, and w's of this block of rows.

    Args:
        x, x_scale: as `quantize` gives them in GROUP: (..., M, N), (..., M, n).
        w, w_scale: in BLOCK: (O, N), (o, n).
    """
    total = x_scale.new_zeros(*x.shape[:-1], w.shape[0])
    for number, (a, b) in enumerate(zip(x.split(BLOCK[1], dim=-1), w.split(BLOCK[1], dim=-1), strict=True)):
        per_output = w_scale[:, number].repeat_interleave(BLOCK[0])[: w.shape[0]]  # (O,)
        total += a.float() @ b.float().T * x_scale[..., number, None] * per_output
    return total


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last dimension W by the Hadamard matrix in Sylvester's order, times W^-0.5: the same shape.

    The matrix is orthogonal, so q . k stays as it is if both are multiplied, while one large number is spread over all
    W. Done by halves, in W log2(W) additions: H_2n = [[H_n, H_n], [H_n, -H_n]].
    """
    width = x.shape[-1]
    if width == 0 or width & (width - 1):
        raise ValueError(f"a Hadamard transform needs a power of two as width, not {width}")
    wide, half = at_least_fp32(x), 1
    while half < width:
        a, b = wide.unflatten(-1, (-1, 2, half)).unbind(-2)  # neighbouring runs of `half` numbers
        wide = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return (wide * width**-0.5).to(x.dtype)


def index_scores(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, w: Tensor) -> Tensor:
    """Index scores from codes (report Eq. 1): k_scale * sum_j (w * q_scale) * ReLU(q8 . k8).

    ReLU(a x) = a ReLU(x) for a > 0, so both scales may leave the product of codes: the query's joins the head weight,
    and the key's, the same for all heads, comes last.

    Args:
        q, q_scale: codes of the queries (B, T, J, W), one scale each (B, T, J, 1).
        k, k_scale: codes of the keys (B, S, W), one scale each (B, S, 1).
        w: head weights (B, T, J).

    Returns:
        I (B, T, S) in fp32, -inf in the future.
    """
    if q_scale.shape[-1] != 1 or k_scale.shape[-1] != 1:
        raise ValueError(
            f"{q_scale.shape[-1]} scales for a query and {k_scale.shape[-1]} for a key: only one each can leave the "
            f"product, so the index width may be at most {GROUP[1]}"
        )
    return reference.index_scores(q.float(), k.float(), w.float() * q_scale[..., 0]) * k_scale.mT


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to whole numbers -127 ... 127: x (..., W) -> codes (..., W) int8, scale (..., 1) = amax / 127."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=MIN_AMAX) / 127
    return (x / scale).round().to(torch.int8), scale
