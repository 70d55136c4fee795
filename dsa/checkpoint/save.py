"""From a model to a folder in the published layout, which `from_pretrained` and `transformers` load.

Written is what the model is now set to. In FP8, if that is asked for, goes what the published checkpoint has in it:
every projection of the attention, the indexer's queries and key, all feed-forward and expert weights. Not in FP8,
because little would be saved or much lost: embedding and head, the router, the indexer's head weights, and the
projection with which the multi-token-prediction layer begins.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsa.checkpoint.index import CONFIG, INDEX, QUANTIZATION_CONFIG, SCALE_SUFFIX, SINGLE, stays_fp32
from dsa.checkpoint.mtp import tensors_to_save
from dsa.io.files import UnreadableFile, read_json, write_atomically, write_json
from dsa.kernels.fp8 import BLOCK, E4M3, quantize, scale_shape
from dsa.model.config import Config
from dsa.model.fp8_linear import to_local
from dsa.model.mtp import MTP
from dsa.model.transformer import Transformer

SHARD_BYTES = 5 * 10**9  # largest shard written; the published ones are about this size
FP8_WEIGHTS = re.compile(
    r"\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj|wq_b|wk)\.weight$"
)


class Writer:
    """Turns a model's tensors into those that a file holds, one at a time.

    Args:
        state: tensors by their published names.
        dtype: of matrices that are not FP8. Norms and router biases are fp32.
        fp8: round what the published format rounds. What is FP8 already stays so in any case.
    """

    def __init__(self, state: Mapping[str, Tensor], dtype: torch.dtype, fp8: bool):
        self.state, self.dtype, self.fp8 = state, dtype, fp8

    @property
    def has_fp8(self) -> bool:
        """Whether anything will be FP8."""
        return any(self._is_fp8(name) for name in self.state)

    def _is_fp8(self, name: str) -> bool:
        return self.state[name].dtype == E4M3 or (self.fp8 and FP8_WEIGHTS.search(name) is not None)

    def nbytes(self, name: str) -> int:
        """What one tensor will take, its scales included."""
        shape = self.state[name].shape
        if self._is_fp8(name):
            return prod(shape) + 4 * prod(scale_shape(self.state[name], BLOCK))
        return prod(shape) * (4 if self._stays_fp32(name) else self.dtype.itemsize)

    def _stays_fp32(self, name: str) -> bool:
        return stays_fp32(name) or name.endswith(SCALE_SUFFIX)

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """One tensor as stored, and after fresh codes their scales."""
        tensor = self.state[name].detach()
        if self._is_fp8(name) and tensor.dtype != E4M3:
            codes, scale = quantize(tensor, BLOCK)
            yield name, codes.cpu()
            yield name + SCALE_SUFFIX, scale.cpu()
        elif tensor.dtype == E4M3:
            yield name, tensor.cpu().contiguous()
        else:
            yield name, tensor.to("cpu", torch.float32 if self._stays_fp32(name) else self.dtype).contiguous()

    def shards(self, limit: int) -> list[list[str]]:
        """Cut the names into runs of at most `limit` bytes, for one file each."""
        shards: list[list[str]] = [[]]
        size = 0
        for name in self.state:
            if shards[-1] and size + self.nbytes(name) > limit:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += self.nbytes(name)
        return shards


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
    if to_local(model.lm_head.weight) is not model.lm_head.weight:
        raise ValueError("the model is split over processes, each of which holds a part only: write an unsplit one")
    published = _published_config(_effective_config(model), dtype)
    state = model.state_dict()
    if mtp is not None:
        state |= tensors_to_save(mtp)
        published["num_nextn_predict_layers"] = 1
    writer = Writer(state, dtype, fp8)
    if writer.has_fp8:
        published["quantization_config"] = QUANTIZATION_CONFIG
    shards = writer.shards(SHARD_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) > 1 or (folder / INDEX).exists() or not _holds(folder / CONFIG, published):
        for old in (CONFIG, INDEX):  # from here to the end the folder is not loadable rather than mixed
            (folder / old).unlink(missing_ok=True)
    _write_shards(folder, writer, shards)
    write_json(folder / CONFIG, published)


def _write_shards(folder: Path, writer: Writer, shards: list[list[str]]) -> None:
    """Write one file for each run of names, and the index if there are several; never more than one in memory."""
    n = len(shards)
    files = [SINGLE] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    weight_map: dict[str, str] = {}
    size = 0
    for file, names in zip(files, shards, strict=True):
        shard = dict(pair for name in names for pair in writer.tensors(name))
        write_atomically(folder / file, partial(save_file, shard, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(shard, file)
        size += sum(tensor.nbytes for tensor in shard.values())
    for stale in set(folder.glob("model*.safetensors")) - {folder / file for file in files}:
        stale.unlink()
    if n > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _effective_config(model: Transformer) -> Config:
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
    architecture = "DeepseekV32ForCausalLM" if config.index_topk is not None else "DeepseekV3ForCausalLM"
    return {
        "architectures": [architecture],
        **published,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _holds(path: Path, published: dict[str, Any]) -> bool:
    """Whether the file holds just this config."""
    try:
        return read_json(path, "") == published
    except UnreadableFile:
        return False
