"""Checkpoints in the published Hugging Face layout, read and written.

A folder holds `config.json` and safetensors files: one `model.safetensors`, or shards with an index that says which
tensor lies where. Our modules bear the published names, so there is no table of names here. What is here is
distrust: **every** name, shape and file length is held against the config before the first number is read, so that a
broken folder is refused whole, with the file, the tensor, what was expected and what was found. Nothing is unpickled.
"""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from dsa.inference.files import UnreadableFile, read_json, write_atomically, write_json
from dsa.model.config import Config
from dsa.model.transformer import Transformer

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9  # largest shard written; the published ones are about this size
READABLE = ("F64", "F32", "BF16", "F16")


class CheckpointError(UnreadableFile):
    """A folder that cannot be loaded; the message names file, tensor, what was expected and what was found."""


def from_pretrained(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    mesh: Any = None,
) -> Transformer:
    """Load a `deepseek_v32` folder, or a dense `deepseek_v3` one.

    Args:
        folder: with config.json and safetensors, as published or as `save_pretrained` and `transformers` write it.
        dtype: of the matrices; norms and router biases stay in at least fp32.
        device: where the weights shall live.
        mesh: a `DeviceMesh` of processes that share the model (`parallel.processes`): each keeps its own part.

    Raises:
        CheckpointError: before anything is loaded, if the folder is not whole. A multi-token-prediction layer
            (index `num_hidden_layers`) is passed over.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files = _tensors_by_file(folder)
    _check_whole(files, expected, config)
    _set_dtype(model, dtype)
    parallel = None if mesh is None else import_module("dsa.inference.parallel")  # half a second that few need
    if parallel:
        parallel.split(model, mesh)
    model.to_empty(device=device)
    for gate in model.gates():
        gate.load.zero_()
    target = model.state_dict()
    for path, names in tqdm(files.items(), desc=f"loading {folder.name}", unit="file", disable=len(files) == 1):
        with safe_open(path, framework="pt") as file:
            for name in names & target.keys():
                whole = file.get_tensor(name)
                target[name].copy_(parallel.own_part(whole, target[name]) if parallel else whole)
    return model.eval()


def save_pretrained(model: Transformer, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a folder that `from_pretrained` and `transformers` load: the model as it is now set.

    The current top-k becomes `index_topk`. A model with an indexer that is set to dense attention is written with the
    whole context as its top-k, which computes the same. A dense model becomes a `deepseek_v3` folder.

    Args:
        model: to be written; it is not changed.
        folder: made if need be. Other files in it stay; an older checkpoint in it is replaced.
        dtype: of the stored matrices, by default the model's own. Norms and router biases are stored in fp32.

    Raises:
        ValueError: if `model.attention` is a stand-in the format cannot express, or an indexer has no query latent.
    """
    folder = Path(folder)
    dtype = dtype or model.dtype
    config = _as_set(model)
    shards = list(_shards(model, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    published = _published_config(config, dtype)
    if len(shards) > 1 or (folder / INDEX).exists() or not _says(folder / CONFIG, published):
        for old in (CONFIG, INDEX):  # from here to the end the folder is not loadable rather than mixed
            (folder / old).unlink(missing_ok=True)
    names = [SINGLE] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in _from_1(shards)]
    for name, shard in zip(names, shards, strict=True):
        write_atomically(folder / name, partial(save_file, shard, metadata={"format": "pt"}))
    for stale in set(folder.glob("model*.safetensors")) - {folder / name for name in names}:
        stale.unlink()
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(folder / CONFIG, published)


def read_config(folder: Path) -> Config:
    """Read and check `config.json`; CheckpointError if it is missing, no JSON, or not a model we compute."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: give the one that holds config.json and the safetensors files"
        )
    published = _read_json(path, "the sizes of the model")
    try:
        return Config.from_dict(published)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_json(path: Path, purpose: str) -> dict[str, Any]:
    try:
        return read_json(path, purpose)
    except UnreadableFile as error:
        raise CheckpointError(str(error)) from error


def _tensors_by_file(folder: Path) -> dict[Path, set[str]]:
    """Find which file holds which tensors, by the index if there is one."""
    if not (folder / INDEX).exists():
        path = folder / SINGLE
        if not path.exists():
            found = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))) or "no safetensors at all"
            raise CheckpointError(
                f"{folder} lacks {SINGLE} and {INDEX}, one of which must say where tensors are: {found}"
            )
        return {path: set(_header(path))}
    weight_map = _read_json(folder / INDEX, "which shard holds which tensor").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map from tensor names to file names")
    files: dict[Path, set[str]] = {}
    for tensor, file in weight_map.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: {tensor} points to {file!r}, expected a safetensors file in this folder"
            )
        files.setdefault(folder / file, set()).add(tensor)
    return files


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Read a file's table of contents: name -> (shape, type). The library checks it against the file's length."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise CheckpointError(
            f"{path} ({size} bytes) is not a whole safetensors file, it may have been cut off: fetch it again ({error})"
        ) from error


def _check_whole(files: dict[Path, set[str]], expected: dict[str, tuple[int, ...]], config: Config) -> None:
    """Hold every file's contents against what the config asks for."""
    extra_layer = f"model.layers.{config.num_hidden_layers}."  # multi-token prediction
    found: set[str] = set()
    for path, names in files.items():
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: the index puts {len(names)} tensors there, {min(names)} among them"
            )
        header = _header(path)
        for name in sorted(names):
            if name.startswith(extra_layer):
                continue
            if name not in header:
                raise CheckpointError(f"{path} lacks {name}, which the index puts there")
            _check_tensor(path, name, *header[name], expected)
            found.add(name)
    missing = sorted(expected.keys() - found)
    if missing:
        where = ", ".join(path.name for path in list(files)[:3]) or INDEX
        raise CheckpointError(
            f"{where}: {len(missing)} tensors are missing, first {missing[0]}, "
            f"expected with shape {expected[missing[0]]}, found nowhere"
        )


