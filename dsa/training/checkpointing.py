"""What a stopped training needs to go on as if nothing had happened: one file, written whole or not at all.

Weights, buffers and optimiser state lie as tensors in one safetensors file; where the run stands and what it measured
lie as JSON in the same file's header. One file means one rename, and a rename is atomic: whoever is killed at any
moment leaves the last complete state behind. The usual ``torch.save`` would be a pickle, which runs code when it is
opened, and two files would be able to disagree.

The data needs no saving: each step's batch follows from (seed, phase, step) alone.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dsa.distributed import fsdp

FILE = "state.safetensors"


def save(folder: Path, model: nn.Module, optimizers: list[Optimizer], progress: dict[str, Any]) -> None:
    """Write ``folder/state.safetensors`` in place of the one before, atomically.

    ``progress`` is anything JSON can hold; it comes back from :func:`load` as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in _state_tensors(optimizer).items()}
    copies = {name: fsdp.full_tensor(tensor.detach()).clone().contiguous() for name, tensor in tensors.items()}
    if fsdp.rank() > 0:
        return
    unfinished = folder / (FILE + ".new")
    save_file(copies, unfinished, metadata={"progress": json.dumps(progress)})
    with unfinished.open("r+b") as file:
        os.fsync(file.fileno())
    unfinished.replace(folder / FILE)


def _state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as ``parameter.name`` -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{parameter}.{name}": torch.as_tensor(value)
        for parameter, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def exists(folder: Path) -> bool:
    """Whether a training was stopped in ``folder``."""
    return (folder / FILE).is_file()


def load(folder: Path, model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Put model and optimisers back as they were saved and return the progress.

    Raises ValueError for a file that is damaged or belongs to another model.
    """
    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known = model.state_dict()
        saved = {key: fsdp.shard_like(tensor, known[key]) for key, tensor in _with_prefix("model.", tensors).items()}
        model.load_state_dict(saved)
        for number, optimizer in enumerate(optimizers):
            _load_optimizer(optimizer, _with_prefix(f"optimizer.{number}.", tensors))
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be resumed ({error}); remove its folder and start over") from error
    return progress


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin so, under what follows."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, tensor in tensors.items():
        parameter, name = key.split(".", 1)
        state.setdefault(int(parameter), {})[name] = fsdp.shard_like(tensor, parameters[int(parameter)])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
