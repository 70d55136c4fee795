"""What a checkpoint folder holds, read from its headers alone, and whether that is what its config asks for.

Each safetensors file begins with a table of contents: names, shapes, types. That is enough to know a folder of 700 GB
within seconds and to refuse a broken one whole, before the first number is read: with the file, the tensor, what was
expected and what was found.

The published folders mix three dtypes. Most matrices are FP8 codes, each with a second tensor of block scales
(`...weight_scale_inv`, F32, one number for 128 x 128 codes, partial blocks at the edges included); the two need not lie
in the same file. What FP8 would hurt is BF16, norms and router biases are F32. And there is one layer more than
`num_hidden_layers` says: the last one predicts a second token (see `dsa.model.mtp`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dsa.io.files import UnreadableFile, read_json
from dsa.kernels import fp8
from dsa.model.config import Config

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SINGLE = "model.safetensors"
FP8 = "F8_E4M3"  # names of dtypes are those of safetensors
DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, FP8: 1}  # those that are read
SCALE_SUFFIX = "_scale_inv"  # after the name of the weight that it scales
QUANTIZATION_CONFIG = {
    "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(fp8.BLOCK),
    "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
}  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]


class CheckpointError(UnreadableFile):
    """A folder that cannot be loaded; the message names file, tensor, what was expected and what was found."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a header describes it: in which file, of what shape and dtype."""

    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What they take in the file; 0 for a dtype that is not read."""
        return self.numel * DTYPE_BYTES.get(self.dtype, 0)


def read_config(folder: Path) -> Config:
    """Read and check `config.json`; CheckpointError if it is missing, no JSON, or not a model we compute."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: give the one that holds config.json and the safetensors files"
        )
    published = _read_json(path, "the sizes of the model")
    try:
        _check_quantization(published.get("quantization_config"))
        return Config.from_dict(published)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_quantization(stated: Any) -> None:
    """Refuse weights rounded by other rules than the published ones."""
    if stated is None:
        return
    if not isinstance(stated, dict):
        raise ValueError(f"quantization_config={stated!r} is no JSON object: remove it, or restore the published one")
    for name in ("quant_method", "fmt", "weight_block_size"):
        if stated.get(name, QUANTIZATION_CONFIG[name]) != QUANTIZATION_CONFIG[name]:
            raise ValueError(
                f"quantization_config has {name}={stated[name]!r}, only {QUANTIZATION_CONFIG[name]!r} is read here: "
                "take a folder in the published format, or in BF16"
            )


def _read_json(path: Path, purpose: str) -> dict[str, Any]:
    try:
        return read_json(path, purpose)
    except UnreadableFile as error:
        raise CheckpointError(str(error)) from error


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """List a folder's tensors by name, from the index, if there is one, and the headers."""
    if (folder / INDEX).exists():
        return _follow_index(folder / INDEX)
    path = folder / SINGLE
    if path.exists():
        return read_header(path)
    present = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))) or "no safetensors at all"
    raise CheckpointError(f"{folder} lacks {SINGLE} and {INDEX}, one of which must say where tensors are: {present}")


def _follow_index(index: Path) -> dict[str, TensorInfo]:
    """Read the headers of all files that the index names, and keep the tensors that it puts there."""
    weight_map = _read_json(index, "which shard holds which tensor").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name} points to {file!r}, expected a safetensors file in this folder")
        shards.setdefault(file, []).append(name)
    tensors: dict[str, TensorInfo] = {}
    for file, names in shards.items():
        path = index.parent / file
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: the index puts {len(names)} tensors there, {min(names)} among them; fetch it again"
            )
        in_file = read_header(path)
        if lacking := sorted(set(names) - in_file.keys()):
            raise CheckpointError(f"{path} lacks {lacking[0]}, which the index puts there")
        tensors |= {name: in_file[name] for name in names}
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read a file's table of contents. The library checks it against the file's length, and maps it read-only."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: TensorInfo(path, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise CheckpointError(
            f"{path} ({size} bytes) is not a whole safetensors file, it may have been cut off: fetch it again ({error})"
        ) from error


