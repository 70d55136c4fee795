"""Chapter 12's panel at every position and its pictures, against numbers computed in another way."""

import re

import matplotlib.pyplot as plt
import pytest
import torch

import dsa
from course.experiments import variant_bench as bench
from course.experiments.attention_variants.selective_attention import Budget
from course.experiments.variant_costs import DESIGNS, token_cost
from course.figures import attention_variants as pictures
from course.ui.panel import Choice, Panel, Slider
from dsa.datasets import corpus
from dsa.datasets.recall_tasks import Needles
from project import DATA

REAL = dsa.Config.v32_exp()


@pytest.fixture(scope="module")
def warmed():
    return dsa.from_pretrained(DATA / "warmed")


@pytest.fixture(scope="module")
def episodes():
    task = Needles(corpus.load(DATA / "texts"), length=160, pairs=4, queries=4)
    return task.generate(torch.Generator().manual_seed(2), 2)


@pytest.fixture(scope="module")
def layers(warmed, episodes):
    return pictures.read_layers(warmed, episodes.tokens)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_the_panel_draws_at_every_position(layers, episodes):
    draw = pictures.draw_choices(layers, episodes)
    panel = Panel(
        draw,
        keys=Choice("tokens read", (32, 64, 96), 32),
        block=Choice("tokens in a block", (4, 8, 16), 8),
        layer=Slider("layer", 0, 2, 2),
    )
    sentences = set()
    for values in panel.grid(limit=200):
        sentence = draw(**values)[1]
        plt.close("all")
        shares = [int(found) for found in re.findall(r"(\d+)%", sentence)]
        assert len(shares) == 2 * len(pictures.CHOOSERS) and max(shares) <= 100
        assert shares[1] == max(shares[1::2])  # nobody keeps more than the oracle
        sentences.add(sentence)
    assert len(sentences) == 27
    with pytest.raises(ValueError, match="10 keys in blocks of 8: give a multiple"):
        draw(keys=10, block=8, layer=0)


def test_each_chooser_says_what_the_model_with_this_design_reads(warmed, layers, episodes):
    budget = Budget(keys=24, block=8)
    for who in ("dsa", "msa", "moba", "quest", "sparq", "sinks", "window"):
        model = bench.build(who, warmed, budget).eval()
        with torch.no_grad():
            _, trace = model(episodes.tokens, trace=True)
        # later layers read what earlier ones changed: compare the first
        found = [layers[0].chosen(who, budget), trace[0].selected]
        found = [[set(row) - {-1} for row in keys.flatten(0, 1).tolist()] for keys in found]
        assert found[0] == found[1], who


def test_hits_and_mass_by_hand(layers, episodes):
    budget = Budget(keys=32, block=8)
    hits, kept = pictures.evaluate_chooser(layers[2], episodes, "moba", budget)
    chosen = [[set(keys) for keys in row] for row in layers[2].chosen("moba", budget).tolist()]
    found, shares = [], []
    for b in range(len(episodes.tokens)):
        for query, source in zip(episodes.query[b].tolist(), episodes.source[b].tolist(), strict=True):
            if query - source > 64:
                found.append(source in chosen[b][query])
        for t in range(32, 160):
            shares.append(sum(float(layers[2].attention_probs[b, t, s]) for s in chosen[b][t] if s >= 0))
    assert hits == pytest.approx(sum(found) / len(found)) and kept == pytest.approx(sum(shares) / len(shares), abs=1e-5)


def runs():
    return [
        {"design": design, "seed": seed, "steps": 9, **{f"to {end}": 0.5 + seed / 10 for end in (32, 64, 128, 256)}}
        for design in bench.DESIGNS
        for seed in (0, 1, 2)
    ]


def test_the_distances_show_every_design_once():
    fig, words = pictures.draw_distances(runs(), 256, 9)
    assert all(words.count(f"{pictures.NAMES[d]} 0.60, 0.60, 0.60, 0.60") == 1 for d in ("moba", "nsa", "dsa", "delta"))
    shown = [text.get_text() for ax in fig.axes for text in ax.get_legend().get_texts()]
    assert sorted(shown) == sorted(pictures.NAMES[design] for design in bench.DESIGNS)


def test_the_bills_say_what_the_counts_say():
    _, words = pictures.draw_split(REAL, 4096)
    one = token_cost("dsa", REAL, 4096)
    assert f"DSA {(one.projections + one.scoring) / one.flops:.0%} of {one.flops / 1e6:,.0f}" in words
    fig, words = pictures.draw_token_costs(REAL, DESIGNS)
    assert len(fig.axes[0].lines) == len(fig.axes[1].lines) == len(DESIGNS)
    far = token_cost("moba", REAL, 2**20)
    assert f"MoBA {far.flops / 1e6:,.0f} and {far.memory(2**20) / 1e6:,.0f}" in words
    assert len({(look["color"], look["marker"]) for look in pictures.LOOKS.values()}) == len(DESIGNS)
