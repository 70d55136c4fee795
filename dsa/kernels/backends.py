"""Who computes an operation: chosen by the tensors' device, and by what each backend says of itself.

A backend is a module with functions of the names and signatures of `loops`; it need not have all of them. One that
cannot do everything says so in `refuses(operation, *tensors)`: a sentence why it cannot compute that with these
tensors, empty if it can. `choose` goes down the device's list until nobody objects. `tiled` never does: plain
differentiable torch that runs wherever torch runs, which makes it the last resort everywhere.

Modules are imported when they are first asked, so nobody needs the libraries of a device that is not there.
"""

from functools import cache
from importlib import import_module
from types import MappingProxyType, ModuleType

from torch import Tensor

MODULES = MappingProxyType(
    {
        "loops": "dsa.kernels.loops",
        "reference": "dsa.kernels.reference",
        "tiled": "dsa.kernels.tiled",
        "cpu": "dsa.kernels.cpu.backend",
        "meta": "dsa.kernels.shapes",
        "triton": "dsa.kernels.triton.backend",
    }
)
# by device type, the best first; then LAST_RESORT
PREFERRED = MappingProxyType({"cpu": ("cpu",), "meta": ("meta",), "cuda": ("triton",)})
LAST_RESORT = "tiled"


@cache
def _module(name: str) -> ModuleType:
    """A backend's module, looked up once: this is asked several times a layer."""
    return import_module(MODULES[name])


def refusal(name: str, operation: str, tensors: tuple[Tensor, ...]) -> str:
    """Why a backend cannot compute an operation with these tensors; empty if it can."""
    try:
        module = _module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dsa"):
            raise  # a mistake of ours, and not a library that is not installed
        return f"it needs {error.name}, which is not installed"
    if not hasattr(module, operation):
        return f"it has no {operation}"
    return module.refuses(operation, *tensors) if hasattr(module, "refuses") else ""


def choose(operation: str, tensors: tuple[Tensor, ...], forced: str | None = None) -> ModuleType:
    """The module that computes `operation` with `tensors`: the forced backend, or the best that can.

    Raises:
        ValueError: if the forced backend is unknown, or cannot: it says why, and which ones can.
    """
    if forced is None:
        ranked = (*PREFERRED.get(tensors[0].device.type, ()), LAST_RESORT)
        name = next(name for name in ranked if name == LAST_RESORT or not refusal(name, operation, tensors))
    elif forced not in MODULES:
        raise ValueError(f"backend={forced!r} is unknown: use one of {', '.join(MODULES)}, or None to let us choose")
    elif why := refusal(forced, operation, tensors):
        able = ", ".join(name for name in MODULES if not refusal(name, operation, tensors))
        raise ValueError(
            f"backend={forced!r} cannot compute {operation} here, because {why}: use one of {able}, or None"
        )
    else:
        name = forced
    return _module(name)
