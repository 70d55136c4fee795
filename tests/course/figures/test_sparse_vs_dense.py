"""The panel of chapter 06 charges what the model pays, draws everywhere, and the recorded tables are read right."""

import math

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F

from course.figures import sparse_vs_dense
from course.ui.panel import Choice, Panel, Slider, Text
from dsa.analysis.published import Benchmark
from dsa.datasets import byte_tokenizer
from tiny_training import tiny

STORY = "The lamp had to be lit at dusk, été comme hiver."


@pytest.fixture(scope="module")
def models():
    return {"a": tiny(0), "b": tiny(1)}


def test_bits_are_the_cross_entropy(models):
    ids = byte_tokenizer.encode(STORY)
    found = sparse_vs_dense.bits_per_token(models["a"], ids, "window", 3)
    model = tiny(0).eval()
    model.attention, model.top_k = "window", 3
    with torch.no_grad():
        nats = F.cross_entropy(model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]), reduction="none")
    assert torch.allclose(found, nats / math.log(2), atol=1e-5)


def test_the_sentence_divides_by_raw_bytes(models):
    _, words = sparse_vs_dense.draw_extra_bits(models)(STORY, 2, "indexer")
    ids = byte_tokenizer.encode(STORY)
    raw = len(STORY.encode()) - int(byte_tokenizer.byte_count(torch.tensor(ids[:1])))
    full, few = (
        float(sparse_vs_dense.bits_per_token(models["b"], ids, *how).sum()) / raw
        for how in (("dense", 64), ("sparse", 2))
    )
    assert f"b: {full:.2f} with all keys, {few:.2f} with 2" in words
    assert words.startswith(f"{len(ids)} tokens, K = 2, chooser: indexer")
    plt.close("all")


def test_with_all_keys_nothing_is_paid(models):
    fig, _ = sparse_vs_dense.draw_extra_bits(models)(STORY, 64, "oracle")
    for line in fig.axes[0].lines[:2]:
        assert abs(line.get_ydata()).max() < 1e-3
    plt.close("all")


def test_it_draws_everywhere(models):
    panel = Panel(
        sparse_vs_dense.draw_extra_bits(models),
        text=Text("your text", STORY),
        top_k=Slider("top-k", 1, 64, 2),
        who=Choice("chosen by", list(sparse_vs_dense.CHOOSERS), "indexer"),
    )
    for values in panel.grid(60):
        fig, words = panel.draw(**values)
        assert f"K = {values['top_k']}, chooser: {values['who']}." in words and len(fig.axes[0].lines) == 3
        plt.close(fig)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"top_k": 65}, "top-k = 65 lies outside 1 to 64"),
        ({"who": "nobody"}, "chooser 'nobody' is unknown: use one of indexer"),
        ({"text": "x"}, "the text has 1 of at least 2 tokens"),
    ],
)
def test_a_readers_mistake_is_a_sentence(models, wrong, says):
    with pytest.raises(ValueError, match=says):
        sparse_vs_dense.draw_extra_bits(models)(**({"text": STORY, "top_k": 2, "who": "indexer"} | wrong))


def test_a_line_of_a_sweep():
    rows = [
        {"model": m, "attention": "sparse", "top_k": k, "seed": s, "bits": k + s / 10}
        for s in (0, 1) for k in (4, 2) for m in ("x", "y")
    ]  # fmt: skip
    assert sparse_vs_dense.recorded_curve(rows, "x", "sparse", "bits") == {2: [2.0, 2.1], 4: [4.0, 4.1]}
    with pytest.raises(ValueError, match="no model 'z' with attention 'sparse'"):
        sparse_vs_dense.recorded_curve(rows, "z", "sparse", "bits")
    assert sparse_vs_dense.recorded_curve(rows, "y", "sparse", "bits")[2] == [2.0, 2.1]


