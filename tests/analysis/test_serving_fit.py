"""What fits is counted: against the weights that a real split leaves on a rank, and by hand."""

import json
from dataclasses import replace

import pytest
import torch

import dsa
import small
from dsa.analysis import memory
from dsa.analysis.flops import decode_traffic
from dsa.analysis.serving_fit import GPUS, RESERVE, fit, parameters_per_gpu, weight_bytes
from dsa.bench import full_width
from dsa.checkpoint.index import CheckpointError
from dsa.model.config import Config
from dsa.model.transformer import Transformer

REAL, H200 = Config.v32_exp(), GPUS["H200 141 GB"]


@pytest.mark.parametrize("changes", [{}, {"n_shared_experts": 0}, small.DENSE | {"q_lora_rank": None}])
def test_one_gpu_holds_every_matrix(changes):
    config = small.config(**changes)
    assert parameters_per_gpu(config, 1) == sum(p.numel() for p in Transformer(config).parameters() if p.ndim > 1)


def test_heads_experts_and_columns_are_divided_and_the_rest_is_not():
    whole = sum(m.stored * m.outputs * m.inputs for m in memory.matrices(REAL) if not m.split)
    once, eight = parameters_per_gpu(REAL, 1), parameters_per_gpu(REAL, 8)
    assert eight == pytest.approx(whole + (once - whole) / 8, abs=1)
    assert 0.85e9 < whole < 2.3e9  # indexers, routers, projections into the latents
    assert weight_bytes(REAL, "bf16", 8) == pytest.approx(2 * eight, rel=1e-9)
    assert round(weight_bytes(REAL, "deployed", 8) / 1e9) == 86


def test_uneven_experts_count_for_the_fullest():
    config = small.config(n_routed_experts=6, n_group=1, topk_group=1, first_k_dense_replace=0)
    one_expert = 3 * config.hidden_size * config.moe_intermediate_size * config.num_hidden_layers
    even = small.config(n_routed_experts=8, n_group=1, topk_group=1, first_k_dense_replace=0)
    router = 2 * config.hidden_size * config.num_hidden_layers  # two experts more to score
    # two experts are on the fullest, of 6 as of 8
    assert parameters_per_gpu(even, 4) - parameters_per_gpu(config, 4) == router
    assert parameters_per_gpu(even, 1) - parameters_per_gpu(config, 1) == router + 2 * one_expert


def test_the_cache_is_on_every_gpu_and_decides_how_many_fit():
    found = fit(REAL, H200, 8, 131_072, 4, "deployed")
    assert found.cache == 4 * 131_072 * 48_068 == 4 * found.cache_per_sequence
    assert fit(REAL, H200, 16, 131_072, 4, "deployed").cache == found.cache
    assert found.fits and found.largest_batch == (141_000_000_000 - found.weights - RESERVE) // found.cache_per_sequence
    full = fit(REAL, H200, 8, 131_072, found.largest_batch, "deployed")
    assert full.fits and not fit(REAL, H200, 8, 131_072, found.largest_batch + 1, "deployed").fits
    assert not fit(REAL, H200, 8, 8192, 1, "bf16").fits and fit(REAL, H200, 8, 8192, 1, "bf16").largest_batch == 0


def test_time_is_bytes_or_flop_whichever_takes_longer():
    slow_memory = replace(H200, bandwidth=1e9)
    one = fit(REAL, slow_memory, 1, 131_072, 1, "deployed")
    assert one.decode_seconds == pytest.approx(decode_traffic(REAL, 131_072, "sparse", "deployed").total / 1e9)
    eight = fit(REAL, slow_memory, 8, 131_072, 1, "deployed")
    q_a, kv_a, indexer, router = 1536 * 7168, 576 * 7168, 13_959_424, 256 * 7168
    each = 61 * (q_a + kv_a + indexer) + 58 * 2 * router + 61 * 131_072 * 132 + 61 * 2048 * 656  # read by every GPU
    assert eight.decode_seconds * 1e9 == pytest.approx(each + (one.decode_seconds * 1e9 - each) / 8, rel=0.01)
    slow_maths = replace(H200, bf16=1e12, fp8=1e12)
    step = fit(REAL, slow_maths, 1, 2048, 1, "bf16").decode_seconds
    flop = 2 * (36.62e9 + 0.85e9) + 61 * 2048 * (278_528 + 16_384)
    assert step == pytest.approx(flop / 1e12, rel=0.01)


