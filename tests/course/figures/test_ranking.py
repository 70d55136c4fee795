"""What the pictures of a comparison say is what was put into them."""

import itertools

import matplotlib.pyplot as plt
import pytest
import torch

from course.figures import ranking
from course.figures.ranking import FORMS, draw_forms, draw_hits, draw_ratio, draw_weights
from dsa.datasets.recall_tasks import Episodes

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


def test_attention_is_said_by_its_peaks():
    fig, words = ranking.draw_attention(torch.tensor([[0.25, 0.75], [0.9, 0.1]]), answer=1)
    assert words.endswith("last of 2 tokens. layer 0: most, 75%, on token 1; layer 1: most, 90%, on token 0.")
    assert [ax.lines[1].get_xdata()[0] for ax in fig.axes] == [1, 1]


def test_distances_set_near_against_far():
    _, words = ranking.draw_distances({"halves": [9.0, 7.0, 5.0, 1.0, 3.0]}, near=2, far=3)
    assert "rotated as halves, the last 2 tokens score 6 higher" in words


def test_choosers_are_measured_by_mass_kept_and_answers_found():
    mass = torch.eye(100)[None] * 0.75  # every token looks at itself, a little at its predecessor
    mass[0].diagonal(-1).fill_(0.25)
    query, source = torch.tensor([[99, 98]]), torch.tensor([[9, 97]])  # one answer is far, one is near
    episodes = Episodes(torch.zeros(1, 100, dtype=torch.long), torch.ones(1, 100).bool(), query, source)

    def choosers(layer, k):
        itself = torch.arange(100)[None, :, None]
        return {"itself": itself.clone(), "ninth": torch.where(itself >= 9, 9, -1), "nobody": itself * 0 - 1}

    kept, hits = ranking.compare(choosers, [mass], episodes, sizes=(1,))
    assert kept == {("itself", 0, 1): 0.75, ("ninth", 0, 1): 0, ("nobody", 0, 1): 0}
    assert hits == {("itself", 0, 1): 0, ("ninth", 0, 1): 1, ("nobody", 0, 1): 0}


def test_a_measure_is_sorted_by_form():
    runs = [{"form": form, "kl": float(n)} for n, form in enumerate([*FORMS, *FORMS])]
    assert {form: found.tolist() for form, found in ranking.by_form(runs, "kl").items()} == {
        "relu": [0, 3], "none": [1, 4], "softmax": [2, 5],
    }  # fmt: skip


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