def test_a_sweep_draws_means_with_their_reach_and_says_them():
    rows = [
        {"model": "x", "attention": who, "top_k": k, "bits": bits, "recall": 0.5}
        for who, k, bits in (("sparse", 2, 1.0), ("sparse", 2, 3.0), ("sparse", 4, 5.0), ("oracle", 2, 1.5))
    ]
    fig, words = sparse_vs_dense.draw_sweep(rows, {"a": ("x", "sparse"), "b": ("x", "oracle")}, (2,), most=4)
    line = fig.axes[0].lines[0]
    assert line.get_ydata().tolist() == [2.0, 5.0] and line.get_linestyle() == "--"
    assert fig.axes[0].get_ylim()[1] == 4 and "a: K 2 2.00 bits and 50%; b: K 2 1.50 bits and 50%." in words
    plt.close(fig)


def test_a_norm_is_that_of_one_long_vector():
    found = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([4.0]), "c": torch.ones(9)}
    assert sparse_vs_dense.gradient_norm(found, ["a", "b"]) == 5


def test_what_a_twin_is_behind_stands_in_the_middle_of_its_steps():
    fig, words = sparse_vs_dense.draw_loss_gap({"dense": [1.0, 0.5], "few": [1.5, 0.6]}, "dense", steps=20)
    [line] = fig.axes[0].lines
    assert list(line.get_xdata()) == [5, 15] and list(line.get_ydata()) == pytest.approx([0.5, 0.1])
    assert words.endswith("few 0.50 at first, 0.10 at last.")
    plt.close(fig)


def test_held_attention_is_drawn_layer_by_layer():
    fig, words = sparse_vs_dense.draw_attention_recall({"before": [0.5, 0.25], "after": [0.75, 1.0]}, "best key")
    assert [bar.get_height() for bar in fig.axes[0].patches] == [0.5, 0.25, 0.75, 1.0]
    assert words == "Attention held by the best key, layer by layer: before 50%, 25%; after 75%, 100%."
    plt.close(fig)


def test_a_run_from_scratch_recalls_after_it_has_copied():
    fig, words = sparse_vs_dense.draw_from_scratch(
        {"dense": {"copy_steps": 20, "copy": [0.1, 0.9], "recall": [0.5, 1.0]}}
    )
    copied, recalled = fig.axes[0].lines
    assert words.endswith("dense: copies after 20 steps, then recalls 50% to 100%.")
    assert list(copied.get_xdata()) == [5, 15] and list(recalled.get_xdata()) == [25, 35]
    assert copied.get_label() == "dense: copy" and list(recalled.get_ydata()) == [0.5, 1.0]
    plt.close(fig)


def test_differences_and_published_points_stand_where_they_should():
    table = [
        {"benchmark": name, "dense": 0.5, "difference": gap, "half": half, "noise": abs(gap) < half}
        for name, gap, half in (("a", 0.01, 0.02), ("b", -0.5, 0.1))
    ]
    fig, words = sparse_vs_dense.draw_benchmark_suite(table, table[::-1])
    ours = fig.axes[0]
    window, sparse = (container[0] for container in ours.containers)
    assert window.get_xdata().tolist() == [-50, 1] and sparse.get_xdata().tolist() == [1, -50]
    assert [label.get_text() for label in ours.get_yticklabels()] == ["a", "b"]
    assert "up to 50 points (b)" in words and words.endswith("a 50%, +1.0 ± 2.0;\nb 50%, -50.0 ± 10.0: outside.")
    plt.close(fig)
    fig, words = sparse_vs_dense.draw_published([Benchmark("a", 50, 52, 100), Benchmark("rating", 2046, 2121, None)])
    theirs = fig.axes[0]
    assert [label.get_text() for label in theirs.get_yticklabels()] == ["a"]
    assert theirs.lines[0].get_xdata().tolist() == [2]
    assert theirs.patches[0].get_width() == pytest.approx(27.713, abs=0.01)
    assert "a +2.0 (chance ±13.9);\nrating +75.0 (a rating, not drawn)" in words
    plt.close(fig)
