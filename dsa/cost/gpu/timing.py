"""First whether a call is right, then how long it takes.

Right means: on fresh random inputs, into memory that was full of NaN, close to what the fp32 reference gives. The
distance is that of the whole answer in units of its own size; NaN, an unwritten number or a lost mask is without end.

Time is the device's own: two events around each call, the median of many. Calls go round several sets of inputs, so
that none finds its data in the cache on the chip. All of it is done twice, and how far the two medians lie apart is
the noise. What takes less time than Python needs to start it, as decoding does, is recorded once as a CUDA graph and
replayed, as a server would: otherwise Python would be timed.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

Call = Callable[[], object]
Timer = Callable[[Sequence[Call]], list[float]]
"""From the same call on several sets of inputs to two medians in milliseconds."""

SECONDS, FEWEST, MOST = 0.5, 7, 200  # of one round, and calls in it


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


def error(found: Tensor, expected: Tensor) -> float:
    """The distance in units of the expected answer; infinite where one is NaN, or only one is -inf."""
    seen = expected > -torch.inf
    if found.shape != expected.shape or not torch.equal(found > -torch.inf, seen) or found[seen].isnan().any():
        return float("inf")
    return float((found[seen].float() - expected[seen].float()).norm() / expected[seen].float().norm())


def missed(found: Tensor, expected: Tensor) -> float:
    """Which share of the expected positions (B, T, K) was not found; infinite for another shape or a repeated one."""
    if found.shape != expected.shape:
        return float("inf")
    rows = list(zip(found.flatten(0, 1).tolist(), expected.flatten(0, 1).tolist(), strict=True))
    if any(len(set(row)) < len(row) for row, _ in rows):
        return float("inf")
    return 1 - sum(len(set(row) & set(right)) for row, right in rows) / expected.numel()


def device_milliseconds(calls: Sequence[Call]) -> list[float]:
    """Time the calls in turn by the device's clock: two medians."""
    for call in calls:
        call()
    longest = max(_milliseconds(calls, len(calls)))
    repeats = max(FEWEST, min(MOST, round(1e3 * SECONDS / longest)))
    return [median(_milliseconds(calls, repeats)) for _ in range(2)]


def _milliseconds(calls: Sequence[Call], repeats: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for number, (before, after) in enumerate(events):
        before.record()
        calls[number % len(calls)]()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]


def replayed(calls: Sequence[Call]) -> list[Call]:
    """Record each call as a CUDA graph; what is returned replays it."""
    found: list[Call] = []
    for call in calls:
        call()  # chooses tiles and compiles, which no graph may hold
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        found.append(graph.replay)
    return found
