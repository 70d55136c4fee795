"""The decode benchmark runs, times every contender, and compares like with like."""

import json

import bench_decode
import torch


def test_it_measures_every_column_and_says_so():
    table = bench_decode.measure(lengths=(32, 64), top_k=8, repeats=1)
    assert list(table) == [32, 64] and all(ms > 0 for row in table.values() for ms in row.values())
    assert "From 32 to 64 tokens" in bench_decode.words(table)
    noted = json.loads(json.dumps(bench_decode.record(table, 8, 1)))
    assert noted["hardware"] and noted["torch"] == torch.__version__ and noted["rows"][1]["cached_tokens"] == 64


@torch.no_grad()
def test_its_contenders_compute_the_same():
    """Both dense ones, and the sparse one with all keys selected."""
    torch.manual_seed(0)
    calls = bench_decode.contenders(64, 64)
    layer = bench_decode.Attention(bench_decode.sizes(64), 0)  # for its sizes only
    latents, sparse = calls["dense latents"]()[..., : layer.latent], calls["sparse"]()
    assert torch.allclose(latents, sparse, atol=1e-4)
    assert torch.allclose(calls["layer dense"]()[0], calls["layer sparse"]()[0], atol=1e-4)
