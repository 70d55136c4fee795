"""Checkpoints in the published Hugging Face layout, read and written.

A folder holds `config.json` and safetensors files: one `model.safetensors`, or shards with an index that says which
tensor lies where. Our modules bear the published names, so there is no table of names here. What is here is
distrust: **every** name, shape and file length is held against the config before the first number is read, so that a
broken folder is refused whole, with the file, the tensor, what was expected and what was found. Nothing is unpickled.
(`layout` reads the headers, `reading` the numbers, `fp8_weights` knows what is stored how.)

    python -m dsa.inference.checkpoint inspect FOLDER

lists what a folder holds and what it would take, and says whether it will load, without loading it.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dsa.inference import inventory, layout, prediction
from dsa.inference.fp8_weights import Writer
from dsa.inference.layout import CONFIG, INDEX, QUANTISATION, SINGLE, CheckpointError, Stored, read_config
from dsa.inference.reading import fill, keep_codes, set_dtype
from dsa.model.config import Config
from dsa.model.fp8_linear import here
from dsa.model.mtp import MTP
from dsa.model.transformer import Transformer
from dsa.text.files import UnreadableFile, read_json, write_atomically, write_json

__all__ = ["CONFIG", "INDEX", "SINGLE", "CheckpointError", "from_pretrained", "read_config", "save_pretrained"]

SHARD_BYTES = 5 * 10**9  # largest shard written; the published ones are about this size


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
        dtype: of the matrices; norms and router biases stay in at least fp32.
        device: where the weights shall live.
        keep_fp8: leave what is stored in FP8 as it is, one byte a weight, and expand it at each use. Otherwise it is
            expanded once, to `dtype`.
        mesh: a `DeviceMesh` of processes that share the model (`parallel.processes`): each keeps its own part.

    Raises:
        CheckpointError: before anything is loaded, if the folder is not whole; and for FP8 scales that are no positive
            numbers. A multi-token-prediction layer (index `num_hidden_layers`) is passed over: see
            `dsa.inference.prediction.load_mtp`.
    """
    folder = Path(folder)
    config = read_config(folder)
    stored = main_model(layout.contents(folder), config)
    with torch.device("meta"):
        model = Transformer(config)
        layout.check(stored, shapes(model), folder)
        if keep_fp8:
            keep_codes(model, stored)
    set_dtype(model, dtype)
    if mesh is not None:
        import_module("dsa.inference.parallel").split(model, mesh)  # imported by those who need it: it takes a while
    model.to_empty(device=device)
    for gate in model.gates():
        gate.load.zero_()
    fill(model.state_dict(), stored, f"loading {folder.name}")
    return model.eval()


def main_model(stored: dict[str, Stored], config: Config) -> dict[str, Stored]:
    """All but the multi-token-prediction layer."""
    return {name: tensor for name, tensor in stored.items() if not name.startswith(layout.extra_layer(config))}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """What a module's checkpoint must hold."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def save_pretrained(
    model: Transformer,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    fp8: bool = False,
    mtp: MTP | None = None,
) -> None:
    """Write a folder that `from_pretrained` and `transformers` load: the model as it is now set.

    The current top-k becomes `index_topk`. A model with an indexer that is set to dense attention is written with the
    whole context as its top-k, which computes the same. A dense model becomes a `deepseek_v3` folder.

    Args:
        model: to be written; it is not changed.
        folder: made if need be. Other files in it stay; an older checkpoint in it is replaced.
        dtype: of the stored matrices, by default the model's own. Norms and router biases are stored in fp32.
        fp8: store what the published checkpoint stores in FP8 so too, with a scale for each block of 128 x 128. What
            the model itself keeps in FP8 is stored as it is, bit for bit.
        mtp: the multi-token-prediction layer attached to the model, to be stored as layer `num_hidden_layers`. Leave it
            out for `transformers`, which does not know it.

    Raises:
        ValueError: if `model.attention` is a stand-in the format cannot express, an indexer has no query latent, or
            FP8 is asked for weights that are infinite or NaN.
    """
    folder = Path(folder)
    dtype = dtype or model.dtype
    if here(model.lm_head.weight) is not model.lm_head.weight:
        raise ValueError("the model is split over processes, each of which holds a part only: write an unsplit one")
    published = _published_config(_as_set(model), dtype)
    state = model.state_dict()
    if mtp is not None:
        state |= prediction.as_stored(mtp)
        published["num_nextn_predict_layers"] = 1
    writer = Writer(state, dtype, fp8)
    if writer.quantised:
        published["quantization_config"] = QUANTISATION
    runs = writer.plan(SHARD_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    if len(runs) > 1 or (folder / INDEX).exists() or not _says(folder / CONFIG, published):
        for old in (CONFIG, INDEX):  # from here to the end the folder is not loadable rather than mixed
            (folder / old).unlink(missing_ok=True)
    _write_shards(folder, writer, runs)
    write_json(folder / CONFIG, published)


def _write_shards(folder: Path, writer: Writer, runs: list[list[str]]) -> None:
    """Write one file for each run of names, and the index if there are several; never more than one in memory."""
    names = [SINGLE] if len(runs) == 1 else [f"model-{i:05}-of-{len(runs):05}.safetensors" for i in _from_1(runs)]
    weight_map: dict[str, str] = {}
    size = 0
    for file, run in zip(names, runs, strict=True):
        shard = dict(pair for name in run for pair in writer.tensors(name))
        write_atomically(folder / file, partial(save_file, shard, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(shard, file)
        size += sum(tensor.nbytes for tensor in shard.values())
    for stale in set(folder.glob("model*.safetensors")) - {folder / file for file in names}:
        stale.unlink()
    if len(runs) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


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


def _from_1(items: list) -> range:
    return range(1, len(items) + 1)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m dsa.inference.checkpoint inspect FOLDER`."""
    parser = argparse.ArgumentParser(prog="python -m dsa.inference.checkpoint", description="Look into a checkpoint.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="what a folder holds, what it takes, and whether it will load")
    inspect.add_argument("folder", type=Path, metavar="FOLDER")
    try:
        found = inventory.look(parser.parse_args(argv).folder)
    except CheckpointError as error:
        sys.exit(f"it will NOT load: {error}")
    print(*inventory.report(found), sep="\n")
    sys.exit(found.problem is not None)


if __name__ == "__main__":
    main()
