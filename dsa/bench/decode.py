"""What one decoded token costs, dense and sparse, by length of the context.

    dsa bench decode --out decode.json

Sizes keep the real model's proportions (17 dense FLOPs in MQA mode for each of the indexer's), because ad-hoc sizes
hide the effect. The dense baselines are as fast as PyTorch makes them: on latents with the heads folded into one matrix
(what the model does), and on keys and values that were expanded and padded beforehand.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa import record
from dsa.bench.timing import cpu_seconds
from dsa.io.command_line import Parser
from dsa.kernels import ops
from dsa.model.attention import Attention, ForwardContext
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


def candidates(S: int, top_k: int) -> dict[str, Callable[[], object]]:
    """What is timed at S cached tokens, the new one included: attention alone, index alone, one layer's whole step."""
    config = sizes(top_k)
    layer = Attention(config, 0).eval()
    cache = LayerCache(config, 1, S, torch.float32, "cpu")
    assert isinstance(cache.latent, Tensor) and isinstance(cache.index_key, Tensor) and layer.indexer is not None
    cache.latent.normal_()
    cache.index_key.normal_()
    cache.index_length = S
    rope = Rope.at(config, S - 1, 1)
    x = torch.randn(1, 1, config.hidden_size)
    q, query_latent = layer.queries(x, rope)
    absorbed, shared = layer.absorb_query(q), cache.latent[:, :, None]
    k, v = layer.expand_kv(cache.latent)
    v = F.pad(v, (0, k.shape[-1] - v.shape[-1]))  # else the kernel would do it in every step
    index_q, index_k, w = layer.indexer(x, query_latent, rope, cache, S - 1)
    selected = ops.index_topk(index_q, index_k, w, top_k)
    context = ForwardContext(rope, S - 1, "dense", top_k, torch.float32)
    calls = (
        lambda: ops.dense_attention(absorbed, shared, shared, layer.scale),
        lambda: ops.dense_attention(q, k, v, layer.scale),
        lambda: ops.sparse_attention(absorbed, cache.latent, selected, layer.scale, layer.latent),
        lambda: ops.index_topk(index_q, index_k, w, top_k),
        lambda: layer(x, context, cache),
        lambda: layer(x, replace(context, attention="sparse"), cache),
    )
    return dict(zip(COLUMNS, calls, strict=True))


@torch.no_grad()
def measure(lengths=LENGTHS, top_k: int = 256, repeats: int = 15) -> dict[int, dict[str, float]]:
    """Median CPU milliseconds: length -> column -> time."""
    torch.manual_seed(0)
    found = {S: cpu_seconds(candidates(S, top_k), repeats) for S in lengths}
    return {S: {name: 1e3 * seconds for name, seconds in row.items()} for S, row in found.items()}


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


def rows(table: dict[int, dict[str, float]]) -> list[dict[str, float]]:
    """The table as it is recorded."""
    return [{"cached_tokens": S, **{name: round(ms, 4) for name, ms in row.items()}} for S, row in table.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = Parser("dsa bench decode", description="Time one decoded token by length.")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="L", help="cached tokens")
    parser.add_argument("--repeats", type=int, default=15)
    record.add_options(parser, required=False)
    options, command = record.parse(parser, argv)
    table = measure(options.lengths, repeats=options.repeats)
    print(words(table))
    if options.out:
        about = record.origin(command, record.processor())
        record.write(options.out, about | {"what": "CPU milliseconds, medians; top-k 256", "rows": rows(table)})


if __name__ == "__main__":
    main()
