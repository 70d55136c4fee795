"""What the benchmark times, divides, prints and writes; never how long anything took."""

import json

import pytest
import torch

from course.figures import own_machine
from dsa.analysis import flops
from dsa.bench import cpu, layer
from dsa.model.config import Config

MINI = Config.mini()
FP32 = {"dense", "sparse", "sparse int8"}
BF16 = {"dense bf16", "sparse bf16", "sparse bf16 int8"}


@pytest.fixture
def narrow(monkeypatch):
    """Say whether this processor multiplies bf16 fast."""
    return lambda is_fast: monkeypatch.setattr(cpu, "is_fast", lambda dtype: is_fast)


@pytest.mark.parametrize("shape", ["s1", "s2"])
def test_small_shapes_keep_the_real_proportions(shape):
    small, real = cpu.SHAPES[shape](), cpu.SHAPES["real"]()
    for phase, ratio in (("prefill", 5), ("decode", 17)):
        for config in (small, real):
            pair = flops.dense_pair_flops(config, phase)
            assert pair == ratio * flops.index_pair_flops(config)


def test_bf16_is_timed_where_it_is_fast_and_only_in_decoding(narrow):
    narrow(True)
    assert set(cpu.candidates(MINI, "decode", 64)) == FP32 | BF16
    assert set(cpu.candidates(MINI, "prefill", 64)) == FP32
    narrow(False)
    assert set(cpu.candidates(MINI, "decode", 64)) == FP32


@pytest.mark.parametrize("phase", flops.PHASES)
def test_the_same_numbers_in_fewer_bits_attend_alike(narrow, phase):
    narrow(True)
    with torch.no_grad():
        found = {name: call() for name, (call, _) in cpu.candidates(MINI, phase, 64).items()}
    for name in found.keys() & {"dense bf16", "sparse bf16"}:
        assert found[name].dtype == torch.bfloat16
        wide = found[name.removesuffix(" bf16")]
        assert (found[name].float() - wide).norm() < 0.3 * wide.norm()  # near-equal scores may choose another token
    assert found["sparse int8"].shape == found["sparse"].shape and found["sparse int8"].dtype == torch.float32


def test_eight_bits_reach_the_kernel_as_codes(monkeypatch):
    seen = []
    monkeypatch.setattr(layer.ops, "index_topk", lambda q, k, w, top_k: seen.append((q, k)))
    monkeypatch.setattr(layer.ops, "sparse_attention", lambda *arguments: None)
    layer.sparse_call(MINI, 64, 1, "int8")()
    [(q, k)] = seen
    assert q.dtype == torch.int8 and k.codes.dtype == torch.int8 and k.codes.shape == (1, 64, MINI.index_head_dim)


def test_a_token_is_a_share_of_its_block(narrow, monkeypatch):
    narrow(False)
    monkeypatch.setattr(cpu, "cpu_seconds", lambda calls, repeats: dict.fromkeys(calls, 12.0))
    queries, sparse_queries, heads = layer.work_per_call(MINI, "prefill", 256)
    assert (queries, heads, sparse_queries) == (64, 1, 64)
    found = cpu.token_seconds(MINI, "prefill", 256)
    assert found["dense"] == 12.0 * MINI.num_attention_heads / 64 and found["sparse"] == 12.0 / sparse_queries


def test_ratios_compare_equal_numbers():
    seconds = {"dense": 8.0, "sparse": 4.0, "sparse int8": 2.0, "dense bf16": 3.0, "sparse bf16": 1.5}
    assert cpu.ratios(seconds) == {"sparse": 2, "sparse int8": 4, "sparse bf16": 2}


def test_the_command_prints_ratios_and_writes_what_the_figure_reads(tmp_path, monkeypatch, capsys):
    asked = []

    def token_seconds(config, phase, keys, repeats):
        asked.append((phase, keys, repeats))
        return {"dense": keys / 1e6, "sparse": 0.5e-3, "sparse int8": 0.25e-3}

    monkeypatch.setattr(cpu, "token_seconds", token_seconds)
    out = tmp_path / "cpu_test.json"
    cpu.main(["--shape", "s1", "--longest", "2048", "--quick", "--out", str(out)])
    assert asked == [(phase, keys, 1) for phase in ("prefill", "decode") for keys in (1024, 2048)]
    assert "sparse 0.500 (4.10x)" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["command"].endswith(f"--shape s1 --longest 2048 --quick --out {out}") and "s1" in record["what"]
    assert record["machine"].endswith("one core") and record["date"] and set(record["versions"]) == {"python", "torch"}
    assert own_machine.layer_seconds(record)["decode"] == {1024: (1.024e-3, 0.5e-3), 2048: (2.048e-3, 0.5e-3)}


def test_what_cannot_be_measured_is_refused(capsys):
    with pytest.raises(ValueError, match="phase='both' is unknown"):
        cpu.token_seconds(MINI, "both", 64)
    with pytest.raises(SystemExit):
        cpu.main(["--longest", "8"])
    assert "--longest 8: give 1024 or more" in capsys.readouterr().err
