"""The exercises of chapter 05: a scale, a group, a product in blocks, and index scores that never leave eight bits.

Each wrong answer is one that somebody has really written, or that agrees with the right one on most inputs: powers of
two and the last, shorter group are where they part.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from dsa.kernels import fp8, loops
from dsa.show.exercises.core import Exercise, require


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# E5.1 ---------------------------------------------------------------------------------------------------------------


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


def _check_scale(answer) -> None:
    edges = [448 * 2.0**n * factor for n in range(-22, 24, 5) for factor in (1 - 2**-23, 1, 1 + 2**-23)]
    for amax in [448.0, 449.0, 447.0, 1.0, 300.0, 1e-4, 1e6, *edges]:
        found = answer(amax)
        shown = f"{amax!r}"
        require(isinstance(found, float) and found > 0, f"return a positive float, not {found!r}")
        require(math.frexp(found)[0] == 0.5, f"{found!r} is no power of two (amax {shown})")
        ratio = Fraction(amax) / Fraction(found)
        require(ratio <= 448, f"amax {shown} divided by {found!r} is still over 448")
        require(ratio * 2 > 448, f"for amax {shown} half of {found!r} would do: range is given away")


# E5.2 ---------------------------------------------------------------------------------------------------------------


def my_quantise(x: Tensor) -> Tensor:
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


def _check_quantise(answer) -> None:
    for seed, width in enumerate((128, 256, 300, 5)):
        x = _normal(width, seed=seed) * 10.0 ** torch.randint(
            -4, 3, (width,), generator=torch.Generator().manual_seed(1)
        )
        x[1] = -1.01 * x.abs().max()
        found = answer(x.clone())
        require(getattr(found, "shape", None) == x.shape, f"{width} numbers must stay {width}")
        right = fp8.dequantise(*fp8.quantise(x[None]))[0]
        wrong = (found != right).nonzero().flatten().tolist()
        where = f"of {width} numbers, {len(wrong)} differ; the first is number {wrong[0] if wrong else 0}"
        require(
            not wrong, f"{where}: {float(x[wrong[:1]].sum()):.4g} should become {float(right[wrong[:1]].sum()):.4g}"
        )


# E5.3 ---------------------------------------------------------------------------------------------------------------


def my_block_matmul(x, x_scale, w, w_scale) -> Tensor:
    """Multiply quantised matrices: x (M, N), w (O, N) -> x w^T (M, O).

    x (M, N) holds codes with x_scale (M, N / 128), one for each run of 128;
    w (O, N) with w_scale (O / 128, N / 128), one for each square.
    Codes arrive as fp32. Multiply codes first, scales afterwards.
    """
    total = torch.zeros(len(x), len(w))
    for n in range(x_scale.shape[1]):
        columns = slice(128 * n, 128 * (n + 1))
        part = x[:, columns] @ w[:, columns].T  # (M, O), codes only
        per_output = w_scale[:, n].repeat_interleave(128)  # (O,)
        total += part * x_scale[:, n, None] * per_output
    return total


def _scales_at_the_end(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Sums over all columns and applies the first block's scales: blocks differ."""
    return x @ w.T * x_scale[:, :1] * w_scale[:, 0].repeat_interleave(128)


