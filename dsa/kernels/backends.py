"""Who computes an operation: chosen by the tensors' device, and by what each backend says of itself.

A backend is a module with functions of the names and signatures of `loops`; it need not have all of them. One that
cannot do everything says so in `unsupported_reason(operation, *tensors)`: a sentence why it cannot compute that with
these tensors, empty if it can. `choose_backend` goes down the device's list until nobody objects. `tiled` never does:
plain differentiable torch that runs wherever torch runs, which makes it the fallback everywhere.

Modules are imported when they are first asked, so nobody needs the libraries of a device that is not there.
"""

from functools import cache
from importlib import import_module
from types import MappingProxyType, ModuleType

from torch import Tensor

BACKENDS = MappingProxyType(
    {
        "loops": "dsa.kernels.loops",
        "reference": "dsa.kernels.reference",
        "tiled": "dsa.kernels.tiled",
        "cpu": "dsa.kernels.cpu.backend",
        "meta": "dsa.kernels.shapes",
        "triton": "dsa.kernels.triton.backend",
    }
)
# by device type, the best first; then FALLBACK
PREFERRED = MappingProxyType({"cpu": ("cpu",), "meta": ("meta",), "cuda": ("triton",)})
FALLBACK = "tiled"


@cache
def _module(name: str) -> ModuleType:
    """A backend's module, looked up once: this is asked several times a layer."""
    return import_module(BACKENDS[name])


def unsupported_reason(name: str, operation: str, tensors: tuple[Tensor, ...]) -> str:
    """Why a backend cannot compute an operation with these tensors; empty if it can."""
    try:
        module = _module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dsa"):
            raise  # a mistake of ours, and not a library that is not installed
        return f"it needs {error.name}, which is not installed (pip install 'dsa[{name}]')"  # an extra has its name
    if not hasattr(module, operation):
        return f"it has no {operation}"
    return module.unsupported_reason(operation, *tensors) if hasattr(module, "unsupported_reason") else ""


def choose_backend(operation: str, tensors: tuple[Tensor, ...], forced: str | None = None) -> ModuleType:
    """The module that computes `operation` with `tensors`: the forced backend, or the best that can.

    Raises:
        ValueError: if the forced backend is unknown, or cannot: it says why, and which ones can.
    """
    if forced is None:
        ranked = (*PREFERRED.get(tensors[0].device.type, ()), FALLBACK)
        name = next(name for name in ranked if name == FALLBACK or not unsupported_reason(name, operation, tensors))
    elif forced not in BACKENDS:
        raise ValueError(f"backend={forced!r} is unknown: use one of {', '.join(BACKENDS)}, or None to let us choose")
    elif reason := unsupported_reason(forced, operation, tensors):
        capable = ", ".join(name for name in BACKENDS if not unsupported_reason(name, operation, tensors))
        raise ValueError(
            f"backend={forced!r} cannot compute {operation} here, because {reason}: use one of {capable}, or None"
        )
    else:
        name = forced
    return _module(name)
