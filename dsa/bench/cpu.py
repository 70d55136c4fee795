"""What a token costs on this machine, dense and sparse, by length: a table with ratios, and a record of it.

    dsa bench cpu --shape s2 --longest 65536 --out data/measurements/cpu_s2.json

Three shapes. "real" is one layer of DeepSeek-V3.2-Exp; "s1" and "s2" are small layers that keep its proportions, so
that they tell the same story sooner: dense attention multiplies 5 times as much for a pair as the indexer in MHA mode,
H (N + R + V) = 5 J W, and 17 times in MQA mode, H (2 C + R) = 17 J W. Sizes chosen freely hide or flatter the effect.

How one token is timed, and against which dense attention, is told in `layer`. Candidates are dense and sparse in fp32,
sparse with index vectors in int8, and for decoding the same in bf16 where this processor multiplies bf16 fast.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dsa import record
from dsa.analysis.flops import PHASES
from dsa.bench.layer import check_measurable, dense_call, sparse_call, work_per_call
from dsa.bench.timing import cpu_seconds
from dsa.io.command_line import Parser, count
from dsa.kernels.cpu.matmul_speed import is_fast
from dsa.model.config import Config

SHAPES: Mapping[str, Callable[[], Config]] = MappingProxyType(
    {
        "s1": lambda: _small(
            heads=8, nope=32, rotary=16, value=32, latent=128, index_heads=4, index_width=32, top_k=64
        ),
        "s2": lambda: _small(
            heads=16, nope=64, rotary=32, value=64, latent=256, index_heads=8, index_width=64, top_k=256
        ),
        "real": Config.v32_exp,
    }
)
SHORTEST, LONGEST, QUICK = 1024, {"s1": 2**16, "s2": 2**16, "real": 2**17}, 2**13
BASELINES = MappingProxyType(
    {"sparse": "dense", "sparse int8": "dense", "sparse bf16": "dense bf16", "sparse bf16 int8": "dense bf16"}
)


def _small(
    heads: int, nope: int, rotary: int, value: int, latent: int, index_heads: int, index_width: int, top_k: int
) -> Config:
    return replace(
        Config.mini(), num_attention_heads=heads, qk_nope_head_dim=nope, qk_rope_head_dim=rotary, v_head_dim=value,
        kv_lora_rank=latent, index_n_heads=index_heads, index_head_dim=index_width, index_topk=top_k,
        max_position_embeddings=2**17,
    )  # fmt: skip


def candidates(config: Config, phase: str, keys: int) -> dict[str, tuple[Callable[[], Tensor], float]]:
    """What is timed at one length: name -> a call, and how many tokens of one layer it does."""
    queries, sparse_queries, heads = work_per_call(config, phase, keys)
    share = queries * heads / config.num_attention_heads
    found = {
        "dense": (dense_call(config, phase, keys, queries, heads), share),
        "sparse": (sparse_call(config, keys, sparse_queries), sparse_queries),
        "sparse int8": (sparse_call(config, keys, sparse_queries, "int8"), sparse_queries),
    }
    if phase == "decode" and is_fast(torch.bfloat16):
        found |= {
            "dense bf16": (dense_call(config, phase, keys, queries, heads, torch.bfloat16), share),
            "sparse bf16": (sparse_call(config, keys, sparse_queries, dtype=torch.bfloat16), sparse_queries),
            "sparse bf16 int8": (sparse_call(config, keys, sparse_queries, "int8", torch.bfloat16), sparse_queries),
        }
    return found


def token_seconds(config: Config, phase: str, keys: int, repeats: int = 5) -> dict[str, float]:
    """Median CPU seconds of one token that sees `keys` keys in one layer, by candidate."""
    check_measurable(phase, keys)
    with torch.no_grad():
        calls = candidates(config, phase, keys)
        found = cpu_seconds({name: call for name, (call, _) in calls.items()}, repeats)
    return {name: seconds / calls[name][1] for name, seconds in found.items()}


def ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    """How many times as long dense attention takes as each sparse candidate, in the same numbers."""
    return {name: seconds[dense] / seconds[name] for name, dense in BASELINES.items() if name in seconds}


def measure(config: Config, lengths: Sequence[int], repeats: int) -> dict[tuple[str, int], dict[str, float]]:
    """Measure both phases at every length: (phase, keys) -> candidate -> seconds. A bar shows how far it is."""
    places = [(phase, keys) for phase in PHASES for keys in lengths]
    found = {}
    for phase, keys in (bar := tqdm(places, disable=not sys.stderr.isatty(), unit="length")):
        bar.set_description(f"{phase} {keys:,}")
        found[phase, keys] = token_seconds(config, phase, keys, repeats)
    return found


def table(found: Mapping[tuple[str, int], Mapping[str, float]]) -> str:
    """Milliseconds a token, and behind each sparse candidate how many times as long dense attention takes."""
    lines = []
    for phase in PHASES:
        lines.append(f"{phase}, CPU milliseconds a token and layer (dense over sparse)")
        for (where, keys), seconds in found.items():
            if where == phase:
                gain = ratios(seconds)
                cells = [f"{n} {s * 1e3:.3f}" + (f" ({gain[n]:.2f}x)" if n in gain else "") for n, s in seconds.items()]
                lines.append(f"{keys:>9,}  " + "  ".join(cells))
    return "\n".join(lines)


def provenance(found: Mapping[tuple[str, int], Mapping[str, float]], command: str, what: str) -> dict[str, Any]:
    """The measurement and where it comes from."""
    return {
        **record.origin(command, record.processor()),
        "what": what,
        "fast": {str(kind).removeprefix("torch."): is_fast(kind) for kind in (torch.int8, torch.bfloat16)},
        "load": [round(load, 1) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "rows": [
            {"phase": phase, "attention": name, "keys": keys, "seconds": float(f"{value:.4g}")}
            for (phase, keys), seconds in found.items()
            for name, value in seconds.items()
        ],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command `dsa bench cpu`."""
    parser = Parser("dsa bench cpu", description="Time one layer's attention by length.")
    parser.add_argument("--shape", choices=list(SHAPES), default="s2", help="real takes minutes and 2 GB")
    parser.add_argument("--top-k", type=count, metavar="K", help="keys that each query keeps (the shape's own K)")
    parser.add_argument("--longest", type=count, metavar="N", help=f"most keys; lengths double from {SHORTEST:,}")
    parser.add_argument("--repeats", type=count, metavar="N", default=5, help="samples of which the median counts (5)")
    parser.add_argument("--quick", action="store_true", help=f"one repeat, and at most {QUICK:,} keys")
    record.add_options(parser, required=False)
    options, command = record.parse(parser, argv)
    longest = options.longest or (QUICK if options.quick else LONGEST[options.shape])
    if longest < SHORTEST:
        parser.error(f"--longest {longest}: give {SHORTEST} or more")
    lengths = [SHORTEST << n for n in range((longest // SHORTEST).bit_length())]
    config = SHAPES[options.shape]()
    config = replace(config, index_topk=options.top_k or config.index_topk)
    found = measure(config, lengths, 1 if options.quick else options.repeats)
    print(table(found))
    if options.out:
        shape = f"shape {options.shape} with K {config.index_topk}"
        what = f"CPU seconds of one token in one layer, {shape}, fp32 where nothing else is said"
        record.write(options.out, provenance(found, command, what))


if __name__ == "__main__":
    main()
