"""One model on several processes: attention heads, feed-forward columns and experts are dealt out.

    torchrun --nproc-per-node 8 -m dsa generate FOLDER --prompt "..."

Every process ("rank") sees all tokens and holds a part of the weights. Of each layer it computes its own heads and its
own experts, and what the ranks have found is summed: two sums a layer, after attention and after the feed-forward half.
Which part goes where is a table (`plan`) in the vocabulary of `torch.distributed.tensor.parallel`; splitting, sums and
gathering are that library's, none of them ours.

What is *not* split matters as much. The latent that MLA caches serves all heads, so each rank keeps the whole cache:
ranks make room for weights, not for context. And the indexer is whole on every rank, as published: all of them work out
the same scores from the same numbers, choose the same tokens without a word to each other, and attend to them with
different heads. A router likewise.

A rank reads and holds its own part only. Each sum is one number added in another order than on one process, so results
agree within rounding and not to the bit. This is for inference: the indexer's loss wants all heads in one place, and
training on several processes is `fsdp`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from dsa.kernels import fp8
from dsa.model.config import Config
from dsa.model.fp8_linear import FP8Linear, to_local
from dsa.model.moe import FeedForward, MoE
from dsa.model.transformer import Layer, Transformer


@contextmanager
def processes(device: torch.device | str | None = None) -> Iterator[DeviceMesh | None]:
    """Join the processes that `torchrun` has started, and part from them at the end.

    Args:
        device: "cuda" (each rank takes the GPU of its LOCAL_RANK) or "cpu"; by default whichever is there.

    Yields:
        the mesh of all ranks, for `from_pretrained` and `split`; None if there is one process only.
    """
    device_type = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield init_device_mesh(device_type, (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()


def plan(layer: Layer) -> dict[str, ParallelStyle]:
    """Say how one layer is split: module name -> style.

    "Colwise" gives each rank some of a matrix' outputs (whole heads), "Rowwise" the inputs that come from these, and
    sums. The shared expert is split like a dense feed-forward layer, but its sum waits for the routed experts'.
    """
    attention, mlp = layer.self_attn, layer.mlp
    query = "q_b_proj" if hasattr(attention, "q_b_proj") else "q_proj"
    styles = {
        f"self_attn.{query}": _colwise(attention.get_submodule(query)),
        "self_attn.kv_b_proj": _colwise(attention.kv_b_proj),
        "self_attn.o_proj": _rowwise(attention.o_proj),
        "self_attn.all_heads": _all_reduce(Partial("avg")),
    }
    if isinstance(mlp, FeedForward):
        return styles | _feed_forward("mlp", mlp, Replicate())
    if hasattr(mlp, "shared_experts"):
        styles |= _feed_forward("mlp.shared_experts", mlp.shared_experts, Partial())
    return styles | {"mlp.all_experts": _all_reduce(Partial())}


def _feed_forward(name: str, mlp: FeedForward, output: Placement) -> dict[str, ParallelStyle]:
    into = {f"{name}.{part}": _colwise(mlp.get_submodule(part)) for part in ("gate_proj", "up_proj")}
    return into | {f"{name}.down_proj": _rowwise(mlp.down_proj, output)}


def _all_reduce(parts: Partial) -> ParallelStyle:
    return PrepareModuleInput(input_layouts=parts, desired_input_layouts=Replicate(), use_local_output=True)


def _colwise(linear: nn.Module) -> ParallelStyle:
    return FP8Colwise() if isinstance(linear, FP8Linear) else ColwiseParallel()


def _rowwise(linear: nn.Module, output: Placement = Replicate()) -> ParallelStyle:  # noqa: B008 - a constant
    return FP8Rowwise(output) if isinstance(linear, FP8Linear) else RowwiseParallel(output_layouts=output)


class FP8Colwise(ParallelStyle):
    """Colwise for a matrix that stays in FP8: codes and scales are cut, between blocks."""

    dimension = 0

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, FP8Linear)
        ranks, block = device_mesh.size(), fp8.BLOCK[self.dimension]
        if module.weight.shape[self.dimension] % (ranks * block):
            raise ValueError(
                f"an FP8 matrix of shape {tuple(module.weight.shape)} cannot be cut by {ranks} processes between its "
                f"blocks of {block}: start fewer processes, or load it expanded (keep_fp8=False)"
            )
        for name, tensor in list(module.named_buffers()):
            part = distribute_tensor(tensor, device_mesh, [Shard(self.dimension)], src_data_rank=None)
            module.register_buffer(name, part)
        return module


class FP8Rowwise(FP8Colwise):
    """Rowwise for a matrix that stays in FP8; what the ranks give is summed, or left to be if `output` is Partial."""

    dimension = 1

    def __init__(self, output: Placement):
        super().__init__()
        self.sum = PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=output, use_local_output=True)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return parallelize_module(super()._apply(module, device_mesh), device_mesh, self.sum)


def local_experts(config: Config, mesh: DeviceMesh) -> range:
    """Which experts this rank holds: a run of about E / ranks of them."""
    E, rank, ranks = config.n_routed_experts, mesh.get_local_rank(), mesh.size()
    return range(rank * E // ranks, (rank + 1) * E // ranks)


def split(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Leave of a model this rank's part, in place; on the meta device that costs nothing, and loading fills it.

    Raises:
        ValueError: if heads or feed-forward widths cannot be shared evenly, or the model is split already.
    """
    if to_local(model.lm_head.weight) is not model.lm_head.weight:
        raise ValueError("this model is split already: load it anew to split it otherwise")
    check_divisible(model.config, mesh.size())
    for layer in [module for module in model.modules() if isinstance(module, Layer)]:
        if isinstance(layer.mlp, MoE):
            for elsewhere in set(range(model.config.n_routed_experts)) - set(local_experts(model.config, mesh)):
                layer.mlp.experts[elsewhere] = None  # type: ignore[assignment]
        _parallelize(layer, mesh, plan(layer))
        layer.self_attn.heads //= mesh.size()
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    _parallelize(model, mesh, ends)
    model.register_forward_pre_hook(_refuse_indexer_loss, with_kwargs=True)
    return model


def _parallelize(module: nn.Module, mesh: DeviceMesh, styles: dict[str, Any]) -> None:
    parallelize_module(module, mesh, styles, src_data_rank=None)  # each rank cuts its own copy: nothing is sent


def check_divisible(config: Config, ranks: int) -> None:
    """Refuse, by ValueError, ranks that do not divide what is split; experts and vocabulary may be dealt unevenly."""
    sizes = {"num_attention_heads": config.num_attention_heads}
    if config.first_k_dense_replace:
        sizes["intermediate_size"] = config.intermediate_size
    if config.first_k_dense_replace < config.num_hidden_layers:
        sizes["n_shared_experts * moe_intermediate_size"] = config.n_shared_experts * config.moe_intermediate_size
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(f"{name}={size} cannot be shared evenly by {ranks} processes: start a divisor of it")


def _refuse_indexer_loss(model: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
    if options.get("indexer_loss"):
        raise ValueError("a split model has only some heads on each rank, the indexer's loss needs all: train unsplit")


def local_part(whole: Tensor, like: DTensor) -> Tensor:
    """Cut of a whole tensor what this rank holds, as `like` is cut."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
