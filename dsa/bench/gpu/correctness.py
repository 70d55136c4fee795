"""Whether a call is right, before anybody asks how long it takes.

Right means: on fresh random inputs, into memory that was full of NaN, close to what the fp32 reference gives. The
distance is that of the whole answer in units of its own size; NaN, an unwritten number or a lost mask is without end.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, new memory is full of NaN, so that a number which nobody writes cannot pass for one that was computed."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch does more than we want; to what it does more it only warns
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The distance in units of the expected answer; infinite where one is NaN, or only one is -inf."""
    seen = expected > -torch.inf
    if found.shape != expected.shape or not torch.equal(found > -torch.inf, seen) or found[seen].isnan().any():
        return float("inf")
    return float((found[seen].float() - expected[seen].float()).norm() / expected[seen].float().norm())


def missed_share(found: Tensor, expected: Tensor) -> float:
    """Which share of the expected positions (B, T, K) was not found; infinite for another shape or a repeated one."""
    if found.shape != expected.shape:
        return float("inf")
    rows = list(zip(found.flatten(0, 1).tolist(), expected.flatten(0, 1).tolist(), strict=True))
    if any(len(set(row)) < len(row) for row, _ in rows):
        return float("inf")
    return 1 - sum(len(set(row) & set(right)) for row, right in rows) / expected.numel()
