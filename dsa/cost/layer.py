"""One layer's attention at the true size, on the processor at hand: seconds of one token, dense and sparse.

No laptop holds the model, but any runs one layer of it, and lengths, not layers, are the question. Random numbers do:
time does not depend on what is attended to. What is left out of both kinds alike are the products with weights, which
do not depend on length.

Decoding is one query. Prefill is measured on the last block of a prompt: for dense attention `BLOCK` queries in one of
the 128 heads, since all heads' keys and values at 128 Ki would take 20 GB and heads do the same work; for sparse
attention `FEW` queries, with all heads. (Dense attention wants large blocks: with 256 queries it is up to 1.5 times
slower, which would flatter sparse.) What is counted is CPU time of one thread, so that a busy machine does little harm;
medians, after one run to warm up.

    python -m dsa.cost.layer --out data/measurements/cpu_layer.json
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor

from dsa.cost.roofline import PHASES
from dsa.kernels import ops
from dsa.model.config import Config

BLOCK, HEADS, FEW = 1024, 1, 16
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
Call = Callable[[], Tensor]


def sparse_call(config: Config, keys: int, queries: int, seed: int = 0) -> Call:
    """Score `keys` keys for the last `queries` queries, choose K of them, attend to these: -> (1, T, H, C)."""
    random = _random(seed)
    c, H = config, config.num_attention_heads
    J, W, K = c.index_n_heads or 0, c.index_head_dim or 0, c.index_topk or 0
    wide = c.kv_lora_rank + c.qk_rope_head_dim
    q, kv = random(1, queries, H, wide), random(1, keys, wide)  # (B, T, H, C + R), (B, S, C + R)
    index_q, index_k, w = random(1, queries, J, W), random(1, keys, W), random(1, queries, J)

    def call() -> Tensor:
        chosen = ops.index_topk(index_q, index_k, w, K)  # (B, T, K)
        return ops.sparse_attention(q, kv, chosen, wide**-0.5, c.kv_lora_rank)

    return call


def dense_call(config: Config, phase: str, keys: int, queries: int, heads: int, seed: int = 0) -> Call:
    """Attend to all keys with `heads` heads: MQA on the latents in "decode", MHA expanded in "prefill"."""
    random, c = _random(seed), config
    if phase == "decode":
        wide = c.kv_lora_rank + c.qk_rope_head_dim
        q, k = random(1, queries, heads, wide), random(1, keys, 1, wide)
        return lambda: ops.dense_attention(q, k, k, wide**-0.5)
    wide = c.qk_nope_head_dim + c.qk_rope_head_dim
    q, k = random(1, queries, heads, wide), random(1, keys, heads, wide)
    v = random(1, keys, heads, c.v_head_dim)
    return lambda: ops.dense_attention(q, k, v, wide**-0.5)


def token_seconds(config: Config, phase: str, keys: int, repeats: int = 3) -> tuple[float, float]:
    """CPU seconds of one token that sees `keys` keys in one layer: (dense, sparse)."""
    if keys < 64:
        raise ValueError(f"keys={keys}: a block needs room before it, so give 64 or more")
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r} is unknown: use one of {', '.join(PHASES)}")
    all_heads = config.num_attention_heads
    queries, few, heads = (1, 1, all_heads) if phase == "decode" else (min(BLOCK, keys // 4), FEW, HEADS)
    with one_thread(), torch.no_grad():
        dense = cpu_seconds(dense_call(config, phase, keys, queries, heads), repeats)
        sparse = cpu_seconds(sparse_call(config, keys, few), repeats)
    return dense * all_heads / heads / queries, sparse / few


def cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median CPU seconds of one call, after one more to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = process_time()
        call()
        times.append(process_time() - start)
    return median(times[1:])


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: on several, CPU time would count those that only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rows(config: Config, lengths: Sequence[int], repeats: int = 3) -> list[dict[str, Any]]:
    """Measure both phases at every length, and say each as it comes."""
    found: list[dict[str, Any]] = []
    for phase in PHASES:
        for keys in lengths:
            pair = token_seconds(config, phase, keys, repeats)
            print(f"{phase:7} {keys:>7,}: dense {pair[0]:.5f} s, sparse {pair[1]:.5f} s, {pair[0] / pair[1]:.2f}x")
            for attention, seconds in zip(("dense", "sparse"), pair, strict=True):
                found.append({"phase": phase, "attention": attention, "keys": keys, "seconds": float(f"{seconds:.4g}")})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``python -m dsa.cost.layer``."""
    parser = argparse.ArgumentParser("python -m dsa.cost.layer", description="Measure one layer at the true size.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="KEYS")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    record = {
        "command": f"python -m dsa.cost.layer --out {options.out}",
        "what": "CPU seconds of one token in one layer of DeepSeek-V3.2-Exp's size, fp32, one thread",
        "machine": _machine(),
        "load": [round(load, 1) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows(Config.v32_exp(), options.lengths, options.repeats),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def _random(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *sizes: torch.randn(sizes, generator=generator)


def _machine() -> str:
    """The processor's name as the system gives it, and that one core of it was used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or platform.machine()}, one core"


if __name__ == "__main__":
    main()
