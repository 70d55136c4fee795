"""Which numbers this processor multiplies fast: tried out once, never guessed from its name.

Narrow numbers are four times as fast as fp32 on one processor and nine times slower on the next, and the product of
int8 matrices is a private function of torch. So each kind is multiplied once, in a few milliseconds, when it is first
wanted; it is used if the product is right and comes clearly sooner than fp32's. Else tiles are widened to fp32, which
gives the same scores.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

SIDE = 256  # of the matrices tried
CLEARLY = 1.3  # times as fast as fp32, or it is not worth the conversion
MULTIPLY = {torch.int8: "_int_mm", torch.bfloat16: "mm", torch.float32: "mm"}


def multiplier(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The function that multiplies matrices of these numbers; `out` takes its result."""
    return getattr(torch, MULTIPLY.get(dtype, "mm"))


def seconds(dtype: torch.dtype) -> float:
    """Least time of one product in seconds, on one thread; infinite where there is none, or a wrong one."""
    a = torch.arange(SIDE * SIDE).view(SIDE, SIDE) % 7 - 3
    expected, narrow = a.float() @ a.float().T, a.to(dtype)
    try:
        multiply = multiplier(dtype)
        out = multiply(narrow, narrow.t())
        if not torch.allclose(out.float(), expected, rtol=0.01):
            return float("inf")
        timer = Timer("multiply(a, a.t(), out=out)", globals={"multiply": multiply, "a": narrow, "out": out})
        return min(timer.timeit(1).median for _ in range(7))
    except (AttributeError, RuntimeError):
        return float("inf")


@cache
def fast(dtype: torch.dtype) -> bool:
    """Whether products of these numbers are right, and clearly faster than fp32's."""
    return CLEARLY * seconds(dtype) < seconds(torch.float32)
