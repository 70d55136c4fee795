"""FP8 keeps the published rules bit for bit: constructed cases, torch's own casts, exact arithmetic in fractions."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsa.kernels import fp8, loops, ops

calm = settings(deadline=None, max_examples=200)
FINITE = (
    st.floats(width=32, allow_nan=False, allow_infinity=False)
    | st.floats(-600, 600, width=32)
    | st.floats(-(2.0**-5), 2.0**-5, width=32)
)
LISTS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(x):
    return x.view(torch.uint8)


def all_codes():
    """The 254 codes of e4m3 that are numbers; 0 is there twice."""
    codes = torch.arange(256, dtype=torch.uint8)
    return codes[(codes & 0x7F) != 0x7F].view(fp8.E4M3)


def value_of(code):
    """What one byte means, from the definition of e4m3: sign, four exponent bits with bias 7, three fraction bits."""
    sign, exponent, fraction = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * Fraction(fraction, 8) * Fraction(1, 64)
    return sign * (1 + Fraction(fraction, 8)) * Fraction(2) ** (exponent - 7)


GRID = sorted({value_of(code) for code in range(256) if code & 0x7F != 0x7F})


# ---- the grid


def test_the_grid_is_the_definitions():
    assert len(GRID) == 253 and max(GRID) == fp8.E4M3_MAX
    assert min(x for x in GRID if x > 0) == Fraction(1, 512)
    for code, number in zip(bits(all_codes()).tolist(), all_codes().float().tolist(), strict=True):
        assert Fraction(number) == value_of(code)


def test_every_number_of_the_grid_stays():
    numbers = all_codes().float()
    assert torch.equal(fp8.round_to(numbers), numbers)


def test_between_neighbours_a_tie_goes_to_the_even_one():
    positive = torch.tensor([float(x) for x in GRID if x >= 0])
    ties = (positive[:-1] + positive[1:]) / 2  # exact in fp32
    rounded = fp8.round_to(ties)
    even = torch.where(bits(positive[:-1].to(fp8.E4M3)) % 2 == 0, positive[:-1], positive[1:])
    assert torch.equal(rounded, even) and torch.equal(fp8.round_to(-ties), -even)
    infinity = torch.tensor(math.inf)
    assert torch.equal(fp8.round_to(torch.nextafter(ties, infinity)), positive[1:])
    assert torch.equal(fp8.round_to(torch.nextafter(ties, -infinity)), positive[:-1])


@pytest.mark.parametrize(
    ("x", "rounded"),
    [
        (0.0, 0.0), (-0.0, 0.0), (2.0**-10, 0.0), (1.0001 * 2.0**-10, 2.0**-9),  # half the smallest number
        (1.5 * 2.0**-9, 2.0**-8), (7.5 * 2.0**-9, 2.0**-6), (2.0**-149, 0.0),  # subnormals, also of fp32
        (1.0625, 1.0), (1.1875, 1.25), (17.0, 16.0), (19.0, 20.0), (-19.0, -20.0),  # ties
        (448.0, 448.0), (463.9, 448.0), (464.0, 448.0), (1e30, 448.0), (-500.0, -448.0),  # saturation
    ],
)  # fmt: skip
def test_constructed_numbers(x, rounded):
    assert fp8.round_to(torch.tensor(x)) == rounded


@calm
@given(st.lists(FINITE, min_size=1, max_size=200))
def test_rounding_is_torchs_cast_and_goes_to_the_nearest(numbers):
    x = torch.tensor(numbers, dtype=torch.float32)
    assume(bool((x.abs() < 2.0**120).all()))
    rounded = fp8.round_to(x)
    assert torch.equal(rounded, x.clamp(-448, 448).to(fp8.E4M3).float())
    for number, found in zip(x.tolist(), rounded.tolist(), strict=True):
        exact = min(max(Fraction(number), Fraction(-448)), Fraction(448))
        assert abs(Fraction(found) - exact) == min(abs(g - exact) for g in GRID)


@pytest.mark.parametrize(
    ("kind", "fraction_bits", "least_exponent"),
    [(torch.bfloat16, 7, -100), (torch.float16, 10, -14), (torch.float8_e5m2, 2, -14)],
)
def test_other_formats_too(kind, fraction_bits, least_exponent):
    x = torch.cat([normal(5000) * 2.0**n for n in (-18, -10, 0, 8)])
    largest = torch.finfo(kind).max
    assert torch.equal(fp8.round_to(x, fraction_bits, least_exponent, largest), x.to(kind).float())


# ---- scales


def exact_scale(amax):
    """2^ceil(log2(max(amax, 1e-4) / 448)) in whole numbers."""
    ratio = max(Fraction(amax), Fraction(float(torch.tensor(1e-4)))) / 448
    power = 0
    while Fraction(2) ** power < ratio:
        power += 1
    while Fraction(2) ** (power - 1) >= ratio:
        power -= 1
    return Fraction(2) ** power


@calm
@given(st.floats(0, 2.0**127, width=32))
def test_a_scale_is_the_smallest_power_of_two_that_fits(amax):
    scale = float(fp8.scales(torch.tensor(amax)))
    assert Fraction(scale) == exact_scale(amax)
    assert Fraction(amax) / Fraction(scale) <= 448


@pytest.mark.parametrize("power", [-20, -9, -1, 0, 1, 10, 23, 100])
def test_at_a_power_of_two_the_scale_does_not_slip(power):
    """Where log2 in floating point goes wrong: 448 * 2^n needs 2^n, and the next number above it twice that."""
    edge = torch.tensor(448.0 * 2.0**power)
    above, below = torch.nextafter(edge, torch.tensor(math.inf)), torch.nextafter(edge, torch.tensor(0.0))
    found = [float(fp8.scales(x)) / 2.0**power for x in (below, edge, above)]
    assert found == [1, 1, 2]


def test_logarithms_would_slip():
    above = torch.nextafter(torch.tensor(448.0 * 2.0**23), torch.tensor(math.inf))
    assert 2 ** float((above / 448).log2().ceil()) < float(exact_scale(float(above)))


def test_plain_scales_use_the_whole_range():
    amax = torch.tensor([3.0, 448.0, 0.0, 1e-5])
    assert torch.equal(fp8.scales(amax, ue8m0=False), torch.tensor([3.0, 448.0, 1e-4, 1e-4]) / 448)


def test_powers_of_two_are_exact():
    exponents = torch.arange(-126, 128)
    assert [math.log2(x) for x in fp8.power_of_two(exponents).tolist()] == exponents.tolist()


# ---- blocks


def by_loops(x, block, ue8m0):
    """Quantise block by block, with slices only."""
    codes, scale = torch.zeros_like(x), torch.zeros(*fp8.scale_shape(x, block))
    for m in range(scale.shape[0]):
        for n in range(scale.shape[1]):
            part = slice(m * block[0], (m + 1) * block[0]), slice(n * block[1], (n + 1) * block[1])
            scale[m, n] = fp8.scales(x[part].abs().max(), ue8m0)
            codes[part] = (x[part] / scale[m, n]).clamp(-448, 448)
    return codes.to(fp8.E4M3), scale


@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize("block", [fp8.GROUP, fp8.BLOCK, (3, 5)])
@pytest.mark.parametrize("shape", [(1, 1), (2, 128), (128, 128), (129, 255), (300, 7), (130, 400)])
def test_blocks_are_those_of_the_loops(shape, block, ue8m0):
    x = normal(*shape) * torch.logspace(-3, 3, shape[1])
    codes, scale = fp8.quantize(x, block, ue8m0)
    slow, slow_scale = by_loops(x, block, ue8m0)
    assert torch.equal(bits(codes), bits(slow)) and torch.equal(scale, slow_scale)
    assert scale.shape == (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    back = fp8.dequantize(codes, scale, block)
    wide = fp8.expand_scale(scale, x.shape, block)
    assert ((back - x).abs() <= x.abs() * 2.0**-4 + wide * 2.0**-10).all()  # half a step, normal or subnormal


def test_batches_are_quantised_one_by_one():
    x = normal(2, 3, 5, 200)
    codes, scale = fp8.quantize(x)
    assert scale.shape == (2, 3, 5, 2)
    one, one_scale = fp8.quantize(x[1, 2])
    assert torch.equal(bits(codes[1, 2]), bits(one)) and torch.equal(scale[1, 2], one_scale)


def test_zeros_stay_zeros():
    codes, scale = fp8.quantize(torch.zeros(2, 256))
    assert not codes.float().any() and torch.equal(scale, torch.full((2, 2), 2.0**-22))  # 1e-4 / 448, rounded up
    assert not fp8.quantize(torch.full((1, 128), 1e-10))[0].float().any()  # and what is tiny beside 1e-4 becomes one
    assert not fp8.quantize_int8(torch.zeros(2, 8))[0].any()


@calm
@given(LISTS)
def test_exact_arithmetic_gives_the_same_codes(numbers):
    x = torch.tensor([numbers], dtype=torch.float32)
    codes, scale = fp8.quantize(x)
    for n, group in enumerate(x[0].split(128)):
        unit = exact_scale(float(group.abs().max()))
        assert Fraction(float(scale[0, n])) == unit
        for number, code in zip(group.tolist(), codes[0].split(128)[n].float().tolist(), strict=True):
            exact = Fraction(number) / unit
            assert abs(Fraction(code) - exact) == min(abs(g - exact) for g in GRID)


@calm
@given(LISTS)
def test_rounding_twice_is_rounding_once(numbers):
    once = fp8.dequantize(*fp8.quantize(torch.tensor([numbers], dtype=torch.float32)))
    assert torch.equal(fp8.dequantize(*fp8.quantize(once)), once)


@calm
@given(LISTS, st.integers(-8, 8))
def test_a_power_of_two_passes_through(numbers, power):
    x = torch.tensor([numbers], dtype=torch.float32)
    assume(float(x.abs().max()) > 1 and all(float(group.abs().max()) > 1 for group in x[0].split(128)))
    codes, scale = fp8.quantize(x)
    again, again_scale = fp8.quantize(x * 2.0**power)
    assert torch.equal(bits(codes), bits(again)) and torch.equal(again_scale, scale * 2.0**power)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_refused(bad):
    x = torch.ones(2, 130)
    x[1, 129] = bad
    with pytest.raises(ValueError, match="1 of 260 numbers are infinite or NaN"):
        fp8.quantize(x)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x has shape \(5,\), blocks need two dimensions"):
        fp8.quantize(torch.ones(5))
    codes, scale = fp8.quantize(torch.ones(200, 200))
    with pytest.raises(ValueError, match=r"need scales \(\.\.\., \(2, 2\)\), not \(200, 2\)"):
        fp8.dequantize(codes, scale, fp8.BLOCK)


# ---- matrix product


def test_matmul_is_the_product_of_what_is_left():
    x, w = normal(2, 5, 300), normal(200, 300, seed=1)
    left, right = fp8.quantize(x), fp8.quantize(w, fp8.BLOCK)
    exact = fp8.dequantize(*left).double() @ fp8.dequantize(*right, fp8.BLOCK).double().T
    found = fp8.matmul(*left, *right)
    assert found.dtype == torch.float32 and found.shape == (2, 5, 200)
    assert (found - exact).abs().max() < 1e-4 * exact.abs().max()
    error = (found - x @ w.T).norm() / (x @ w.T).norm()
    assert 0.02 < error < 0.06  # the price of eight bits


def test_matmul_is_exact_where_fp32_is():
    """Small whole numbers and powers of two: no sum rounds, so every digit must be right."""
    x = torch.randint(-15, 16, (7, 256), generator=torch.Generator().manual_seed(0)).float()
    w = torch.randint(-15, 16, (130, 256), generator=torch.Generator().manual_seed(1)).float()
    x[:, 128:] *= 2.0**10  # the second block has another scale
    left, right = fp8.quantize(x), fp8.quantize(w, fp8.BLOCK)
    assert torch.equal(fp8.matmul(*left, *right), x @ w.T)


# ---- Hadamard


def sylvester(width):
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix * width**-0.5


@pytest.mark.parametrize("width", [1, 2, 4, 32, 128])
def test_hadamard_is_sylvesters_matrix(width):
    x, matrix = normal(3, width), sylvester(width)
    torch.testing.assert_close(fp8.hadamard(x), x @ matrix, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fp8.hadamard(fp8.hadamard(x)), x, atol=1e-5, rtol=1e-5)
    assert fp8.hadamard(x.bfloat16()).dtype == torch.bfloat16


def test_hadamard_keeps_products_and_refuses_other_widths():
    q, k = normal(4, 64), normal(4, 64, seed=1)
    torch.testing.assert_close((fp8.hadamard(q) * fp8.hadamard(k)).sum(-1), (q * k).sum(-1), atol=1e-4, rtol=1e-4)
    for width in (0, 3, 48):
        with pytest.raises(ValueError, match=f"a power of two as width, not {width}"):
            fp8.hadamard(torch.ones(2, width))


# ---- index scores


def factors(B=2, T=5, S=9, J=4, W=32):
    return normal(B, T, J, W), normal(B, S, W, seed=1), normal(B, T, J, seed=2)


def test_index_scores_are_eq_1_of_what_is_left():
    q, k, w = factors()
    (q8, q_scale), (k8, k_scale) = fp8.quantize(q), fp8.quantize(k)
    found = fp8.index_scores(q8, q_scale, k8, k_scale, w)
    by_definition = loops.index_scores(fp8.dequantize(q8, q_scale), fp8.dequantize(k8, k_scale), w)
    assert torch.equal(found.isinf(), by_definition.isinf())
    torch.testing.assert_close(found, by_definition, atol=1e-4, rtol=1e-4)


@calm
@given(st.integers(0, 10**6))
def test_a_power_of_two_may_move_behind_the_relu_bit_for_bit(seed):
    q, k, w = normal(1, 4, 3, 16, seed=seed), normal(1, 6, 16, seed=seed + 1), normal(1, 4, 3, seed=seed + 2)
    (q8, q_scale), (k8, k_scale) = fp8.quantize(q * 100), fp8.quantize(k)
    moved = fp8.index_scores(q8, q_scale, k8, k_scale, w)
    before = ops.index_scores(fp8.dequantize(q8, q_scale), fp8.dequantize(k8, k_scale), w, backend="reference")
    assert torch.equal(moved, before)


def test_any_positive_scale_may_but_not_a_negative_one():
    q, k, w = factors()
    (q8, q_scale), (k8, k_scale) = fp8.quantize(q, ue8m0=False), fp8.quantize(k, ue8m0=False)
    before = ops.index_scores(fp8.dequantize(q8, q_scale), fp8.dequantize(k8, k_scale), w)
    torch.testing.assert_close(fp8.index_scores(q8, q_scale, k8, k_scale, w), before, atol=1e-4, rtol=1e-4)
    flipped = fp8.index_scores(q8, -q_scale, k8, k_scale, w)
    visible = ~before.isinf()
    assert (flipped - ops.index_scores(-q, k, w))[visible].abs().max() > 1


def test_more_than_one_scale_a_vector_cannot_move():
    q, k, w = factors(W=256)
    with pytest.raises(ValueError, match="2 scales for a query and 2 for a key"):
        fp8.index_scores(*fp8.quantize(q), *fp8.quantize(k), w)


# ---- whole numbers


@calm
@given(LISTS)
def test_int8_rounds_each_row_to_the_nearest_of_255_steps(numbers):
    x = torch.tensor([numbers, numbers[::-1]], dtype=torch.float32)
    codes, scale = fp8.quantize_int8(x)
    assert codes.dtype == torch.int8 and codes.abs().max() <= 127 and scale.shape == (2, 1)
    assert torch.equal(scale[0], torch.tensor([max(map(abs, x[0].tolist()))]).clamp(min=1e-4) / 127)
    assert ((codes * scale - x).abs() <= scale * 0.5001).all()
    assert x.abs().max() < 1e-4 or codes.abs().max() == 127


def test_int8_scales_move_behind_the_relu_too():
    q, k, w = factors()
    (q8, q_scale), (k8, k_scale) = fp8.quantize_int8(q), fp8.quantize_int8(k)
    found = fp8.index_scores(q8, q_scale, k8, k_scale, w)
    torch.testing.assert_close(found, ops.index_scores(q8 * q_scale, k8 * k_scale, w), atol=1e-4, rtol=1e-4)
