"""How much an answer multiplies, however it is written.

PyTorch's counter sees matrix products. The same work can be done by a loop of vectors or by a broadcast product and a
sum, which it takes for free, so whoever absorbs nothing could pass unseen. Here they count too: a multiplication and
an addition are 2 FLOP, in whatever they are hidden.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def _of_output(*shapes: Any, out_shape: tuple[int, ...], **_: Any) -> int:
    """FLOP of a product number by number: one for each number that comes out."""
    return prod(out_shape)


def _of_input(shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """FLOP of a sum: one for each number that goes in."""
    return prod(shape)


def _twice_input(shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """FLOP of a vector with a vector or a matrix: a multiplication and an addition for each number of the first."""
    return 2 * prod(shape)


def count_flops(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """A call's result and the floating-point operations of its products and sums."""
    aten = torch.ops.aten
    mapping = {  # what PyTorch's counter takes for free, and a loop or a broadcast could do the work with
        **dict.fromkeys((aten.mv, aten.dot, aten.vdot), _twice_input),
        **dict.fromkeys((aten.sum, aten.mean), _of_input),
        **dict.fromkeys((aten.mul, aten.mul_), _of_output),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        result = call()
    return result, counter.get_total_flops()
