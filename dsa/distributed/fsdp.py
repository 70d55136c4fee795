"""The same training on several processes: each has a part of the weights and of every batch.

    torchrun --nproc-per-node 2 -m dsa train pretrain --optimizer adamw --out runs/base

FSDP2 (``fully_shard``) keeps of every weight, gradient and optimiser state only a rank's shard, gathers a layer's
weights when the layer is computed, and averages gradients over ranks. What is left to do is to make the average the
gradient of the *global* batch, so that the number of processes is no hyperparameter:

- every rank draws the whole batch from the step's generator and takes its own rows of it (:func:`local_batch`);
- a mean over tokens that count is weighted by how many of them a rank has (:func:`token_weight`);
- the routers' load is summed before their biases move (:func:`all_reduce_sum`);
- an expert without tokens on one rank has a gradient of zero there, not none, or the ranks would exchange different
  things. (One without tokens on any rank is then still moved by AdamW's momentum; on one process it stays.)

Buffers stay whole on every rank. Without ``torchrun`` all of these do nothing. The processes talk through gloo and
compute on the processor, as all training here does.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dsa.datasets.recall_tasks import Episodes
from dsa.model.moe import MoE
from dsa.model.transformer import Transformer


@contextmanager
def processes() -> Iterator[None]:
    """Join the other processes if ``torchrun`` has started this one, and part from them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def launch_command(command: str) -> str:
    """A command, `dsa ...` or `python -m ...`, as it has to be typed to have as many processes."""
    if world_size() == 1:
        return command
    return f"torchrun --nproc-per-node {world_size()} -m {command.removeprefix('python -m ')}"


def barrier() -> None:
    """Go on when all processes have come here."""
    if world_size() > 1:
        dist.barrier()


def shard(model: Transformer) -> Transformer:
    """Leave of every weight a rank's shard, in place: layer by layer, then what is outside of the layers."""
    if world_size() == 1:
        return model
    for module in model.modules():
        if isinstance(module, MoE):
            module.run_idle_experts = True  # every rank must reduce the same gradients: see above
    mesh = init_device_mesh("cpu", (world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def gather(model: Transformer) -> Transformer:
    """The whole model anew from its parts, on every rank."""
    if world_size() == 1:
        return model
    full = Transformer(model.config).to(model.dtype)
    full.load_state_dict({name: full_tensor(tensor) for name, tensor in model.state_dict().items()})
    full.attention, full.top_k = model.attention, model.top_k
    return full.train(model.training)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor from its parts; every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A rank's shard of a whole tensor, cut as ``model`` is cut."""
    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    return distribute_tensor(tensor, model.device_mesh, model.placements)


def local_batch(episodes: Episodes) -> Episodes:
    """A rank's rows of a batch that all ranks have drawn. ValueError if they cannot be dealt out evenly."""
    size, n = len(episodes.tokens), world_size()
    if size % n:
        raise ValueError(f"a batch of {size} sequences cannot be shared evenly by {n} processes: start a divisor of it")
    rows = slice(rank() * size // n, (rank() + 1) * size // n)
    return Episodes(*(getattr(episodes, field.name)[rows] for field in fields(Episodes)))


def token_weight(count: int) -> float:
    """Factor of a rank's mean over ``count`` tokens, so that the ranks' average is the mean over all tokens."""
    return 1.0 if world_size() == 1 else count / all_reduce_mean({"count": count})["count"]


def all_reduce_mean(measures: Mapping[str, float]) -> dict[str, float]:
    """Measures averaged over the ranks, which all have the same names."""
    if world_size() == 1:
        return dict(measures)
    values = torch.tensor(list(measures.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(measures, (values / world_size()).tolist(), strict=True))


def all_reduce_sum(tensor: Tensor) -> None:
    """Sum a buffer over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def require_elementwise(optimizer: str) -> None:
    """Refuse an optimiser that needs whole matrices where each rank has a part of them."""
    if world_size() > 1 and optimizer != "adamw":
        n = world_size()
        raise ValueError(f"optimizer {optimizer!r} needs whole matrices, {n} processes have parts: use adamw")
