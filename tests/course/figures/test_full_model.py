"""Chapter 10: the panel over its grid and against `serving_fit`, balancing, and the record that may not be there."""

import matplotlib.pyplot as plt
import pytest
import torch

from course.figures import full_model
from course.ui.panel import Choice, Panel
from dsa.analysis.serving_fit import GPUS, fit
from dsa.model.config import Config
from dsa.model.moe import Gate
from project import DATA

REAL = Config.v32_exp()
CONTROLS = {
    "gpu": Choice("GPU", list(GPUS), "H200 141 GB"),
    "ranks": Choice("how many", [1, 4, 8, 16], 8),
    "context": Choice("context, K", [8, 32, 128], 128),
    "batch": Choice("sequences", [1, 32], 1),
    "precision": Choice("precision", list(full_model.PRECISIONS), "FP8, as published"),
}


def test_the_panel_draws_everywhere():
    panel = Panel(full_model.draw_fit(REAL), **CONTROLS)
    for values in panel.grid():
        fig, sentence = panel.draw(**values)
        found = fit(REAL, GPUS[values["gpu"]], values["ranks"], 1024 * values["context"], values["batch"],
                    full_model.PRECISIONS[values["precision"]])  # fmt: skip
        title = fig.axes[0].get_title() or fig.axes[0].get_title("left")
        assert (title == "fits") == ("it fits" in sentence) == found.fits
        assert f"{found.weights / 1e9:.0f} GB of weights" in sentence
        assert f"{1 / found.decode_seconds:.0f} tokens/s" in sentence
        plt.close(fig)


@pytest.mark.parametrize("change", [{"gpu": "abacus"}, {"precision": "fp3"}, {"ranks": 3}, {"context": 999}])
def test_mistakes_are_sentences(change):
    with pytest.raises(ValueError, match=r"unknown|cannot share|reads 1 to"):
        full_model.draw_fit(REAL)(**({"gpu": "H200 141 GB", "ranks": 8, "context": 8, "batch": 1,
                                      "precision": "bf16"} | change))  # fmt: skip


def gate(E=16):
    torch.manual_seed(0)
    return Gate(REAL.replace(hidden_size=32, n_routed_experts=E, num_experts_per_tok=2, n_group=1, topk_group=1))


def test_balancing_evens_the_load_and_standing_still_does_not():
    tokens = full_model.skewed_tokens(2000, 32, skew=0.6)
    still, moved = (full_model.balance_over_steps(gate(), tokens, 150, 200, speed) for speed in (0.0, 0.01))
    last = [sum(full_model.imbalance(load) for load in loads[-20:]) / 20 for loads in (still, moved)]
    assert last[0] > 2 and last[1] < 1.6 and all(int(load.sum()) == 400 for load in moved)
    assert full_model.imbalance(torch.tensor([3, 3, 3])) == 1 and full_model.imbalance(torch.tensor([4, 0])) == 2


def test_what_the_command_writes_can_be_had_in_a_cell():
    assert full_model.run_generation(str(DATA / "sparse"), "def ", 1).startswith("def ")


def test_without_a_record_a_sentence_says_how_to_make_one(tmp_path):
    assert full_model.read_record(tmp_path / "none.json") is None
    assert full_model.RECORD_COMMAND in full_model.draw_record(None)


def test_a_record_is_drawn_with_its_origin():
    run = {"prefill_seconds": 2.0, "decode_seconds_per_token": 0.01, "peak_bytes": 9 * 10**10}
    runs = [run | {"attention": kind, "length": n} for kind in ("dense", "sparse") for n in (8192, 131_072)]
    runs[1] = {"attention": "dense", "length": 131_072, "out_of_memory": True}
    record = {"layers": 7, "machine": "a GPU", "date": "2026-01-01", "weights": "random, bf16", "runs": runs}
    fig, words = full_model.draw_record(record)
    assert "7 layers of true width on a GPU, 2026-01-01, random, bf16" in words
    assert "dense, 8K tokens: read in 2.0 s, then 10.0 ms a token, 90 GB" in words and "sparse, 128K" in words
    assert [len(line.get_xdata()) for line in fig.axes[0].lines] == [1, 2]
    plt.close(fig)


def test_balance_is_said_for_the_last_twenty_steps():
    fig, words = full_model.draw_balance({0.0: [9.0] * 5 + [3.0] * 20, 0.01: [1.5] * 25})
    assert words.endswith("speed 0: 3.0; speed 0.01: 1.5.") and len(fig.axes[0].lines) == 3
    plt.close(fig)


def test_loads_are_said_by_their_ends():
    fig, words = full_model.draw_loads({"no bias": torch.tensor([0.25, 1.0, 1.75])})
    assert fig.axes[0].lines[0].get_ydata().tolist() == [0.25, 1.0, 1.75] and words.endswith("no bias 0.2 and 1.8.")
    plt.close(fig)


def test_parts_stand_beside_what_is_used_of_them():
    fig, words = full_model.draw_parts({"a": 8.0, "b": 1.0}, {"a": 0.25, "b": 1.0})
    assert [bar.get_width() for bar in fig.axes[0].patches] == [1.0, 8.0, 1.0, 0.25], "from below"
    assert words.endswith("a 8.00 (0.25), b 1.00 (1.00).")
    plt.close(fig)


def test_split_by_heads_the_weights_fall_and_the_cache_does_not():
    numbers = [1, 8]
    plans = [fit(REAL, GPUS["H200 141 GB"], n, 131_072, 4, "deployed") for n in numbers]
    fig, words = full_model.draw_split(numbers, plans)
    weights, cache = (list(line.get_ydata()) for line in fig.axes[0].lines[:2])
    assert weights[0] > 5 * weights[1] and cache[0] == cache[1] == plans[0].cache / 1e9
    assert f"weights {weights[0]:.0f} to {weights[1]:.0f} GB, cache {cache[0]:.0f} to {cache[1]:.0f} GB" in words
    assert {line.get_linestyle() for line in fig.axes[0].lines[:2]} == {"-."}
    plt.close(fig)


def test_a_speedup_is_dense_over_sparse():
    fig, words = full_model.draw_speedup([1, 2], {"dense": [6.0, 3.0], "sparse": [2.0, 2.0]})
    assert words.endswith("by GPUs: 1: 3.0; 2: 1.5.")
    assert [list(line.get_ydata()) for line in fig.axes[0].lines] == [[6.0, 3.0], [2.0, 2.0]]
    plt.close(fig)
