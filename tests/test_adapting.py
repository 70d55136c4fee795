"""The panel of chapter 07 charges what the model pays, draws everywhere, and the recorded tables are read right."""

import math

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from test_training import tiny

from dsa.cost.published import Benchmark
from dsa.show import adapting
from dsa.show.panel import Choice, Panel, Slider, Text
from dsa.text import tokenizer

STORY = "The lamp had to be lit at dusk, été comme hiver."


@pytest.fixture(scope="module")
def models():
    return {"a": tiny(0), "b": tiny(1)}


def test_bits_are_the_cross_entropy(models):
    ids = tokenizer.encode(STORY)
    found = adapting.bits(models["a"], ids, "window", 3)
    model = tiny(0).eval()
    model.attention, model.top_k = "window", 3
    with torch.no_grad():
        nats = F.cross_entropy(model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]), reduction="none")
    assert torch.allclose(found, nats / math.log(2), atol=1e-5)


def test_the_sentence_divides_by_raw_bytes(models):
    _, words = adapting.draw_price(models)(STORY, 2, "indexer")
    ids = tokenizer.encode(STORY)
    raw = len(STORY.encode()) - int(tokenizer.byte_count(torch.tensor(ids[:1])))
    full, few = (float(adapting.bits(models["b"], ids, *how).sum()) / raw for how in (("dense", 64), ("sparse", 2)))
    assert f"b: {full:.2f} with all keys, {few:.2f} with 2" in words
    assert words.startswith(f"{len(ids)} tokens, K = 2, chooser: indexer")
    plt.close("all")


def test_with_all_keys_nothing_is_paid(models):
    fig, _ = adapting.draw_price(models)(STORY, 64, "oracle")
    for line in fig.axes[0].lines[:2]:
        assert abs(line.get_ydata()).max() < 1e-3
    plt.close("all")


def test_it_draws_everywhere(models):
    panel = Panel(
        adapting.draw_price(models),
        text=Text("your text", STORY),
        top_k=Slider("top-k", 1, 64, 2),
        who=Choice("chosen by", list(adapting.CHOOSERS), "indexer"),
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
        adapting.draw_price(models)(**({"text": STORY, "top_k": 2, "who": "indexer"} | wrong))


def test_a_line_of_a_sweep():
    rows = [
        {"model": m, "attention": "sparse", "top_k": k, "seed": s, "bits": k + s / 10}
        for s in (0, 1) for k in (4, 2) for m in ("x", "y")
    ]  # fmt: skip
    assert adapting.along(rows, "x", "sparse", "bits") == {2: [2.0, 2.1], 4: [4.0, 4.1]}
    with pytest.raises(ValueError, match="no model 'z' with attention 'sparse'"):
        adapting.along(rows, "z", "sparse", "bits")
    fig, ax = plt.subplots()
    adapting.draw_line(ax, {2: [1.0, 3.0], 4: [5.0, 5.0]}, "x", 0)
    assert ax.lines[0].get_ydata().tolist() == [2.0, 5.0] and ax.lines[0].get_linestyle() == "--"
    plt.close(fig)


def test_a_run_from_scratch_recalls_after_it_has_copied():
    fig, ax = plt.subplots()
    adapting.draw_scratch(ax, {"dense": {"copy_steps": 20, "copy": [0.1, 0.9], "recall": [0.5, 1.0]}})
    copied, recalled = ax.lines
    assert list(copied.get_xdata()) == [5, 15] and list(recalled.get_xdata()) == [25, 35]
    assert copied.get_label() == "dense: copy" and list(recalled.get_ydata()) == [0.5, 1.0]
    plt.close(fig)


def test_differences_and_published_points_stand_where_they_should():
    fig, (ours, theirs) = plt.subplots(2)
    table = [{"benchmark": "a", "difference": 0.01, "half": 0.02}, {"benchmark": "b", "difference": -0.5, "half": 0.1}]
    adapting.draw_differences(ours, table, "a", 0)
    assert ours.lines[0].get_xdata().tolist() == pytest.approx([1, -50])
    assert [label.get_text() for label in ours.get_yticklabels()] == ["a", "b"]
    adapting.draw_published(theirs, [Benchmark("a", 50, 52, 100), Benchmark("rating", 2046, 2121, None)])
    assert [label.get_text() for label in theirs.get_yticklabels()] == ["a"]
    assert theirs.lines[0].get_xdata().tolist() == [2] and theirs.patches[0].get_width() == pytest.approx(
        27.713, abs=0.01
    )
    plt.close(fig)
