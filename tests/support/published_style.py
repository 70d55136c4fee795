"""A folder as DeepSeek publishes it, made without the package's own writer, and the numbers it stands for.

Everything that makes real folders awkward is in it: FP8 codes beside BF16 and F32, block scales in another file than
their weights, partial blocks, an old-style config, and the layer beyond the last.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import small

SIZES = {
    "hidden_size": 200, "q_lora_rank": 130, "kv_lora_rank": 136, "intermediate_size": 300,
    "moe_intermediate_size": 129, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "qk_nope_head_dim": 24,
    "v_head_dim": 40,
}  # fmt: skip
FP8 = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "indexer.wq_b", "indexer.wk",
       "gate_proj", "up_proj", "down_proj")  # fmt: skip


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By loops: codes, scales, and what they stand for."""
    rows, columns = (math.ceil(size / 128) for size in weight.shape)
    codes, scales, twin = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns), weight + 0
    for m in range(rows):
        for n in range(columns):
            block = (slice(128 * m, 128 * m + 128), slice(128 * n, 128 * n + 128))
            scales[m, n] = 2.0 ** math.ceil(math.log2(max(weight[block].abs().max().item(), 1e-4) / 448))
            codes[block] = (weight[block] / scales[m, n]).to(torch.float8_e4m3fn)
            twin[block] = codes[block].float() * scales[m, n]
    return codes, scales, twin


def as_stored(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's tensors in the published types, and the plain fp32 numbers that these are."""
    stored, twin = {}, {}
    for name, tensor in state.items():
        if name.removesuffix(".weight").endswith(FP8):
            stored[name], stored[f"{name}_scale_inv"], twin[name] = codes_of(tensor)
        elif "norm" in name or "bias" in name:
            stored[name] = twin[name] = tensor
        else:
            stored[name] = tensor.bfloat16()
            twin[name] = stored[name].float()
    return stored, twin


def old_style(config) -> dict:
    """A config.json of the published kind."""
    published = config.to_dict()
    rope = published.pop("rope_parameters")
    published["rope_theta"], published["torch_dtype"] = rope.pop("rope_theta"), "bfloat16"
    published["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    published["num_nextn_predict_layers"] = 1
    published["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }  # fmt: skip
    return published


def extra_layer(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors of a multi-token-prediction layer: the last layer's once more, and its own."""
    last, extra = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    D = state["model.norm.weight"].shape[0]
    made = {extra + name.removeprefix(last): tensor for name, tensor in state.items() if name.startswith(last)}
    own = {f"{extra}{norm}.weight": torch.linspace(0.5, 1.5, D) for norm in ("enorm", "hnorm", "shared_head.norm")}
    copies = {
        f"{extra}embed_tokens.weight": state["model.embed_tokens.weight"],
        f"{extra}shared_head.head.weight": state["lm_head.weight"],
    }
    projection = torch.randn(D, 2 * D, generator=torch.Generator().manual_seed(5)) / (2 * D) ** 0.5
    return made | own | copies | {f"{extra}eh_proj.weight": projection}


def write(folder: Path, seed: int = 0, shards: int = 5, **changes):
    """Make the folder; returns the config and the plain numbers of all its weights, the extra layer's included."""
    config = small.config(**SIZES | changes)
    model = small.model(seed, config)
    state = dict(model.state_dict())
    state |= extra_layer(state, config.num_hidden_layers)
    stored, twin = as_stored(state)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number in range(shards):  # a weight and its scale follow each other, so they never share a file
        file = f"model-{number + 1:05}-of-{shards:06}.safetensors"
        part = {name: stored[name].clone() for name in list(stored)[number::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(old_style(config)))
    return config, twin
