"""The decode benchmark runs, times every candidate, and compares like with like."""

import json

import torch

from dsa.bench import decode


def test_it_measures_every_column_and_says_so():
    table = decode.measure(lengths=(32, 64), top_k=8, repeats=1)
    assert list(table) == [32, 64] and all(ms > 0 for row in table.values() for ms in row.values())
    assert "From 32 to 64 tokens" in decode.words(table)
    assert decode.rows(table)[1]["cached_tokens"] == 64


def test_the_command_writes_where_the_numbers_come_from(tmp_path, capsys):
    decode.main(["--lengths", "32", "64", "--repeats", "1", "--out", str(tmp_path / "a.json")])
    noted = json.loads((tmp_path / "a.json").read_text())
    assert noted["command"].startswith("dsa bench decode --lengths 32 64")
    assert noted["machine"] and noted["versions"]["torch"] == torch.__version__ and len(noted["rows"]) == 2
    assert "From 32 to 64 tokens" in capsys.readouterr().out


@torch.no_grad()
def test_its_candidates_compute_the_same():
    """Both dense ones, and the sparse one with all keys selected."""
    torch.manual_seed(0)
    calls = decode.candidates(64, 64)
    layer = decode.Attention(decode.sizes(64), 0)  # for its sizes only
    latents, sparse = calls["dense latents"]()[..., : layer.latent], calls["sparse"]()
    assert torch.allclose(latents, sparse, atol=1e-4)
    assert torch.allclose(calls["layer dense"]()[0], calls["layer sparse"]()[0], atol=1e-4)
