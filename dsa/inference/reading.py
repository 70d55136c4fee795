"""From files into a model's memory, shard by shard.

The model is made without memory, gets its own on the device where it shall live, and each tensor goes there straight
from its file. So the most that is needed at any time is the model and what is mapped of one file. FP8 codes either stay
(see `dsa.model.fp8_linear`) or are expanded on the way, a few rows at a time.
"""

import os
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from dsa.inference.layout import CODES, SCALE, CheckpointError, Stored
from dsa.model.fp8_linear import FP8Linear, expand_into, here


def stays_fp32(name: str) -> bool:
    """Norms and router biases, which no model keeps in half precision."""
    return "norm" in name or "e_score_correction_bias" in name


def set_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast matrices to `dtype`; norms and router biases to fp32 at least. FP8 stays FP8."""
    wide = torch.promote_types(dtype, torch.float32)
    for module_name, part in module.named_modules():
        if isinstance(part, FP8Linear):
            continue
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.to(wide if stays_fp32(f"{module_name}.{name}") else dtype)


def keep_codes(module: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Put an FP8 layer in place of every linear layer whose weight is stored in FP8; names are those of `module`."""
    for path, part in list(module.named_modules()):
        tensor = stored.get(f"{path}.weight")
        if isinstance(part, nn.Linear) and tensor is not None and tensor.kind == CODES:
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, FP8Linear(part.in_features, part.out_features))


def fill(target: Mapping[str, Tensor], stored: Mapping[str, Stored], title: str) -> None:
    """Copy every tensor of `target` from its file, one file after the other.

    Where the target keeps no FP8, codes are expanded; their scales may come from another file.
    """
    wanted = {name: tensor for name, tensor in stored.items() if name in target}
    shards: dict[Path, list[str]] = {}
    for name, tensor in wanted.items():
        shards.setdefault(tensor.path, []).append(name)
    size = sum(tensor.nbytes for tensor in wanted.values())
    silent = len(shards) == 1 or os.environ.get("RANK", "0") != "0"  # of several processes the first shows the bar
    with tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=silent) as bar:
        for path, names in shards.items():
            _fill_from(path, names, target, stored, bar)


def _fill_from(
    path: Path, names: Iterable[str], target: Mapping[str, Tensor], stored: Mapping[str, Stored], bar: tqdm
) -> None:
    """Copy what lies in one file."""
    with safe_open(path, framework="pt", device=_nearest(target)) as file:
        for name in names:
            tensor = file.get_tensor(name)
            if name.endswith(SCALE):
                _check_scale(tensor, name, path)
            if stored[name].kind == CODES and name + SCALE not in target:
                _expand(target[name], tensor, _scale(name, stored, tensor.device))
            else:
                _put(target[name], tensor)
            bar.update(stored[name].nbytes)


def _expand(target: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Expand codes to where they belong: straight there, unless this process keeps a part only."""
    if here(target) is target:
        expand_into(target, codes, scale)
    else:
        _put(target, expand_into(torch.empty_like(codes, dtype=target.dtype), codes, scale))


def _put(target: Tensor, whole: Tensor) -> None:
    """Copy a tensor to its place; of a model that is split over processes, the part that belongs here."""
    if here(target) is not target:
        whole = import_module("dsa.inference.parallel").own_part(whole, target)
    here(target).copy_(whole)


def _nearest(target: Mapping[str, Tensor]) -> str:
    """Where a file's tensors are read to: the target's own device where the library can, otherwise main memory."""
    device = next(iter(target.values())).device
    return str(device) if device.type == "cuda" else "cpu"


def _scale(name: str, stored: Mapping[str, Stored], device: torch.device) -> Tensor:
    """Read a weight's block scales from wherever they are."""
    path = stored[name + SCALE].path
    with safe_open(path, framework="pt", device=str(device)) as file:
        scale = file.get_tensor(name + SCALE)
    _check_scale(scale, name + SCALE, path)
    return scale


def _check_scale(scale: Tensor, name: str, path: Path) -> None:
    """One bad scale would spoil 16,384 weights without a word."""
    if broken := int((~(scale.isfinite() & (scale > 0))).sum()):
        raise CheckpointError(
            f"{path}: {broken} of {scale.numel()} scales in {name} are zero, negative, infinite or NaN, "
            "expected numbers above 0: the file is damaged, fetch it again"
        )
