"""The panels of chapter 11: the formula against a hand computation, the groups against what was sampled."""

import math

import matplotlib.pyplot as plt
import pytest

import dsa
from course.figures.grpo_groups import (
    RATIOS,
    RIGHT,
    best_ratio,
    block_means,
    curves_by_seed,
    draw_group,
    draw_objective,
    gain,
    group_of,
)
from course.ui.panel import Choice, Panel
from dsa.datasets.rl_domains import DOMAINS, LEVELS
from project import DATA

FOLDER = DATA / "novice"
SIZES, HIGHS, BETAS = (2, 4, 8, 16), (0.2, 0.28, 0.5), (0.0, 0.5, 2.0)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_the_gain_by_hand():
    found = gain(2.0, 0.2, 0.3, 0.5)
    for n in (0, 60, 120, 200, 280):
        r = float(RATIOS[n])
        by_hand = min(2 * r, 2 * min(max(r, 0.8), 1.3)) - 0.5 * (1 - r + r * math.log(r))
        assert float(found[n]) == pytest.approx(float(by_hand), abs=1e-5)


def test_pushing_ends_at_the_clip_and_nearer_with_a_divergence():
    assert best_ratio(1.0, 0.2, 0.28, 0) == pytest.approx(1.28, abs=0.006)
    assert best_ratio(-1.0, 0.2, 0.28, 0) == pytest.approx(0.8, abs=0.006)
    assert best_ratio(0.0, 0.2, 0.28, 0) is None
    assert best_ratio(-1.0, 0.2, 0.28, 10.0) == pytest.approx(math.exp(-0.1), abs=0.006)  # -1 - 10 log r = 0


def test_the_objective_is_drawn_everywhere():
    controls = {
        "size": Choice("G", SIZES, 8), "right": Choice("right", RIGHT, "half"),
        "high": Choice("high", HIGHS, 0.28), "beta": Choice("beta", BETAS, 0.0),
    }  # fmt: skip
    seen = list(Panel(draw_objective, **controls).grid(limit=200))
    assert len(seen) == 180
    for values in seen:
        if values["size"] in (2, 16) or values["beta"] == 0.5:
            continue
        _, words = draw_objective(**values)
        nothing = values["right"] in ("none", "all")
        assert ("teaches nothing" in words) == nothing and ("pulls back" in words) == (
            values["beta"] > 0 and not nothing
        )
        plt.close("all")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"right": "most"}, "'most' is not one of none"),
        ({"size": 1}, "group size = 1"),
        ({"high": 0.9}, "epsilon_high = 0.9"),
        ({"beta": -1.0}, "beta = -1.0"),
    ],
)
def test_impossible_objectives_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        draw_objective(**({"size": 4, "right": "half", "high": 0.2, "beta": 0.0} | values))


def test_groups_are_shown_as_they_were_sampled():
    model = dsa.from_pretrained(FOLDER)
    draw = draw_group({"before": model})
    for domain in DOMAINS:
        for level, mode in ((LEVELS[0], "direct"), (LEVELS[2], "think")):
            table, words = draw("before", domain, level, mode)
            found, given, advantage = group_of(model, domain, level, mode == "think")
            assert [one.correct for one in found] == given.bool().tolist()
            assert f"{int(given.sum())} of 8 answers are right" in words and table.count("<tr>") == 9
            assert table.count("✓ 1</td>") == int(given.sum()) and abs(float(advantage.sum())) < 1e-3
            tool = sum(not own for one in found for own in one.completion_mask)
            assert table.count("⟦") == tool and (tool > 0) == (domain in ("repair", "search"))
    with pytest.raises(ValueError, match="model 'other' is not among before"):
        draw("other", "maths", 1, "think")
    with pytest.raises(ValueError, match="mode 'fast'"):
        draw("before", "maths", 1, "fast")
    with pytest.raises(ValueError, match="domain 'poetry'"):
        draw("before", "poetry", 1, "think")


def test_curves_are_averaged_by_fives():
    assert block_means([1, 2, 3, 4, 5, 6]) == [3] and block_means([1, 3, 5, 7], 2) == [2, 6]
    runs = [{"curves": {"mixed": {"reward": [s, s + 2]}}} for s in (0.0, 1.0)]
    assert curves_by_seed(runs, "mixed", "reward", 2).tolist() == [[1], [2]]
