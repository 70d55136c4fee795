"""The two exercises of chapter 06 that need no model: hours of a training, and an honest difference.

What their wrong answers get wrong is a factor, or an interval that claims to know more than it does.
"""

import math
from statistics import mean, pstdev, stdev

from course.exercises.exercise import require


def my_gpu_hours(tokens: float, forward: float, peak: float, used: float):
    """Hours of one GPU for a training.

    forward: FLOP per token of the forward pass; the backward pass takes
    twice that. peak: FLOP per second; used: the share of it in use.
    """
    flop = 3 * forward * tokens
    return flop / (peak * used) / 3600


def _forward_only(tokens, forward, peak, used):
    """Forgets the backward pass."""
    return forward * tokens / (peak * used) / 3600


def _six(tokens, forward, peak, used):
    """Takes the 6 of "6 N D", which counts from weights, with FLOP of a forward pass: twice too much."""
    return 6 * forward * tokens / (peak * used) / 3600


def _full_speed(tokens, forward, peak, used):
    """Multiplies by the share instead of dividing."""
    return 3 * forward * tokens * used / peak / 3600


def _seconds(tokens, forward, peak, used):
    """Gives seconds."""
    return 3 * forward * tokens / (peak * used)


WRONG_HOURS = (_forward_only, _six, _full_speed, _seconds)


def check_hours(answer) -> None:
    """Compare with three trainings."""
    for tokens, forward, peak, used in ((1e9, 7.4e10, 9.9e14, 0.4), (943.7e9, 1e11, 9.9e14, 1.0), (2.0, 3.0, 5.0, 0.5)):
        right = 3 * forward * tokens / (peak * used) / 3600
        found = float(answer(tokens, forward, peak, used))
        reason = f"{tokens:g} tokens, {forward:g} FLOP forward, {peak:g} a second, {used:.0%} used"
        require(math.isclose(found, right, rel_tol=1e-6), f"{reason}: {right:.4g} hours; yours are {found:.4g}")


def my_interval(dense: list[float], sparse: list[float], t: float):
    """Sparse minus dense -> (mean difference, half width of its 95 %).

    One result a seed, the same seeds in the same order. t is Student's
    factor for that many seeds, 4.30 for three.
    """
    gaps = [b - a for a, b in zip(dense, sparse, strict=True)]
    return mean(gaps), t * stdev(gaps) / len(gaps) ** 0.5


def _unpaired(dense, sparse, t):
    """Treats the seeds as strangers: what they have in common stays in the interval."""
    spread = (stdev(dense) ** 2 / len(dense) + stdev(sparse) ** 2 / len(sparse)) ** 0.5
    return mean(sparse) - mean(dense), t * spread


def _one_seed(dense, sparse, t):
    """Gives the spread of one seed, not of the mean: forgets the root of n."""
    gaps = [b - a for a, b in zip(dense, sparse, strict=True)]
    return mean(gaps), t * stdev(gaps)


def _population(dense, sparse, t):
    """Divides by n instead of n - 1, too narrow for three seeds."""
    gaps = [b - a for a, b in zip(dense, sparse, strict=True)]
    return mean(gaps), t * pstdev(gaps) / len(gaps) ** 0.5


def _normal(dense, sparse, t):
    """Takes 1.96, as if there were hundreds of seeds."""
    gaps = [b - a for a, b in zip(dense, sparse, strict=True)]
    return mean(gaps), 1.96 * stdev(gaps) / len(gaps) ** 0.5


WRONG_INTERVALS = (_unpaired, _one_seed, _population, _normal)


def check_interval(answer) -> None:
    """Compare with three seeds and with five."""
    for dense, sparse, t in (
        ([0.50, 0.60, 0.70], [0.51, 0.62, 0.69], 4.30),
        ([1.0, 1.2, 1.1, 0.9, 1.4], [0.9, 1.3, 1.0, 0.8, 1.5], 2.78),
    ):
        middle, half = answer(list(dense), list(sparse), t)
        gaps = [b - a for a, b in zip(dense, sparse, strict=True)]
        require(
            math.isclose(middle, mean(gaps), abs_tol=1e-6),
            f"the mean difference is {mean(gaps):.4f}, yours {middle:.4f}",
        )
        right = t * stdev(gaps) / len(gaps) ** 0.5
        require(
            math.isclose(half, right, rel_tol=1e-4),
            f"with {len(gaps)} seeds the half width is {right:.4f}, yours is {half:.4f}: "
            f"{'wider' if half > right else 'narrower'} than the differences allow",
        )