def _rows_and_columns_swapped(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Repeats a block's scale in the wrong order, 0 1 0 1 ... instead of 0 0 ... 1 1."""
    wide = w_scale.repeat(128, 1)
    parts = [
        x[:, 128 * n : 128 * n + 128] @ w[:, 128 * n : 128 * n + 128].T * x_scale[:, n, None] * wide[:, n]
        for n in range(x_scale.shape[1])
    ]
    return torch.stack(parts).sum(0)


def _forgets_the_weights(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Applies the activations' scales and forgets the weights'."""
    return (x * x_scale.repeat_interleave(128, 1)) @ w.T


def _divides(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Divides by the scales. (The files call them weight_scale_inv, and they are multiplied with.)"""
    wide = fp8.spread(w_scale, w.shape, fp8.BLOCK)
    return (x / x_scale.repeat_interleave(128, 1)) @ (w / wide).T


def _check_matmul(answer) -> None:
    x = _normal(5, 384, seed=0) * torch.tensor([1.0, 30.0, 0.1]).repeat_interleave(128)
    w = _normal(256, 384, seed=1) * torch.tensor([1.0, 0.01, 8.0]).repeat_interleave(128)
    w[128:] *= 50
    (x8, x_scale), (w8, w_scale) = fp8.quantise(x), fp8.quantise(w, fp8.BLOCK)
    found = answer(x8.float(), x_scale.clone(), w8.float(), w_scale.clone())
    require(getattr(found, "shape", None) == (5, 256), "5 rows and 256 outputs give shape (5, 256)")
    right = fp8.matmul(x8, x_scale, w8, w_scale)
    error = float((found - right).norm() / right.norm())
    require(error < 1e-5, f"it is off by {error:.0%}: each block of 128 columns has scales of its own")


# E5.4 ---------------------------------------------------------------------------------------------------------------


def my_index_scores(q, q_scale, k, k_scale, w) -> Tensor:
    """Index scores of one query from codes alone: -> (S,).

    q (J, W) and k (S, W) hold codes; q_scale (J,), k_scale (S,), w (J,).
    The only product of vectors is one of codes, as an FP8 unit would do it.
    """
    products = (q @ k.T).relu()  # (J, S), codes only
    return k_scale * ((w * q_scale) @ products)


def _scale_squared(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, w: Tensor) -> Tensor:
    """Applies the query's scale to the codes and to the head weight."""
    return k_scale * ((w * q_scale) @ ((q * q_scale[:, None]) @ k.T).relu())


def _one_query_scale(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, w: Tensor) -> Tensor:
    """Pulls the query's scale out of the sum over heads, as if all heads shared one."""
    return k_scale * q_scale.mean() * (w @ (q @ k.T).relu())


def _weights_before_relu(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, w: Tensor) -> Tensor:
    """Moves the head weight in front of the ReLU too: it may be negative, and then it must not."""
    return k_scale * ((w * q_scale)[:, None] * (q @ k.T)).relu().sum(0)


def _forgets_the_key(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, w: Tensor) -> Tensor:
    """Forgets the key's scale: it is the same for all heads, but not for all keys."""
    return (w * q_scale) @ (q @ k.T).relu()


def _check_index(answer) -> None:
    sizes = torch.tensor([1.0, 20.0, 0.2, 3.0])
    q, k, w = _normal(1, 1, 4, 32, seed=2) * sizes[:, None], _normal(1, 40, 32, seed=3), _normal(1, 1, 4, seed=4)
    k = k * torch.logspace(-1, 1, 40)[:, None]
    (q8, q_scale), (k8, k_scale) = fp8.quantise(q), fp8.quantise(k)
    given = q8[0, 0].float(), q_scale[0, 0, :, 0], k8[0].float(), k_scale[0, :, 0], w[0, 0]
    found = answer(*(x.clone() for x in given))
    require(getattr(found, "shape", None) == (40,), "40 keys give 40 scores: return a tensor of shape (40,)")
    right = loops.index_scores(fp8.dequantise(q8, q_scale), fp8.dequantise(k8, k_scale), w)[0, 0]
    error = float((found - right).norm() / right.norm())
    require(error < 1e-5, f"it is off by {error:.0%} from Eq. 1 with codes and scales multiplied first")


EXERCISES = (
    Exercise(
        "E5.1", "A scale that is a power of two", 1, 10,
        "An FP8 scale is stored as an exponent alone. Find the power: large enough that nothing exceeds 448, and not "
        "one larger. The checker asks you *at* the powers of two (times 448) and just beside them.",
        ("2 ** ceil(log2(amax / 448)) is the formula. Logarithms round.",
         "`math.frexp(amax)` gives amax = fraction * 2**exponent with 0.5 <= fraction < 1, exactly.",
         "448 is 0.875 * 2**9: compare the fractions, subtract the exponents."),
        my_scale, (_rounds_the_power, _cuts_the_power, _always_one_more, _logarithm_in_fp32), _check_scale,
    ),
    Exercise(
        "E5.2", "Groups of 128", 1, 10,
        "Round a vector group by group. What comes back must be equal to the package's in every bit, for any width.",
        ("`x.split(128)` gives the groups, the last one shorter if need be.",
         "The scale belongs to the largest *magnitude*: `group.abs().max()`.",
         "Divide by the scale, round, multiply by the scale; then `torch.cat`."),
        my_quantise, (_one_scale, _without_magnitude, _drops_the_rest, _without_scale), _check_quantise,
    ),
    Exercise(
        "E5.3", "A product in blocks", 2, 20,
        "This is how an FP8 matrix product works: the unit multiplies codes, and every 128 columns the partial sum is "
        "taken out, scaled and added up in fp32. Sizes here are multiples of 128.",
        ("Loop over the column blocks n; `slice(128 * n, 128 * (n + 1))` cuts both matrices.",
         "The partial product (M, O) is multiplied by x's scale of each row and by w's scale of each output.",
         "`w_scale[:, n].repeat_interleave(128)` gives every one of the O outputs its scale."),
        my_block_matmul, (_scales_at_the_end, _rows_and_columns_swapped, _forgets_the_weights, _divides), _check_matmul,
    ),
    Exercise(
        "E5.4", "Scores that never leave eight bits", 2, 15,
        "Eq. 1 from codes: multiply codes with codes, and put each scale where it may stand. Which of q_scale, k_scale "
        "and w may pass the ReLU, and why?",
        ("ReLU(a x) = a ReLU(x) for a > 0. Scales are positive; a head weight need not be.",
         "`(q @ k.T).relu()` holds codes only, shape (J, S).",
         "The query's scale belongs to a head: multiply it with w, before the sum over heads. The key's comes last."),
        my_index_scores, (_scale_squared, _one_query_scale, _weights_before_relu, _forgets_the_key), _check_index,
    ),
)  # fmt: skip
