"""What the pictures of a comparison say is what was put into them."""

import itertools

import matplotlib.pyplot as plt
import pytest
import torch

from dsa.show.ranking import FORMS, draw_forms, draw_hits, draw_ratio, draw_weights

WHO = ("oracle", "trained")
NUMBERS = dict.fromkeys(itertools.product(WHO, range(3), (4, 16)), 0.5) | {
    ("trained", 0, 16): 0.91,
    ("trained", 1, 16): 0.82,
    ("trained", 2, 16): 0.73,
}


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def test_weights_are_described_by_their_means():
    weights = torch.tensor([[[1.0, -1.0], [2.0, -3.0]], [[0.0, 0.5], [0.0, 0.5]]])  # (layers, T, J)
    fig, words = draw_weights(weights)
    assert "over 2 tokens" in words and "layer 0: +1.50 and -2.00; layer 1: +0.00 and +0.50" in words
    assert [ax.get_title(loc="left") or ax.get_title() for ax in fig.axes] == ["layer 0", "layer 1"]


def test_the_share_of_the_oracle_is_said_for_one_k():
    fig, words = draw_ratio(NUMBERS, 16)
    assert words == "With K = 16 in layers 0, 1, 2, of the oracle's mass: trained 91%, 82%, 73%."
    assert list(fig.axes[2].lines[1].get_ydata()) == [0.5, 0.73]


def test_hits_are_said_for_the_last_layer():
    fig, words = draw_hits(NUMBERS, 16)
    assert words.endswith("in layer 2: oracle 50%, trained 73%.")
    assert sorted(bar.get_height() for bar in fig.axes[0].patches)[-1] == 0.91


def test_a_missing_number_is_noticed():
    with pytest.raises(ValueError, match="11 numbers for 2 choosers, 3 layers and 2 K"):
        draw_ratio({key: value for key, value in NUMBERS.items() if key != ("trained", 0, 4)}, 16)


def test_the_sweep_is_drawn_run_by_run_and_said_by_its_means():
    runs = [
        {"form": form, "heads": heads, "width": 32, "kl": kl, "of_oracle": 0.95}
        for form, kl in zip(FORMS, (0.1, 0.2, 0.3), strict=True)
        for heads in (2, 8)
    ]
    fig, words = draw_forms(runs)
    assert "2 runs each" in words and "no activation: KL 0.20, kept 95.0%" in words
    assert len(fig.axes[0].lines) == 3 and list(fig.axes[0].lines[0].get_ydata()) == [0.1, 0.1]
