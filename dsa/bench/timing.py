"""The one way in which anything here is timed: contenders take turns in one process, and medians count.

What disturbs one contender then disturbs all of them, and a ratio survives a busy machine that would spoil a number.

On a processor the clock is CPU time on one thread: what other programs do is not in it. On a GPU it is the device's
own: two events around each call. Calls there go round several sets of inputs, so that none finds its data in the cache
on the chip; all is done twice, and how far the two medians lie apart is the noise. What takes less time than Python
needs to start it, as decoding does, is recorded once as a CUDA graph and replayed, as a server would.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter, process_time

import torch

Call = Callable[[], object]
Timer = Callable[[Sequence[Call]], list[float]]
"""From the same call on several sets of inputs to two medians in milliseconds."""

ENOUGH = 0.05  # CPU seconds that a sample takes at least: a clock ticks, and one short call may be interrupted
SECONDS, FEWEST, MOST = 0.5, 7, 200  # of one round on a GPU, and calls in it


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: on several, CPU time would count those that only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cpu_seconds(calls: Mapping[str, Call], repeats: int) -> dict[str, float]:
    """Median CPU seconds of one run of each call, on one thread; in turn within each repeat, after one run to warm up.

    A call that is over sooner than `ENOUGH` runs several times in each sample, as often as its first run suggests.
    """
    with one_thread():
        often = {name: max(1, round(ENOUGH / _sample(call, 1))) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                samples[name].append(_sample(call, often[name]))
    return {name: median(found) for name, found in samples.items()}


def _sample(call: Call, often: int) -> float:
    """Mean CPU seconds of one run."""
    start = process_time()
    for _ in range(often):
        call()
    return max(process_time() - start, 1e-9) / often


def wall_seconds(call: Call, device: torch.device) -> float:
    """Seconds on the clock until a call is over, on the device too: for what runs once and lasts."""
    _wait(device)
    start = perf_counter()
    call()
    _wait(device)
    return perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_milliseconds(calls: Sequence[Call]) -> list[float]:
    """Time the calls in turn by the GPU's clock: two medians."""
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
