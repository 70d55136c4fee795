"""The multi-token-prediction layer in a checkpoint folder: read beside a model, and written with it.

It lies in the folder as one layer more than the config's `num_hidden_layers`, with copies of the model's embedding and
head. Most users of a folder pass over it; `transformers` does not know it (and warns of unexpected tensors), so it is
written only when asked for.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsa.checkpoint import index
from dsa.checkpoint.index import CheckpointError, TensorInfo
from dsa.checkpoint.load import load_tensors, set_dtype, use_fp8_linears
from dsa.model.moe import MoE
from dsa.model.mtp import MTP, SHARED
from dsa.model.transformer import Transformer

COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


def load_mtp(folder: str | Path, model: Transformer, *, keep_fp8: bool = False) -> MTP:
    """Load the extra layer of the folder that `model` comes from, attached to it, in its dtype and on its device.

    Raises:
        CheckpointError: if the folder has none, or a broken one, or if its copies of embedding and head are not the
            model's own.
    """
    folder = Path(folder)
    config = index.read_config(folder)
    prefix = index.mtp_prefix(config)
    stored = {name: info for name, info in index.list_tensors(folder).items() if name.startswith(prefix)}
    if not stored:
        raise CheckpointError(f"{folder} has no multi-token-prediction layer: no tensor's name begins with {prefix}")
    with torch.device("meta"):
        mtp = MTP(config)
        index.check_tensors(stored, expected_shapes(mtp, stored), folder)
        if keep_fp8:
            use_fp8_linears(mtp, {name.removeprefix(prefix): info for name, info in stored.items()})
    set_dtype(mtp, model.dtype)
    mtp.to_empty(device=model.model.embed_tokens.weight.device)
    assert isinstance(mtp.mlp, MoE)  # it comes after the last layer, so never among the dense ones
    mtp.mlp.gate.load.zero_()
    load_tensors(published_state_dict(mtp), stored, f"loading the extra layer of {folder.name}")
    _check_copies(prefix, stored, model)
    return mtp.tie_embeddings(model).eval()


def published_state_dict(mtp: MTP) -> dict[str, Tensor]:
    """The layer's tensors by their names in a folder."""
    prefix = index.mtp_prefix(mtp.config)
    return {prefix + name: tensor for name, tensor in mtp.state_dict().items()}


def expected_shapes(mtp: MTP, stored: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """The shapes that an extra layer must have, by their names in a folder; copies may be left out."""
    size = (mtp.config.vocab_size, mtp.config.hidden_size)
    copies = {index.mtp_prefix(mtp.config) + name: size for name in COPIES}
    own = {name: tuple(tensor.shape) for name, tensor in published_state_dict(mtp).items()}
    return own | {name: size for name in copies if name in stored}


def _check_copies(prefix: str, stored: Mapping[str, TensorInfo], model: Transformer) -> None:
    """The layer shares embedding and head with the model, so other ones in the file would be lost without a word."""
    state = model.state_dict()
    for name, original in COPIES.items():
        name = prefix + name
        if name in stored:
            copy = {name: torch.empty_like(state[original])}
            load_tensors(copy, stored, name)
            if not torch.equal(copy[name], state[original]):
                raise CheckpointError(
                    f"{stored[name].path}: {name} is not the copy of {original} that it should be: the layer belongs "
                    "to another model, or the model was trained on without it"
                )


def tensors_to_save(mtp: MTP) -> dict[str, Tensor]:
    """What a folder holds of an attached layer: copies of embedding and head included, as tensors of their own."""
    shared = tuple(index.mtp_prefix(mtp.config) + name for name in SHARED)
    state = published_state_dict(mtp)
    # safetensors writes no two names of one memory, so what is shared with the model is cloned
    return {name: tensor.clone() if name.startswith(shared) else tensor for name, tensor in state.items()}
