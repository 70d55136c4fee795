"""The benchmark beside transformers times the same thing twice: its two steps give the same logits."""

import json

import torch

from dsa.bench import beside_transformers as bench


@torch.no_grad()
def test_both_steps_predict_the_same_token_by_token():
    everything = bench.WORKBENCH.replace(index_topk=128)  # else equal scores, of which any may be kept, tell them apart
    steps = bench.candidates(everything, 60)
    for _ in range(5):
        ours, theirs = steps["dsa"](), steps["transformers"]()[:, -1]
        assert (ours - theirs).abs().max() < 2e-4 * ours.std()


def test_the_command_writes_where_the_numbers_come_from(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "CASES", {"tiny": (bench.WORKBENCH, 40)})
    bench.main(["--repeats", "1", "--out", str(tmp_path / "a.json")])
    noted = json.loads((tmp_path / "a.json").read_text())
    assert noted["command"].startswith("dsa bench beside-transformers --repeats 1")
    [row] = noted["rows"]
    assert row["ratio"] > 0 and row["dsa"] > 0 and row["transformers"] > 0
    assert "tiny" in capsys.readouterr().out
