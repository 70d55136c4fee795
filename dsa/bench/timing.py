"""The one way in which anything here is timed: candidates take turns in one process, and medians count.

What disturbs one candidate then disturbs all of them, and a ratio survives a busy machine that would spoil a number.

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

MIN_SAMPLE_SECONDS = 0.05  # of CPU time: a clock ticks, and one short call may be interrupted
ROUND_SECONDS, MIN_CALLS, MAX_CALLS = 0.5, 7, 200  # of one round on a GPU, and calls in it


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

    A call that is over sooner than `MIN_SAMPLE_SECONDS` runs several times in each sample, as often as its first run
    suggests.
    """
    with one_thread():
        runs = {name: max(1, round(MIN_SAMPLE_SECONDS / _sample(call, 1))) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                samples[name].append(_sample(call, runs[name]))
    return {name: median(found) for name, found in samples.items()}


def _sample(call: Call, runs: int) -> float:
    """Mean CPU seconds of one run."""
    start = process_time()
    for _ in range(runs):
        call()
    return max(process_time() - start, 1e-9) / runs


def wall_seconds(call: Call, device: torch.device) -> float:
    """Seconds on the clock until a call is over, on the device too: for what runs once and lasts."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronize()  # what was started before does not count
    start = perf_counter()
    call()
    synchronize()  # a call returns when its kernels are started, not when they are done
    return perf_counter() - start


def device_milliseconds(calls: Sequence[Call]) -> list[float]:
    """Time the calls in turn by the GPU's clock: two medians."""
    for call in calls:
        call()
    longest = max(_milliseconds(calls, len(calls)))
    repeats = max(MIN_CALLS, min(MAX_CALLS, round(1e3 * ROUND_SECONDS / longest)))
    return [median(_milliseconds(calls, repeats)) for _ in range(2)]


def _milliseconds(calls: Sequence[Call], repeats: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for number, (before, after) in enumerate(events):
        before.record()
        calls[number % len(calls)]()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]


def cuda_graphs(calls: Sequence[Call]) -> list[Call]:
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