def _check_tensor(path: Path, name: str, shape: tuple[int, ...], kind: str, expected: dict) -> None:
    if name.endswith("weight_scale_inv") or kind.startswith("F8"):
        raise CheckpointError(
            f"{path}: {name} is FP8 ({kind}), which is not read yet: expand the weights to BF16 first"
        )
    if name not in expected:
        raise CheckpointError(f"{path}: unknown tensor {name} of shape {shape}: the config asks for none of this name")
    if shape != expected[name]:
        raise CheckpointError(f"{path}: {name} has shape {shape}, expected {expected[name]} by config.json")
    if kind not in READABLE:
        raise CheckpointError(f"{path}: {name} is stored as {kind}, expected one of {', '.join(READABLE)}")


def _stays_fp32(name: str) -> bool:
    return "norm" in name or "e_score_correction_bias" in name


def _set_dtype(model: Transformer, dtype: torch.dtype) -> None:
    """Cast matrices to `dtype`; norms and router biases to fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    for module_name, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.to(wide if _stays_fp32(f"{module_name}.{name}") else dtype)


def _as_set(model: Transformer) -> Config:
    """Say in a config what the model's switches say now."""
    if model.config.index_topk is not None and model.config.q_lora_rank is None:
        raise ValueError(_NO_LATENT)
    if model.config.index_topk is None or model.attention == "sparse":
        if model.attention not in ("sparse", "dense"):
            raise ValueError(_NO_STAND_INS.format(model.attention))
        return model.config if model.config.index_topk is None else model.config.replace(index_topk=model.top_k)
    if model.attention == "dense":
        return model.config.replace(index_topk=model.config.max_position_embeddings)
    raise ValueError(_NO_STAND_INS.format(model.attention))


_NO_LATENT = (
    "q_lora_rank is None, but transformers' deepseek_v32 requires this latent, which its indexer reads: a model whose "
    "indexer reads the hidden state instead runs here and cannot be exported; only its dense original can"
)
_NO_STAND_INS = "attention={!r} cannot be written into a checkpoint: set model.attention to 'sparse' or 'dense' first"


def _published_config(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    published = config.to_dict()
    kind = "DeepseekV32ForCausalLM" if config.index_topk is not None else "DeepseekV3ForCausalLM"
    return {
        "architectures": [kind],
        **published,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _says(path: Path, published: dict[str, Any]) -> bool:
    """Whether the file holds just this config."""
    try:
        return read_json(path, "") == published
    except UnreadableFile:
        return False


def _shards(model: Transformer, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """Cut the weights into files of at most SHARD_BYTES."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in model.state_dict().items():
        stored = tensor.detach().to("cpu", torch.float32 if _stays_fp32(name) else dtype).contiguous()
        if shard and size + stored.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = stored
        size += stored.nbytes
    yield shard


def _from_1(items: list) -> range:
    return range(1, len(items) + 1)
