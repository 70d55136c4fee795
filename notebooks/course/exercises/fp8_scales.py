"""The exercises of chapter 07: a scale, a group, a product in blocks, and index scores that never leave eight bits.

Each wrong answer is one that somebody has really written, or that agrees with the right one on most inputs: powers of
two and the last, shorter group are where they part. The two about products are in `fp8_products`.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from course.bugs.injected_bugs import Patch
from course.exercises.exercise import Answer, Exercise, checker, require
from course.exercises.fp8_products import BLOCK_MATMUL, INDEX_SCORES
from dsa.kernels import fp8


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def my_scale(amax: float) -> float:
    """The smallest power of two that brings amax down to 448 or less.

    amax is at least 1e-4.
    """
    fraction, exponent = math.frexp(amax)  # amax = fraction * 2**exponent
    return 2.0 ** (exponent - 9 + (fraction > 0.875))  # 448 = 0.875 * 2**9


def _rounds_the_power(amax: float) -> float:
    """Rounds the power to the nearest: up to half of the time amax is then still over 448."""
    return 2.0 ** round(math.log2(amax / 448))


def _cuts_the_power(amax: float) -> float:
    """Cuts the power off: nearly always too small by one."""
    return 2.0 ** math.floor(math.log2(amax / 448))


def _always_one_more(amax: float) -> float:
    """Adds one to the cut power: too large exactly where amax is 448 times a power of two."""
    return 2.0 ** (math.floor(math.log2(amax / 448)) + 1)


def _logarithm_in_fp32(amax: float) -> float:
    """Takes the logarithm in fp32, which rounds away what lies just above a power of two."""
    return 2.0 ** float(torch.tensor(amax / 448).log2().ceil())


def _logarithm_in_double(amax: float) -> float:
    """Takes the logarithm in double precision: that rounds too, only later."""
    return 2.0 ** math.ceil(math.log2(amax / 448))


def _check_scale(answer) -> None:
    edges = [448 * 2.0**n * factor for n in range(-22, 24, 5) for factor in (1 - 2**-23, 1, 1 + 2**-23)]
    edges += [math.nextafter(448 * 2.0**n, towards) for n in range(-22, 24, 5) for towards in (0, math.inf)]
    for amax in [448.0, 449.0, 447.0, 1.0, 300.0, 1e-4, 1e6, *edges]:
        found = answer(amax)
        shown = f"{amax!r}"
        require(isinstance(found, float) and found > 0, f"return a positive float, not {found!r}")
        require(math.frexp(found)[0] == 0.5, f"{found!r} is no power of two (amax {shown})")
        ratio = Fraction(amax) / Fraction(found)
        require(ratio <= 448, f"amax {shown} divided by {found!r} is still over 448")
        require(ratio * 2 > 448, f"for amax {shown} half of {found!r} would do: range is given away")


def my_quantize(x: Tensor) -> Tensor:
    """Rounds a vector to e4m3 in groups of 128 and scales it back.

    x (W,) in fp32 -> fp32 (W,). The last group may be shorter. Use
    fp8.scales(amax) for the scale and fp8.round_to(...) for rounding.
    """
    parts = []
    for group in x.split(128):
        scale = fp8.scales(group.abs().max())
        parts.append(fp8.round_to(group / scale) * scale)
    return torch.cat(parts)


def _one_scale(x: Tensor) -> Tensor:
    """Takes one scale for the whole vector."""
    scale = fp8.scales(x.abs().max())
    return fp8.round_to(x / scale) * scale


def _without_magnitude(x: Tensor) -> Tensor:
    """Takes the largest number instead of the largest magnitude: a large negative one saturates."""
    parts = [(group, fp8.scales(group.max())) for group in x.split(128)]
    return torch.cat([fp8.round_to(group / scale) * scale for group, scale in parts])


def _drops_the_rest(x: Tensor) -> Tensor:
    """Reshapes to (n, 128), and so loses the last, shorter group."""
    groups = x[: len(x) // 128 * 128].view(-1, 128)
    scale = fp8.scales(groups.abs().amax(-1, keepdim=True))
    return (fp8.round_to(groups / scale) * scale).flatten()


def _without_scale(x: Tensor) -> Tensor:
    """Casts as it is, without a scale: small numbers fall into the coarse end of the grid."""
    return fp8.round_to(x)


def _calls_the_package(x: Tensor) -> Tensor:
    """Has the package do all of it: the numbers are right, and nothing was written."""
    return fp8.dequantize(*fp8.quantize(x[None]))[0]


def _by_hand(answer: Answer, x: Tensor) -> Tensor:
    """What `answer` makes of x, unless it lets `fp8.quantize` look for the groups' largest numbers."""
    asked, right = [], fp8.block_amax

    def spied(x: Tensor, block: tuple[int, int]) -> Tensor:
        asked.append(block)
        return right(x, block)

    with Patch(fp8, "block_amax", spied)():
        found = answer(x.clone())
    require(not asked, "fp8.quantize does all of it: write the groups yourself, with fp8.scales and fp8.round_to")
    return found


def _check_quantize(answer: Answer) -> None:
    for seed, width in enumerate((128, 256, 300, 5)):
        x = _normal(width, seed=seed) * 10.0 ** torch.randint(
            -4, 3, (width,), generator=torch.Generator().manual_seed(1)
        )
        x[1] = -1.01 * x.abs().max()
        x[280:] = 0  # a group may end in zeros, and no scale may become 0
        found = _by_hand(answer, x)
        require(getattr(found, "shape", None) == x.shape, f"{width} numbers must stay {width}")
        right = fp8.dequantize(*fp8.quantize(x[None]))[0]
        wrong = (found != right).nonzero().flatten().tolist()
        where = f"of {width} numbers, {len(wrong)} differ; the first is number {wrong[0] if wrong else 0}"
        require(
            not wrong, f"{where}: {float(x[wrong[:1]].sum()):.4g} should become {float(right[wrong[:1]].sum()):.4g}"
        )


EXERCISES = (
    Exercise(
        "A scale that is a power of two", 1, 10,
        "An FP8 scale is stored as an exponent alone. Find the power: large enough that nothing exceeds 448, and not "
        "one larger. The checker asks you *at* the powers of two (times 448), and for the floating-point numbers right "
        "beside them, where the logarithm failed. One in double precision fails there too.",
        ("2 ** ceil(log2(amax / 448)) is the formula. Division and logarithm round: use neither.",
         "`math.frexp(amax)` gives amax = fraction * 2**exponent with 0.5 <= fraction < 1, exactly.",
         "448 is 0.875 * 2**9: compare the fractions, subtract the exponents."),
        my_scale,
        (_rounds_the_power, _cuts_the_power, _always_one_more, _logarithm_in_fp32, _logarithm_in_double), _check_scale,
    ),
    Exercise(
        "Groups of 128", 1, 10,
        "Round a vector group by group, without `fp8.quantize`. What comes back must equal the package's in every bit, "
        "for any width.",
        ("`x.split(128)` gives the groups, the last one shorter if need be.",
         "The scale belongs to the largest *magnitude*: `group.abs().max()`.",
         "Divide by the scale, round, multiply by the scale; then `torch.cat`."),
        my_quantize,
        (_one_scale, _without_magnitude, _drops_the_rest, _without_scale, _calls_the_package), _check_quantize,
    ),
    BLOCK_MATMUL,
    INDEX_SCORES,
)  # fmt: skip
check = checker(*EXERCISES)
