"""A model from elsewhere becomes a sparse one: what fits, what is refused, and what goes along.

The report did this once, from V3.1-Terminus to V3.2-Exp. The same can be done with any checkpoint of that architecture,
`deepseek_v3` as `transformers` saves it. What cannot work is refused before anything is trained: an indexer ranks the
keys of multi-head latent attention, so another architecture has nothing to rank; and `deepseek_v32` wants a low-rank
query latent, so a model without one could be trained but not stored. A multi-token-prediction layer is left behind.

Sizes follow the published ones where nothing is said: half as many index heads as attention heads (64 of 128), twice
as wide as the rotary part (128 for 64), and at most 2048 keys, fewer for short sequences.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dsa.checkpoint.index import CONFIG, read_config
from dsa.io.command_line import count
from dsa.io.files import read_json, write_json
from dsa.model.config import Config
from dsa.training.pretrain import dense_config

DENSE, SPARSE = "deepseek_v3", "deepseek_v32"
LENGTH = 512  # tokens a sequence, where the model reads as many
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "chat_template*", "merges.txt")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_LATENT = (
    "q_lora_rank is null: transformers' deepseek_v32 requires this latent, which its indexer reads, so no folder could "
    "hold the result. Such a model trains and runs in Python only (its indexers read the normed hidden state): "
    "dsa.from_pretrained, with_indexer and warm_up of dsa.training.indexer"
)


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what the two stages' command understands beside what all stages do."""
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="the model to start from: deepseek_v3, or deepseek_v32")
    add("--then-sparse", type=count, metavar="N", help="after the warm-up, N steps of sparse training")
    add("--index-heads", type=count, metavar="J", help="index heads to add (half the attention heads)")
    add("--index-head-dim", type=count, metavar="W", help="their width, qk_rope_head_dim or more (twice that)")
    add("--top-k", type=count, metavar="K", help="keys that each query keeps (a 32nd of the length, 16 to 2048)")
    add("--length", type=count, metavar="L", help=f"tokens a sequence ({LENGTH}, or what the model reads)")
    add("--steps", type=count, metavar="N", help="training steps of the stage")
    add("--batch", type=count, metavar="B", default=8, help="sequences a step (8)")
    add("--rate", type=float, help="learning rate of the warm-up (0.01; the report's large model: 0.001)")
    add("--sparse-rate", type=float, help="learning rate of sparse training (0.003; the report: 7.3e-6)")
    add("--cost-at", type=count, nargs="+", metavar="L", help="lengths at which to count the cost")
    return parser


def check(options: argparse.Namespace) -> Config:
    """The config of the folder to start from, if the command can be done; ValueError says why not otherwise."""
    path = options.folder / CONFIG
    if path.is_file():  # a foreign architecture is named before its sizes are found strange
        _check_architecture(path)
    config = read_config(options.folder)
    if options.sparse and options.then_sparse:
        raise ValueError("--sparse is the sparse stage alone, --then-sparse adds it to a warm-up: give one of them")
    if options.sparse and config.index_topk is None:
        raise ValueError(
            f"{options.folder} is dense, so --sparse has no indexer to select with: leave --sparse out to add and "
            "warm up one first, and give --then-sparse N to go on with sparse training"
        )
    if config.index_topk is not None and (options.index_heads or options.index_head_dim):
        raise ValueError(f"{options.folder} has an indexer already: leave --index-heads and --index-head-dim out")
    if config.q_lora_rank is None:
        raise ValueError(f"{path}: {NO_LATENT}")
    for name in ("rate", "sparse_rate"):
        rate = getattr(options, name)
        if rate is not None and not 0 < rate < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')}={rate} must be a number above 0")
    return config


def _check_architecture(path: Path) -> None:
    kind = read_json(path, "the sizes of the model").get("model_type")
    if kind in (DENSE, SPARSE):
        return
    why = {
        "deepseek_v2": "it routes by a softmax without biases, and has no descendant with an indexer",
    }.get(str(kind), "an indexer selects keys of multi-head latent attention as DeepSeek-V3 has it")
    raise ValueError(
        f"{path} has model_type={kind!r}, which cannot be given an indexer here: {why}. "
        f"Start from a {DENSE!r} folder as transformers saves it"
    )


def length_of(config: Config, asked: int | None) -> int:
    """Tokens a training sequence has; ValueError for more than the model reads, or too few to choose among."""
    length, most = asked or min(LENGTH, config.max_position_embeddings), config.max_position_embeddings
    if not 2 <= length <= most:
        raise ValueError(f"--length {length} must lie in 2 to max_position_embeddings={most}")
    return length


def index_sizes(config: Config, options: argparse.Namespace, length: int) -> dict[str, int]:
    """J, W and K as :func:`dsa.training.indexer.with_indexer` takes them.

    Raises ValueError for a width under the rotary width, and for a K that would keep every key.
    """
    sizes = {
        "heads": options.index_heads or max(2, config.num_attention_heads // 2),
        "width": options.index_head_dim or 2 * config.qk_rope_head_dim,
        "top_k": top_k_of(config, options.top_k, length),
    }
    if config.index_topk is None:  # made only to be checked: a Config refuses what does not go together
        config.replace(index_n_heads=sizes["heads"], index_head_dim=sizes["width"], index_topk=sizes["top_k"])
    return sizes


def is_course_model(config: Config, length: int) -> bool:
    """Whether these are the sizes of the course's own model, about which its claims are."""
    return config.replace(**dict.fromkeys(("index_n_heads", "index_head_dim", "index_topk"))) == dense_config(length)


def top_k_of(config: Config, asked: int | None, length: int) -> int:
    """K: what is asked for, else what the model has, else a 32nd of the length, 16 to 2048."""
    usual = min(2048, max(16, length // 32), max(1, length // 4))
    top_k = asked or config.index_topk or usual
    if top_k >= length:
        raise ValueError(
            f"top-k {top_k} keeps every key of a sequence of {length}, so nothing is selected: "
            "give a smaller --top-k or a larger --length"
        )
    return top_k


def stored_dtype(folder: Path) -> torch.dtype:
    """The type in which a folder stores its matrices, so that those that are not trained go on bit for bit."""
    kinds = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if "lm_head.weight" in file.keys():  # noqa: SIM118
                return kinds[file.get_slice("lm_head.weight").get_dtype()]
    return torch.float32


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a model's tokenizer and the like to the new folder, and its special ids into the new config."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    before, after = (read_json(folder / CONFIG, "the sizes of the model") for folder in (source, target))
    ids: dict[str, Any] = {name: before[name] for name in SPECIAL_IDS if before.get(name) is not None}
    if ids:
        write_json(target / CONFIG, after | ids)
