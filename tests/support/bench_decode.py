"""What one decoded token costs, dense and sparse, by length of the context.

    python tests/support/bench_decode.py --out decode.json

Sizes keep the real model's proportions (17 dense FLOPs in MQA mode for each of the indexer's), because ad-hoc sizes
hide the effect. Everything runs in one process on one thread, all contenders in turn within each repeat, so that a
noisy machine disturbs them alike; medians of CPU time are shown. The dense baselines are as fast as this library makes
them: on latents with the heads folded into one matrix (what the model does), and on keys and values that were expanded
and padded beforehand.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F

from dsa.kernels import ops
from dsa.model.attention import Attention, Step
from dsa.model.cache import LayerCache
from dsa.model.config import Config
from dsa.model.rope import Rope

LENGTHS = (1024, 2048, 4096, 8192, 16384)
COLUMNS = ("dense latents", "dense expanded", "sparse", "index", "layer dense", "layer sparse")


def sizes(top_k: int) -> Config:
    """H16, N64, R32, V64, C256, indexer 8 x 64."""
    return replace(
        Config.mini(), hidden_size=1024, num_attention_heads=16, q_lora_rank=384, kv_lora_rank=256, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, index_n_heads=8, index_head_dim=64, index_topk=top_k,
        max_position_embeddings=2**17,
    )  # fmt: skip


def contenders(S: int, top_k: int) -> dict[str, Callable[[], object]]:
    """What is timed at S cached tokens, the new one included: attention alone, index alone, one layer's whole step."""
    config = sizes(top_k)
    layer = Attention(config, 0).eval()
    cache = LayerCache(config, 1, S, torch.float32, "cpu")
    cache.latent.normal_()
    cache.index_key.normal_()
    cache.index_length = S
    rope = Rope.at(config, S - 1, 1)
    x = torch.randn(1, 1, config.hidden_size)
    q, query_latent = layer.queries(x, rope)
    absorbed, shared = layer.absorb(q), cache.latent[:, :, None]
    k, v = layer.expand(cache.latent)
    v = F.pad(v, (0, k.shape[-1] - v.shape[-1]))  # else the kernel would do it in every step
    index = layer.indexer(x, query_latent, rope, cache, S - 1)
    selected = ops.index_topk(*index, top_k)
    step = Step(rope, S - 1, "dense", top_k, torch.float32)
    calls = (
        lambda: ops.dense_attention(absorbed, shared, shared, layer.scale),
        lambda: ops.dense_attention(q, k, v, layer.scale),
        lambda: ops.sparse_attention(absorbed, cache.latent, selected, layer.scale, layer.latent),
        lambda: ops.index_topk(*index, top_k),
        lambda: layer(x, step, cache),
        lambda: layer(x, replace(step, attention="sparse"), cache),
    )
    return dict(zip(COLUMNS, calls, strict=True))


@torch.no_grad()
def measure(lengths=LENGTHS, top_k: int = 256, repeats: int = 15) -> dict[int, dict[str, float]]:
    """Median CPU milliseconds: length -> column -> time."""
    torch.manual_seed(0)
    table = {}
    for S in lengths:
        calls = contenders(S, top_k)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(repeats + 2):
            for name, call in calls.items():
                begin = time.process_time()
                call()
                if repeat >= 2:  # two rounds to warm up
                    times[name].append(1e3 * (time.process_time() - begin))
        table[S] = {name: statistics.median(found) for name, found in times.items()}
    return table


def words(table: dict[int, dict[str, float]]) -> str:
    """The table and what it says."""
    lines = ["cached tokens " + "".join(f"{name:>16}" for name in COLUMNS) + "   (CPU ms)"]
    lines += [f"{S:>13} " + "".join(f"{row[name]:16.2f}" for name in COLUMNS) for S, row in table.items()]
    short, long = min(table), max(table)
    growth = {name: table[long][name] / table[short][name] for name in COLUMNS}
    best = min(table[long]["dense latents"], table[long]["dense expanded"])
    chosen = table[long]["sparse"] + table[long]["index"]
    lines += [
        "",
        f"From {short} to {long} tokens dense attention on latents grows {growth['dense latents']:.1f} times, sparse "
        f"attention {growth['sparse']:.1f} times, the indexer {growth['index']:.1f} times. At {long} the better dense "
        f"one takes {best / table[long]['sparse']:.1f} times as long as sparse attention, {best / chosen:.1f} times as "
        f"long as indexer and sparse attention, and the whole layer "
        f"{table[long]['layer dense'] / table[long]['layer sparse']:.1f} times as long.",
    ]
    return "\n".join(lines)


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def record(table: dict[int, dict[str, float]], top_k: int, repeats: int) -> dict:
    """The measurement with where it comes from."""
    return {
        "command": "python tests/support/bench_decode.py", "date": datetime.now(UTC).date().isoformat(),
        "hardware": processor(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "unit": "CPU milliseconds, median", "repeats": repeats, "top_k": top_k,
        "rows": [{"cached_tokens": S, **{name: round(ms, 4) for name, ms in row.items()}} for S, row in table.items()],
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the numbers, with hardware and versions, as JSON")
    parser.add_argument("--repeats", type=int, default=15)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    table = measure(repeats=chosen.repeats)
    print(words(table))
    if chosen.out:
        chosen.out.write_text(json.dumps(record(table, 256, chosen.repeats), indent=2) + "\n")


if __name__ == "__main__":
    main()
