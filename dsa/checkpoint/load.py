"""From a folder to a model: everything is checked before anything is allocated, and nothing is held twice.

A folder holds `config.json` and safetensors files: one `model.safetensors`, or shards with an index that says which
tensor lies where. Our modules bear the published names, so there is no table of names here. What is here is distrust:
**every** name, shape and file length is held against the config before the first number is read (`index`), so that a
broken folder is refused whole, with the file, the tensor, what was expected and what was found. Nothing is unpickled.

The model is made without memory, gets its own on the device where it shall live, and each tensor goes there straight
from its file. So the most that is needed at any time is the model and what is mapped of one file. FP8 codes either stay
(see `dsa.model.fp8_linear`) or are expanded on the way, a few rows at a time.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from dsa.checkpoint import index
from dsa.checkpoint.index import FP8, SCALE_SUFFIX, CheckpointError, TensorInfo, computes_in_fp32, read_config
from dsa.model.fp8_linear import FP8Linear, dequantize_into, to_local
from dsa.model.moe import MoE
from dsa.model.transformer import Transformer


def from_pretrained(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    keep_fp8: bool = False,
    mesh: Any = None,
) -> Transformer:
    """Load a `deepseek_v32` folder, or a dense `deepseek_v3` one.

    Args:
        folder: with config.json and safetensors, as published or as `save_pretrained` and `transformers` write it.
        dtype: of the matrices; norms, router biases, the head and the index heads' weights are at least fp32.
        device: where the weights shall live.
        keep_fp8: leave what is stored in FP8 as it is, one byte a weight, and expand it at each use. Otherwise it is
            expanded once, to `dtype`.
        mesh: a `DeviceMesh` of processes that share the model (`tensor_parallel.processes`): each keeps its own part.

    Raises:
        CheckpointError: before anything is loaded, if the folder is not whole; and for FP8 scales that are no positive
            numbers. A multi-token-prediction layer (index `num_hidden_layers`) is passed over: see
            `dsa.checkpoint.mtp.load_mtp`.
    """
    folder = Path(folder)
    config = read_config(folder)
    mtp = index.mtp_prefix(config)
    stored = {name: info for name, info in index.list_tensors(folder).items() if not name.startswith(mtp)}
    with torch.device("meta"):  # names and shapes, no memory
        model = Transformer(config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        index.check_tensors(stored, expected, folder)
        if keep_fp8:
            use_fp8_linears(model, stored)
    set_dtype(model, dtype)
    if mesh is not None:
        from dsa.distributed import tensor_parallel  # here, as the import alone takes a second

        tensor_parallel.split(model, mesh)
    model.to_empty(device=device)
    for gate in model.gates():
        gate.load.zero_()  # a count that no folder holds
    load_tensors(model.state_dict(), stored, f"loading {folder.name}")
    if torch.device(device).type == "cuda":
        for module in model.modules():
            if isinstance(module, MoE):
                module.pack()  # for grouped products, which wait for the device nowhere
    return model.eval()


def set_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast matrices to `dtype`; norms, router biases and heads to fp32 at least. FP8 stays FP8."""
    wide = torch.promote_types(dtype, torch.float32)
    for module_name, part in module.named_modules():
        if isinstance(part, FP8Linear):
            continue
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.to(wide if computes_in_fp32(f"{module_name}.{name}") else dtype)


def use_fp8_linears(module: nn.Module, stored: Mapping[str, TensorInfo]) -> None:
    """Put an FP8 layer in place of every linear layer whose weight is stored in FP8; names are those of `module`."""
    for path, part in list(module.named_modules()):
        info = stored.get(f"{path}.weight")
        if isinstance(part, nn.Linear) and info is not None and info.dtype == FP8:
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, FP8Linear(part.in_features, part.out_features))


def load_tensors(target: Mapping[str, Tensor], stored: Mapping[str, TensorInfo], title: str) -> None:
    """Copy every tensor of `target` from its file, one file after the other.

    Where the target keeps no FP8, codes are expanded; their scales may come from another file.
    """
    wanted = {name: info for name, info in stored.items() if name in target}
    shards: dict[Path, list[str]] = {}
    for name, info in wanted.items():
        shards.setdefault(info.path, []).append(name)
    size = sum(info.nbytes for info in wanted.values())
    silent = len(shards) == 1 or os.environ.get("RANK", "0") != "0"  # of several processes the first shows the bar
    with tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=silent) as bar:
        for path, names in shards.items():
            _load_file(path, names, target, stored, bar)


def _load_file(
    path: Path, names: Iterable[str], target: Mapping[str, Tensor], stored: Mapping[str, TensorInfo], bar: tqdm
) -> None:
    """Copy what lies in one file."""
    device = next(iter(target.values())).device
    device = device if device.type == "cuda" else torch.device("cpu")  # others cannot be read to directly
    with safe_open(path, framework="pt", device=str(device)) as file:
        for name in names:
            tensor = file.get_tensor(name)
            if name.endswith(SCALE_SUFFIX):
                _check_scale(tensor, name, path)
            if stored[name].dtype == FP8 and name + SCALE_SUFFIX not in target:
                _load_dequantized(target[name], tensor, _read_scale(name, stored, device))
            else:
                _copy(target[name], tensor)
            bar.update(stored[name].nbytes)


def _load_dequantized(target: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Dequantize to where the numbers belong: straight there, unless this process keeps a part only."""
    if to_local(target) is target:
        dequantize_into(target, codes, scale)
    else:
        _copy(target, dequantize_into(torch.empty_like(codes, dtype=target.dtype), codes, scale))


def _copy(target: Tensor, whole: Tensor) -> None:
    """Copy a tensor to its place; of a model that is split over processes, the part that belongs here."""
    if to_local(target) is not target:
        from dsa.distributed import tensor_parallel

        whole = tensor_parallel.local_part(whole, target)  # type: ignore[arg-type]  # a DTensor, then
    to_local(target).copy_(whole)


def _read_scale(name: str, stored: Mapping[str, TensorInfo], device: torch.device) -> Tensor:
    """Read a weight's block scales, which may lie in another file than the weight."""
    path = stored[name + SCALE_SUFFIX].path
    with safe_open(path, framework="pt", device=str(device)) as file:
        scale = file.get_tensor(name + SCALE_SUFFIX)
    _check_scale(scale, name + SCALE_SUFFIX, path)
    return scale


def _check_scale(scale: Tensor, name: str, path: Path) -> None:
    """One bad scale would spoil 16,384 weights without a word."""
    if broken := int((~(scale.isfinite() & (scale > 0))).sum()):
        raise CheckpointError(
            f"{path}: {broken} of {scale.numel()} scales in {name} are zero, negative, infinite or NaN, "
            "expected numbers above 0: the file is damaged, fetch it again"
        )