def test_sparse_reading_gains_less_from_more_gpus_because_every_one_has_the_whole_indexer():
    gain = []
    for ranks in (1, 8):
        dense, sparse = (
            fit(REAL, H200, ranks, 131_072, 1, "deployed", kind).prefill_seconds for kind in ("dense", "sparse")
        )
        gain.append(dense / sparse)
    assert gain[0] > 3 and gain[1] < 1.2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3, 8192, 1), "3 GPUs cannot share 128 heads evenly"),
        ((0, 8192, 1), "0 GPUs cannot share"),
        ((8, 200_000, 1), "context=200000: the model reads 1 to 163840 tokens"),
        ((8, 8192, 0), "batch=0: there is at least one sequence"),
    ],
)
def test_what_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        fit(REAL, H200, *arguments, "deployed")


# ---- layers of true width


def test_layers_of_true_width_are_the_models_own():
    model = full_width.build(full_width.truncated_config(2, small.config()), torch.float32, "cpu")
    layers = model.model.layers
    assert [type(layer.mlp).__name__ for layer in layers] == ["FeedForward", "MoE"]
    weight = layers[0].mlp.up_proj.weight
    assert weight.std() == pytest.approx((3 * weight.shape[1]) ** -0.5, rel=0.03)
    assert len({tuple(row.tolist()) for row in weight}) == len(weight)
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm.weight" in name)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("norm.bias"))
    assert all((b == 0).all() for b in model.buffers())


def test_what_is_timed_is_the_steps_that_were_asked_for():
    model = full_width.build(full_width.truncated_config(2, small.config()), torch.float32, "cpu")
    run = full_width.Run(model, "sparse", 40)
    assert run.seconds([17, 1, 1]) > 0 and run.cache.length == 19 and model.attention == "sparse"


@torch.no_grad()
@pytest.mark.parametrize("fp8", [False, True])
def test_loaded_layers_are_the_models_own(tmp_path, fp8):
    model = small.model()
    dsa.save_pretrained(model, tmp_path, fp8=fp8)
    whole = dsa.from_pretrained(tmp_path)
    built = full_width.build(full_width.truncated_config(2, whole.config), torch.float32, "cpu")
    two = full_width.load(built, tmp_path)
    context, found = whole.context(0, 40, torch.device("cpu")), torch.randn(1, 40, whole.config.hidden_size)
    wanted = found
    for mine, theirs in zip(two.model.layers, whole.model.layers, strict=False):
        found, wanted = mine(found, context, None).hidden, theirs(wanted, context, None).hidden
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_folder_without_these_layers_is_refused(tmp_path):
    dsa.save_pretrained(small.model(sizes=small.config(num_hidden_layers=2)), tmp_path)
    model = full_width.build(full_width.truncated_config(3, small.config()), torch.float32, "cpu")
    with pytest.raises(CheckpointError, match=r"tensors are missing, first model\.layers\.2"):
        full_width.load(model, tmp_path)


def test_the_quicker_dtype_is_one_of_the_two():
    assert full_width.quick_dtype() in (torch.float32, torch.bfloat16)
    assert full_width.quick_dtype("cuda") == torch.bfloat16


def test_how_many_layers_fit():
    dense, experts = (full_width.layer_bytes(REAL, n, torch.bfloat16) for n in (0, 3))
    assert (round(dense / 1e9, 1), round(experts / 1e9)) == (1.2, 23)
    assert full_width.layers_that_fit(141e9, torch.bfloat16) == 3 + 4
    assert full_width.layers_that_fit(24e9, torch.bfloat16) == 3
    assert [full_width.layers_that_fit(size, torch.bfloat16) for size in (1e9, 4e9)] == [1, 2]
    assert full_width.layers_that_fit(1e15, torch.bfloat16) == 61


def test_the_command_records_what_the_chapter_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Config, "v32_exp", lambda: small.config())
    out = tmp_path / "run.json"
    options = ["--out", str(out), "--device", "cpu", "--layers", "2", "--lengths", "40", "24"]
    full_width.main(options)
    found = json.loads(out.read_text())
    assert [(run["attention"], run["length"]) for run in found["runs"]] == [
        ("dense", 24), ("dense", 40), ("sparse", 24), ("sparse", 40),
    ]  # fmt: skip
    assert all(run["prefill_seconds"] > 0 and run["decode_tokens_per_second"] > 0 for run in found["runs"])
    assert found["command"].startswith("dsa bench full-width --out") and found["layers"] == 2
    with pytest.raises(SystemExit, match="exists: choose another"):
        full_width.main(options)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU is visible to torch"):
            full_width.main(["--out", str(tmp_path / "never.json")])
