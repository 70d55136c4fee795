"""Layers of true width: the published sizes, as many layers as the memory holds, random or loaded weights.

A layer's speed and memory do not depend on what its weights say, and one layer does not know how many others there are.
So a few layers of the real shape, filled with random numbers, tell what 61 of them would do, on one GPU and without a
download. What they do not tell is anything about the quality of an answer.

    dsa bench full-width --out data/measurements/true_width.json

measures prefill and decode, dense and sparse, over contexts from 8K to 128K, with the memory they take, and writes the
record that the course draws. Prompts are read in chunks. What is measured are this package's own kernels on the device
it runs on; `analysis.serving_fit` says what a machine could reach at best.
"""

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dsa.bench.timing import wall_seconds
from dsa.checkpoint import index
from dsa.checkpoint.load import load_tensors, set_dtype
from dsa.generation.decode import CHUNK, next_logits
from dsa.io.command_line import Parser
from dsa.kernels.cpu.matmul_speed import is_fast
from dsa.model.config import Config
from dsa.model.moe import Gate, MoE
from dsa.model.transformer import Layer, Transformer
from dsa.record import add_options, check_free, command, origin, write

PERIOD = 1_000_003  # a prime, so that no two rows of a matrix are the same
VOCABULARY = 256  # embedding and head are there to run the model as any other, and small enough not to count
LENGTHS = (8_192, 16_384, 32_768, 65_536, 131_072)
DECODED = 32  # tokens whose time is averaged
WARM = 17  # tokens decoded before: lengths that 16 divides are compiled for apart, and one of these is such a length
ROOM = 0.7  # share of a GPU's memory that weights may take; the rest is for cache and passage


def truncated_config(layers: int, config: Config | None = None) -> Config:
    """The published sizes with so many layers; the first three have a dense feed-forward, as published."""
    config = config or Config.v32_exp()
    return config.replace(
        num_hidden_layers=layers, first_k_dense_replace=min(layers, config.first_k_dense_replace), vocab_size=VOCABULARY
    )


def build(config: Config, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Transformer:
    """Make a config's model with random weights, norms at one, in place on the device."""
    with torch.device("meta"):
        model = Transformer(config)
    set_dtype(model, dtype)
    model.to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.rand(PERIOD, generator=generator) * 2 - 1).to(device)  # uniform in -1 ... 1
    for name, tensor in model.state_dict(keep_vars=True).items():
        _fill(name, tensor, numbers)
    for module in model.modules():
        if isinstance(module, Gate):
            module.load.zero_()
        elif isinstance(module, MoE):
            module.pack()
    return model


def load(model: Transformer, folder: Path) -> Transformer:
    """Put a folder's weights into its first layers, FP8 expanded on the way. CheckpointError if any is missing."""
    stored = index.list_tensors(folder)
    target = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("model.layers.")}
    mine = {name: tensor for name, tensor in stored.items() if name.removesuffix(index.SCALE_SUFFIX) in target}
    index.check_tensors(mine, {name: tuple(tensor.shape) for name, tensor in target.items()}, folder)
    load_tensors(target, mine, f"loading {folder.name}")
    return model


def _fill(name: str, tensor: Tensor, numbers: Tensor) -> None:
    """Matrices: the numbers over and over, scaled to (3 * inputs)^-0.5; norms 1; biases 0."""
    if tensor.ndim < 2:
        tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    scaled = (numbers / tensor.shape[1] ** 0.5).to(tensor.dtype)
    for part in tensor.view(-1).split(len(scaled)):
        part.copy_(scaled[: len(part)])


def layer_bytes(config: Config, number: int, dtype: torch.dtype) -> int:
    """What one layer's weights take."""
    with torch.device("meta"):
        return dtype.itemsize * sum(p.numel() for p in Layer(config, number).parameters())


