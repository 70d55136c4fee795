"""What was tried on the processor and did not help, timed beside what is used: a record of dead ends.

    python -m course.experiments.rejected_variants --out data/measurements/cpu_tried.json

`cpu_variants` has each idea in a few lines. All run at shape "s2" of `dsa.bench.cpu`. Counted is CPU time, and page
faults of one call when the same call has been made before.

Sparse attention is timed for 64 queries at the end of the keys, one tile of ours, from index vectors to attended
latents; dense attention for 1,024 queries of one head.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from course.experiments import cpu_variants
from dsa import record
from dsa.bench.cpu import SHAPES
from dsa.bench.timing import Call, cpu_seconds
from dsa.model.config import Config

QUERIES, BLOCK, KEYS = 64, 1024, 2**15


def sparse_layer(config: Config, queries: int, keys: int, seed: int = 0) -> cpu_variants.Sparse:
    """Random vectors for one sparse layer."""
    c, random = config, torch.Generator().manual_seed(seed)
    (J, W, K), wide = c.indexer, c.kv_lora_rank + c.qk_rope_head_dim
    sizes = (queries, c.num_attention_heads, wide), (keys, wide), (queries, J, W), (keys, W), (queries, J)
    q, kv, index_q, index_k, w = (torch.randn(1, *s, generator=random) for s in sizes)
    return cpu_variants.Sparse(q, kv, index_q, index_k, w, K, c.kv_lora_rank)


def dense_layer(config: Config, queries: int, keys: int, seed: int = 0) -> cpu_variants.Dense:
    """Random vectors for one head of a dense layer."""
    random, wide = torch.Generator().manual_seed(seed), config.qk_nope_head_dim + config.qk_rope_head_dim
    sizes = (queries, 1, wide), (keys, 1, wide), (keys, 1, config.v_head_dim)
    q, k, v = (torch.randn(1, *s, generator=random) for s in sizes)
    return cpu_variants.Dense(q, k, v)


def page_faults(call: Call) -> int | None:
    """Page faults of one call; None where the system does not count them."""
    if not find_spec("resource"):
        return None
    import resource

    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def rows(calls: Mapping[str, Call], attention: str, tokens: float, repeats: int) -> list[dict[str, Any]]:
    """One row for each call: what, its CPU seconds for one token, how many times ours, and page faults of a call."""
    seconds = cpu_seconds(calls, repeats)
    return [
        {
            "attention": attention,
            "tried": name,
            "seconds": float(f"{seconds[name] / tokens:.4g}"),
            "times": round(seconds[name] / seconds[cpu_variants.CANDIDATE], 2),
            "faults": page_faults(call),
        }
        for name, call in calls.items()
    ]


def measure(config: Config, keys: int, repeats: int) -> list[dict[str, Any]]:
    """Time everything that was tried at one length."""
    sparse, block = sparse_layer(config, QUERIES, keys), dense_layer(config, BLOCK, keys)
    several = {name: partial(attend, sparse) for name, attend in cpu_variants.SPARSE.items()}
    single = {name: partial(attend, block) for name, attend in cpu_variants.DENSE.items()}
    with torch.no_grad():
        share = BLOCK / config.num_attention_heads  # tokens with all heads
        return rows(several, "sparse", QUERIES, repeats) + rows(single, "dense", share, repeats)


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``python -m course.experiments.rejected_variants``."""
    parser = argparse.ArgumentParser(
        "python -m course.experiments.rejected_variants", description="Time what was tried and did not help."
    )
    parser.add_argument("--keys", type=int, default=KEYS)
    parser.add_argument("--repeats", type=int, default=5)
    record.add_options(parser, required=False)
    options, command = record.parse(parser, argv)
    found = measure(SHAPES["s2"](), options.keys, options.repeats)
    for row in found:
        print(
            f"{row['attention']:6} {row['tried']:26} {row['seconds'] * 1e3:8.3f} ms a token {row['times']:6.2f}x ours"
        )
    if options.out:
        what = (
            f"CPU seconds of a token that sees {options.keys} keys in one layer, shape s2, fp32; page faults of a call"
        )
        record.write(options.out, {**record.origin(command, record.processor()), "what": what, "rows": found})


if __name__ == "__main__":
    main()