def stays_fp32(name: str) -> bool:
    """Norms and router biases, which no model keeps in half precision."""
    return "norm" in name or "e_score_correction_bias" in name


def computes_in_fp32(name: str) -> bool:
    """What a half-precision model multiplies in fp32, though folders may store it in bf16: as published.

    Besides norms and router biases the two heads, whose likeliest tokens would tie, and the index heads' weights.
    """
    return stays_fp32(name) or name.endswith(("lm_head.weight", "shared_head.head.weight", "weights_proj.weight"))


def mtp_prefix(config: Config) -> str:
    """How the names of the multi-token-prediction layer begin: it is counted on after the last real layer."""
    return f"model.layers.{config.num_hidden_layers}."


def check_tensors(stored: Mapping[str, TensorInfo], expected: Shapes, folder: Path) -> None:
    """Hold tensors against the shapes that a model asks for: all of them, each as expected, and no other.

    FP8 codes bring their scales along; these are not in `expected`. Raises CheckpointError.
    """
    for name, tensor in sorted(stored.items()):
        if name.endswith(f"weight{SCALE_SUFFIX}"):
            _check_scale(name, stored)
        else:
            _check_tensor(name, tensor, expected)
            _check_fp8(name, stored)
    if missing := sorted(expected.keys() - stored.keys()):
        files = ", ".join(sorted({tensor.path.name for tensor in stored.values()})[:3]) or folder / INDEX
        raise CheckpointError(
            f"{files}: {len(missing)} tensors are missing, first {missing[0]}, "
            f"expected with shape {expected[missing[0]]}, found nowhere"
        )


def _check_tensor(name: str, tensor: TensorInfo, expected: Shapes) -> None:
    path, shape = tensor.path, tensor.shape
    if name not in expected:
        raise CheckpointError(f"{path}: unknown tensor {name} of shape {shape}: the config asks for none of this name")
    if shape != expected[name]:
        raise CheckpointError(f"{path}: {name} has shape {shape}, expected {expected[name]} by config.json")
    if tensor.dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{path}: {name} is stored as {tensor.dtype}, expected one of {', '.join(DTYPE_BYTES)}")


def _check_fp8(name: str, stored: Mapping[str, TensorInfo]) -> None:
    """FP8 codes say nothing without their scales."""
    tensor = stored[name]
    if tensor.dtype != FP8:
        return
    if not name.endswith("weight") or len(tensor.shape) != 2:
        raise CheckpointError(f"{tensor.path}: {name} is FP8 ({FP8}), which only matrices may be: store it as F32")
    if name + SCALE_SUFFIX not in stored:
        raise CheckpointError(
            f"{tensor.path}: {name} is FP8 ({FP8}) and its scales {name}{SCALE_SUFFIX} were found nowhere: "
            "fetch the file that holds them, or correct the index"
        )


def _check_scale(name: str, stored: Mapping[str, TensorInfo]) -> None:
    """Scales belong to codes, one for each block."""
    scale, weight = stored[name], stored.get(name.removesuffix(SCALE_SUFFIX))
    if weight is None or weight.dtype != FP8:
        what = "was found nowhere" if weight is None else f"is {weight.dtype} in {weight.path.name} and needs none"
        raise CheckpointError(
            f"{scale.path}: {name} scales {name.removesuffix(SCALE_SUFFIX)}, which {what}: expected {FP8}"
        )
    blocks = tuple(ceil(size / block) for size, block in zip(weight.shape, fp8.BLOCK, strict=False))
    if scale.shape != blocks:
        raise CheckpointError(
            f"{scale.path}: {name} has shape {scale.shape}, expected {blocks}: one scale for each "
            f"{fp8.BLOCK[0]} x {fp8.BLOCK[1]} of {weight.shape}, partial blocks included"
        )
    if scale.dtype != "F32":
        raise CheckpointError(f"{scale.path}: {name} is stored as {scale.dtype}, expected F32")
