"""In which dtypes this processor multiplies matrices fast: measured once, never guessed from its name.

Narrow dtypes are four times as fast as fp32 on one processor and nine times slower on the next, and the product of
int8 matrices is a private function of torch. So each dtype is tried once, in a few milliseconds, when it is first
wanted; it is used if the product is right and comes clearly sooner than fp32's. Else tiles are widened to fp32, which
gives the same scores.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

SIDE = 256  # of the matrices tried
SPEEDUP = 1.3  # times as fast as fp32, or it is not worth the conversion
MATMUL = {torch.int8: "_int_mm", torch.bfloat16: "mm", torch.float32: "mm"}


def matmul_for(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The function that multiplies matrices of this dtype; `out` takes its result."""
    return getattr(torch, MATMUL.get(dtype, "mm"))


def matmul_seconds(dtype: torch.dtype) -> float:
    """Least time of one product in seconds, on one thread; infinite where there is none, or a wrong one."""
    a = torch.arange(SIDE * SIDE).view(SIDE, SIDE) % 7 - 3
    expected, narrow = a.float() @ a.float().T, a.to(dtype)
    try:
        matmul = matmul_for(dtype)
        out = matmul(narrow, narrow.t())
        if not torch.allclose(out.float(), expected, rtol=0.01):
            return float("inf")
        timer = Timer("matmul(a, a.t(), out=out)", globals={"matmul": matmul, "a": narrow, "out": out})
        return min(timer.timeit(1).median for _ in range(7))
    except (AttributeError, RuntimeError):
        return float("inf")


@cache
def is_fast(dtype: torch.dtype) -> bool:
    """Whether products in this dtype are right, and clearly faster than fp32's."""
    return SPEEDUP * matmul_seconds(dtype) < matmul_seconds(torch.float32)
