"""How a Triton kernel is started here, and how it is tested where there is no GPU.

A kernel is a Python function of which a GPU runs thousands of copies ("programs"), each with its own number. It is
written for tiles: whole blocks of numbers that are loaded, multiplied and stored at once; which thread does what is
the compiler's affair. How large the tiles are is ours: a `Kernel` carries a short list of configurations, and on a GPU
the first call with new shapes times them and keeps the fastest.

The functions that prepare a call (allocate the answer, count the programs) do not launch anything themselves. They hand
everything to `launch`, or to whatever was given in its place. Three things follow from that one parameter:

* on a GPU, `launch` starts the kernel;
* on tensors without numbers (device "meta") it does nothing, and the shapes come out right;
* `Recorder` keeps the call instead, and `compile` makes machine code of exactly what would have been launched.

With TRITON_INTERPRET=1 in the environment *before triton is imported*, a kernel runs on CPU tensors, step by step in
NumPy. Two things are then wrong without a word in the versions we know (3.6 to 3.9): products of bf16, and
rounding fp32 to FP8. So the backend refuses bf16 there, and rounding is done before, by `fp8`.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

INT32 = 2**31  # a kernel counts the numbers of one sequence in 32 bits


def interpreted() -> bool:
    """Whether kernels run step by step on the CPU: TRITON_INTERPRET=1 was set before triton was imported."""
    return bool(triton.knobs.runtime.interpret)


class Kernel:
    """A Triton function and the tile sizes to choose from.

    Args:
        function: what `triton.jit` made.
        configs: the choices, the likely best first, the smallest (for fp32, which takes twice the room, and for the
            interpreter) last.
        key: arguments by whose values the choice is remembered. Lengths are not among them but their buckets (see
            `length_bucket`): a text grows with every token, and tuning again takes seconds.
        reset_to_zero: arguments that a call adds to, and that must be zero before each trial.
    """

    def __init__(
        self, function: Any, configs: Sequence[triton.Config], key: Sequence[str], reset_to_zero: Sequence[str] = ()
    ):
        self.function, self.configs, self.key = function, tuple(configs), tuple(key)

        def prune(choices: list[triton.Config], named: dict[str, Any], **more: Any) -> list[triton.Config]:
            return viable_configs(choices, {**named, **more}, torch.version.hip is not None)

        self.autotuned = triton.autotune(
            list(self.configs[-1:] if interpreted() else self.configs), list(key),
            reset_to_zero=list(reset_to_zero), prune_configs_by={"early_config_prune": prune},
        )(function)  # fmt: skip

    @property
    def name(self) -> str:
        """What the function is called."""
        return self.function.__name__

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds of each configuration when it was last tuned; infinite for what does not fit."""
        milliseconds = {}
        for config, timed in (getattr(self.autotuned, "configs_timings", None) or {}).items():
            sizes = [f"{name} {size}" for name, size in config.kwargs.items()]
            name = ", ".join([*sizes, f"{config.num_warps} warps", f"{config.num_stages} stages"])
            milliseconds[name] = timed[0] if isinstance(timed, list | tuple) else timed  # the median comes first
        return milliseconds


def viable_configs(configs: Sequence[triton.Config], arguments: dict[str, Any], rocm: bool) -> list[triton.Config]:
    """The tile sizes worth trying: only the smallest where numbers are wide (fp32) or registers few (ROCm, untuned)."""
    factors = [value for name, value in arguments.items() if name in ("q_ptr", "kv_ptr")]
    wide = any(isinstance(x, Tensor) and x.dtype == torch.float32 for x in factors)
    return list(configs[-1:] if wide or rocm else configs)


Grid = Callable[[dict[str, Any]], tuple[int, ...]]
"""From the chosen tile sizes to the number of programs along up to three axes."""


class Launcher(Protocol):
    """What `launch` and a `Recorder` have in common: they take a kernel, its grid and all arguments by name."""

    def __call__(self, kernel: Kernel, grid: Grid, **arguments: Any) -> None:
        """Launch the kernel, or do with the call what one likes."""


def launch(kernel: Kernel, grid: Grid, **arguments: Any) -> None:
    """Launch a kernel on the device of its tensors; on "meta" there is nothing to do."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "meta":
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel.autotuned[grid](**arguments)


@dataclass
class Recorder:
    """Takes the place of `launch` and keeps the calls."""

    calls: list[tuple[Kernel, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, kernel: Kernel, grid: Grid, **arguments: Any) -> None:
        """Keep one call."""
        self.calls.append((kernel, arguments))


def padded_width(width: int) -> int:
    """The next power of two, at least 16: the widths of tiles that tensor cores multiply."""
    return max(16, triton.next_power_of_2(width))


def length_bucket(n: int) -> int:
    """The next power of two: lengths of one bucket use the same tiles."""
    return triton.next_power_of_2(n)


def check_int32_offsets(name: str, x: Tensor) -> None:
    """Refuse a tensor (B, S, ...) with a sequence too long to be counted in 32 bits."""
    if x.shape[1] * x.stride(1) >= INT32:
        raise ValueError(
            f"one sequence of {name} spans {x.shape[1] * x.stride(1):,} numbers and a kernel counts to {INT32:,}: "
            "give fewer tokens at once"
        )
