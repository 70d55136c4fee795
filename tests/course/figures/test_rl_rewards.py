"""The pictures of chapter 11 draw what they are given, and their sentences say the same numbers."""

import matplotlib.pyplot as plt
import pytest
import torch

from course.figures import rl_rewards

DOMAINS = ("maths", "search")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def heights(ax):
    return [bar.get_height() for bar in ax.patches]


def test_two_ways_of_taking_tokens_stand_side_by_side():
    fig, words = rl_rewards.draw_decoding_modes({"likeliest": {"a": 1.0, "b": 0.5}, "sampled": {"a": 0.25, "b": 0.75}})
    assert heights(fig.axes[0]) == [1.0, 0.5, 0.25, 0.75]
    assert words == "Right answers, likeliest and sampled: a 100% and 25%; b 50% and 75%."


def test_a_run_is_averaged_in_place():
    rows = [dict.fromkeys(rl_rewards.COLUMNS, float(n)) for n in range(7)]
    fig, words = rl_rewards.draw_run(rows, width=3)
    means = fig.axes[0].lines[1]
    assert list(means.get_xdata()) == [1, 4] and list(means.get_ydata()) == [1.0, 4.0]
    assert "reward 1.00 to 4.00; own tokens" in words


def test_the_table_has_means_over_seeds():
    fig, words = rl_rewards.draw_recipes({"base": torch.tensor([[0.25, 0.5], [0.75, 0.5]])}, DOMAINS)
    assert [text.get_text() for text in fig.axes[0].texts] == ["0.50", "0.50"] and words.endswith("base 0.50.")


def test_a_row_of_stages_begins_with_the_base():
    stages = torch.tensor([[[0.1, 0.2], [0.9, 0.2], [0.8, 0.7]]])  # one seed, the base and two stages
    fig, words = rl_rewards.draw_sequential_stages(stages, torch.tensor([[0.6, 0.5]]), DOMAINS)
    assert fig.axes[0].lines[0].get_ydata().tolist() == pytest.approx([0.1, 0.9, 0.8])
    assert [ax.lines[1].get_xdata()[0] for ax in fig.axes] == [1, 2], "each domain's own stage is marked"
    assert words.endswith("maths 0.10, 0.80, mixed 0.60; search 0.20, 0.70, mixed 0.50.")


def test_domains_have_means_and_deviations():
    fig, words = rl_rewards.draw_domains({"mixed": torch.tensor([[0.0, 0.5], [1.0, 0.5]])}, DOMAINS)
    assert fig.axes[0].containers[0][0].get_ydata().tolist() == [0.5, 0.5] and words.endswith("mixed 0.50, 0.50.")


def test_learning_curves_are_recorded():
    runs = [{"curves": {"mixed": {"reward": [0.0, 1.0, 1.0, 1.0], "length": [2.0] * 4}}}] * 2
    fig, words = rl_rewards.draw_learning(runs, {"sparse": "mixed"}, width=2)
    line = fig.axes[0].containers[0][0]
    assert list(line.get_xdata()) == [1, 3] and line.get_ydata().tolist() == [0.5, 1.0]
    assert line.get_linestyle() == "--" and words.endswith("Reward from 0.50 to 1.00 (sparse).")


def test_rates_are_named():
    fig, words = rl_rewards.draw_rates({"high": [0.5, 0.0], "low": [0.5, 0.75]})
    assert [line.get_label() for line in fig.axes[0].lines] == ["high", "low"]
    assert words == "Reward by step: high 0.50, then 0.00; low 0.50, then 0.75."
