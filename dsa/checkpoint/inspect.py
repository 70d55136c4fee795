"""What is in a checkpoint folder, what it will take, and whether it will load: from the headers, nothing allocated.

    dsa inspect FOLDER

A folder of 700 GB takes days to fetch and minutes to load, so it is better to know beforehand. Parameters are counted
by part (block scales are none). Memory is what the weights take on each of several GPUs that share a model as
`distributed.tensor_parallel` does: embedding, head, the matrices of attention heads, feed-forward layers and experts
are split, everything else (indexers, routers, norms, the projections to the latents) lies on each. The cache lies on
each, too: all heads read the same latents. What a pass needs on top is small beside that, if prompts are read in
chunks.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path

import torch

from dsa.analysis.memory import cache_bytes
from dsa.checkpoint import index, mtp
from dsa.checkpoint.index import FP8, SCALE_SUFFIX, CheckpointError, TensorInfo, computes_in_fp32
from dsa.io.command_line import Parser, errors_in_a_sentence
from dsa.model.config import Config
from dsa.model.mtp import MTP
from dsa.model.transformer import Transformer

GPUS = (1, 2, 4, 8)
MTP_PART = "multi-token prediction"
PARTS = (  # the first pattern that is found in a name decides
    ("embedding", r"^model\.embed_tokens\."),
    ("head", r"^lm_head\."),
    ("indexer", r"\.indexer\."),
    ("norms", r"norm"),
    ("attention", r"\.self_attn\."),
    ("router", r"\.mlp\.gate\."),
    ("experts", r"\.mlp\.experts\."),
    ("feed-forward", r"\.mlp\."),
)
SPLIT = re.compile(
    r"(^lm_head|\.embed_tokens|\.q_proj|\.q_b_proj|\.kv_b_proj|\.o_proj|\.gate_proj|\.up_proj|\.down_proj)\."
)


@dataclass(frozen=True)
class FolderSummary:
    """What a folder's headers say.

    Attributes:
        folder: where it is.
        config: its sizes.
        stored: its tensors by name.
        problem: why it will not load; None if it will.
    """

    folder: Path
    config: Config
    stored: Mapping[str, TensorInfo]
    problem: str | None

    def parameters(self) -> dict[str, int]:
        """Parameters by part, the multi-token-prediction layer as one."""
        counts: Counter[str] = Counter()
        for name, info in self.stored.items():
            if not name.endswith(SCALE_SUFFIX):
                counts[self.part(name)] += info.numel
        return dict(counts)

    def part(self, name: str) -> str:
        """To which part of the model a tensor belongs."""
        if name.startswith(index.mtp_prefix(self.config)):
            return MTP_PART
        return next((part for part, pattern in PARTS if re.search(pattern, name)), "unknown")

    @cached_property
    def _sizes(self) -> Counter:
        """Bytes of the main model's weights by (FP8 kept?, split over GPUs?)."""
        sizes: Counter[tuple[bool, bool]] = Counter()
        mtp = index.mtp_prefix(self.config)
        for name, info in self.stored.items():
            if name.startswith(mtp):
                continue
            if info.dtype == FP8:
                kept, dequantized = info.nbytes, 2 * info.numel
            elif name.endswith(SCALE_SUFFIX):
                kept, dequantized = info.nbytes, 0  # a dequantized weight needs its scales no more
            else:
                kept = dequantized = info.numel * (4 if computes_in_fp32(name) else 2)
            split = SPLIT.search(name) is not None
            sizes[True, split] += kept
            sizes[False, split] += dequantized
        return sizes

    def weight_bytes(self, gpus: int, keep_fp8: bool) -> int:
        """What the main model's weights take on each of `gpus` GPUs, in bf16 where they are not fp32 or kept in FP8."""
        return ceil(self._sizes[keep_fp8, True] / gpus) + self._sizes[keep_fp8, False]


def inspect_folder(folder: Path) -> FolderSummary:
    """Read a folder's config and headers; CheckpointError if even these cannot be read."""
    config = index.read_config(folder)
    stored = index.list_tensors(folder)
    try:
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
            mtp_layer = MTP(config)
        prefix = index.mtp_prefix(config)
        extra = {name: info for name, info in stored.items() if name.startswith(prefix)}
        index.check_tensors({name: info for name, info in stored.items() if name not in extra}, expected, folder)
        if extra:
            index.check_tensors(extra, mtp.expected_shapes(mtp_layer, extra), folder)
    except CheckpointError as error:
        return FolderSummary(folder, config, stored, str(error))
    return FolderSummary(folder, config, stored, None)


def report(summary: FolderSummary) -> Iterator[str]:
    """What `inspect` prints, line by line."""
    config, stored = summary.config, summary.stored.values()
    attention = "dense" if config.index_topk is None else f"sparse, top-{config.index_topk}"
    context = f"context {config.max_position_embeddings:,}"
    yield f"{summary.folder}: {config.num_hidden_layers} layers, {attention}, {context}"
    dtypes = Counter(info.dtype for info in stored).most_common()
    contents = ", ".join(f"{count:,} tensors in {dtype}" for dtype, count in dtypes)
    yield f"{len({info.path for info in stored})} files, {_gib(sum(info.nbytes for info in stored))}: {contents}"

    parameters = summary.parameters()
    mtp_parameters = parameters.pop(MTP_PART, None)
    yield "\nparameters"
    for part, count in sorted(parameters.items(), key=lambda item: -item[1]):
        yield f"  {part:<24}{count:>20,}"
    yield f"  {'the model':<24}{sum(parameters.values()):>20,}"
    if mtp_parameters is not None:
        yield f"  {MTP_PART:<24}{mtp_parameters:>20,}  (its copies of embedding and head included)"

    yield "\nmemory on each GPU     " + "".join(f"{n:>12}" for n in GPUS) + "  GPUs"
    for title, keep in (("weights, FP8 kept", True), ("weights in BF16", False)):
        yield f"  {title:<21}" + "".join(f"{_gib(summary.weight_bytes(n, keep)):>12}" for n in GPUS)
    length = config.max_position_embeddings
    for title, precision in (("deployed", "deployed"), ("BF16", "bf16")):
        size = _gib(cache_bytes(config, precision) * length)
        yield f"  cache, {title:<14}{size:>12}  on each, for one sequence of {length:,} tokens"
    yield ""
    yield "it will load" if summary.problem is None else f"it will NOT load: {summary.problem}"


def _gib(size: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 2**10:,.1f} KiB"


def main(argv: Sequence[str] | None = None) -> None:
    """The command `dsa inspect`; its exit status says whether the folder will load."""
    about = "List what a checkpoint folder holds, what it needs on 1 to 8 GPUs, and whether it loads; headers only."
    parser = Parser("dsa inspect", description=about)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="config.json and safetensors, FP8 or not")
    arguments = parser.parse_args(argv)
    with errors_in_a_sentence():
        summary = inspect_folder(arguments.folder)
        print(*report(summary), sep="\n")
    sys.exit(summary.problem is not None)


if __name__ == "__main__":
    main()
