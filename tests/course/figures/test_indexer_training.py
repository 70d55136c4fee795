"""The pictures of chapter 05 draw what they are given, and their sentences say the same numbers."""

import json

import matplotlib.pyplot as plt
import pytest
import torch

from course.experiments.indexer_sweep import along_axis
from course.figures import indexer_training
from project import DATA

RECORD = DATA / "measurements" / "indexer_sweep.json"


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_a_step_is_said_by_its_levels():
    fig, words = indexer_training.draw_step(torch.arange(4), torch.tensor([1.5, 1.5, 4.0, 4.0]))
    assert fig.axes[0].lines[0].get_ydata().tolist() == [1.5, 1.5, 4.0, 4.0]
    assert words.startswith("The output takes 2 values, 1.5 and 4,")


def test_each_head_has_its_favourite_and_the_teacher_both():
    heads = torch.tensor([[0.75, 0.25], [0.0, 1.0]])
    fig, words = indexer_training.draw_teacher(heads, heads.mean(0))
    assert [bar.get_height() for bar in fig.axes[2].patches] == [0.375, 0.625]
    assert words == "What is liked best: head 0 key 0, head 1 key 1; in p these stand out, with 38% and 62%."


def test_teachers_are_said_layer_by_layer():
    fig, words = indexer_training.draw_unluckiest({"all heads": [0.5, 0.25], "head 0": [0.125, 1.0]})
    assert [list(line.get_ydata()) for line in fig.axes[0].lines] == [[0.5, 0.25], [0.125, 1.0]]
    assert words == "What the unluckiest head keeps in layers 0 to 1: all heads 50%, 25%; head 0 12%, 100%."


def test_a_fall_is_said_by_its_ends():
    rows = [{"kl 0": 2.0, "kl 1": 4.0}, {"kl 0": 0.5, "kl 1": 0.25}]
    fig, words = indexer_training.draw_fall(rows, layers=2)
    assert fig.axes[0].get_yscale() == "log" and list(fig.axes[0].lines[1].get_ydata()) == [4.0, 0.25]
    assert "over 2 steps, measured. layer 0: 2.0 to 0.50; layer 1: 4.0 to 0.25." in words


def test_the_sweep_has_a_line_for_each_seed_and_is_said_by_means():
    runs = json.loads(RECORD.read_text("utf-8"))["runs"]
    fig, words = indexer_training.draw_axes(runs)
    heads = along_axis(runs, "heads", "kl")
    assert [list(line.get_ydata()) for line in fig.axes[0].lines] == [
        list(seed) for seed in zip(*heads.values(), strict=True)
    ]
    assert {line.get_linestyle() for line in fig.axes[0].lines} == {"--"}
    first = next(iter(heads))
    assert f"heads J {first:g}: {sum(heads[first]) / 2:.2f}, " in words and "rotary width R 2: " in words