def layers_that_fit(memory: float, dtype: torch.dtype, config: Config | None = None) -> int:
    """How many first layers take at most ROOM of so many bytes; at least one."""
    config = config or Config.v32_exp()
    dense = layer_bytes(config, 0, dtype)
    experts = layer_bytes(config, config.first_k_dense_replace, dtype)
    room, first = ROOM * memory, config.first_k_dense_replace
    found = int(room // dense) if room < first * dense else first + int((room - first * dense) // experts)
    return max(1, min(found, config.num_hidden_layers))


def quick_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Choose bf16 on GPUs, and on processors that multiply it clearly faster than fp32."""
    return torch.bfloat16 if torch.device(device).type != "cpu" or is_fast(torch.bfloat16) else torch.float32


class Run:
    """One sequence on its way through the model, and the stopwatch."""

    def __init__(self, model: Transformer, attention: str, capacity: int):
        self.model, self.device = model, model.model.embed_tokens.weight.device
        model.attention = attention
        self.cache = model.new_cache(1, capacity)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(VOCABULARY, (1, CHUNK), generator=generator).to(self.device)

    def seconds(self, counts: Sequence[int]) -> float:
        """Wall-clock seconds of reading so many tokens after each other, each count in one pass."""
        return wall_seconds(
            lambda: [next_logits(self.model, self.tokens[:, :count], self.cache) for count in counts], self.device
        )


def measure(model: Transformer, attention: str, length: int, decoded: int = DECODED) -> dict[str, Any]:
    """Prefill `length` tokens in chunks, then decode: seconds, tokens per second, bytes."""
    run = Run(model, attention, length + decoded + 2)
    on_gpu = run.device.type == "cuda"
    if on_gpu:  # kernels are compiled and tiles chosen for each class of lengths on the way: all of it once before
        Run(model, attention, length + WARM).seconds([*_chunks(length), *[1] * WARM])
        torch.cuda.reset_peak_memory_stats(run.device)
    seconds = run.seconds(_chunks(length))
    run.seconds([1])  # the first token of a new shape sets things up
    decode = run.seconds([1] * decoded) / decoded
    return {
        "attention": attention,
        "length": length,
        "prefill_seconds": round(seconds, 4),
        "prefill_tokens_per_second": round(length / seconds, 1),
        "decode_seconds_per_token": round(decode, 6),
        "decode_tokens_per_second": round(1 / decode, 2),
        "peak_bytes": torch.cuda.max_memory_allocated(run.device) if on_gpu else None,
    }


def _chunks(length: int) -> list[int]:
    return [CHUNK] * (length // CHUNK) + ([length % CHUNK] if length % CHUNK else [])


def rows(model: Transformer, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Every length, dense and sparse; a length that memory refuses is said to be so, and longer ones are left out."""
    for attention in ("dense", "sparse"):
        measure(model, attention, min(lengths), decoded=2)  # warms up
        for length in tqdm(sorted(lengths), desc=attention):
            try:
                yield measure(model, attention, length)
            except torch.OutOfMemoryError:
                yield {"attention": attention, "length": length, "out_of_memory": True}
                break


def record(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """Build, measure, and say what it was measured on."""
    device = torch.device(arguments.device)
    on_gpu, dtype = device.type == "cuda", torch.bfloat16
    machine = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()}, processor"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 8e9
    published = index.read_config(arguments.folder) if arguments.folder else None
    config = truncated_config(arguments.layers or layers_that_fit(memory, dtype, published), published)
    model = build(config, dtype, device)
    if arguments.folder:
        load(model, arguments.folder)
    held = sum(p.nbytes for p in model.parameters())
    return {
        **origin(command, machine, cuda=torch.version.cuda),
        "weights": f"{f'of {arguments.folder.name}' if arguments.folder else 'random'}, bf16",
        "layers": config.num_hidden_layers, "dense_layers": config.first_k_dense_replace,
        "parameters": sum(p.numel() for p in model.parameters()), "weight_bytes": held,
        "top_k": config.index_topk, "chunk": CHUNK, "batch": 1,
        "runs": list(rows(model, arguments.lengths)),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = Parser("dsa bench full-width", description="Measure layers of true width.")
    add_options(parser)
    parser.add_argument("--folder", type=Path, help="take the first layers of this model instead of random ones")
    parser.add_argument("--layers", type=int, help="how many; by default as many as fit")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="L", help="contexts in tokens")
    parser.add_argument("--device", default="cuda", help="cuda (the default), or cpu with few and short --lengths")
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no GPU is visible to torch: install its CUDA build, or give --device cpu --lengths 256")
    try:
        check_free(arguments)
        found = record(arguments, command(parser.prog, given))
    except (ValueError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    write(arguments.out, found)
    print(f"made {arguments.out}")


if __name__ == "__main__":
    main()
