"""Chapter 02: its pictures say what they show, and a model at a lower rank is what the slider claims it is."""

import matplotlib
import pytest
import torch

from course.exercises.flop_counter import count_flops
from course.figures import low_rank, mla_figures
from course.ui.panel import Choice, Panel, Slider
from dsa.datasets.recall_tasks import Episodes
from dsa.model.attention import Attention
from dsa.model.config import Config
from small import model as random_model
from small import tokens as random_tokens

matplotlib.use("agg")


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(1, 24)


@pytest.fixture(scope="module")
def episodes():
    tokens = random_tokens(3, 24, seed=1)
    query = torch.tensor([[10, 20], [11, 21], [12, 22]])
    return Episodes(tokens, torch.ones_like(tokens).bool(), query, query - 5)


@pytest.fixture(scope="module")
def panel(model, tokens, episodes):
    draw = low_rank.draw_rank(model, tokens, episodes, steps=2)
    slider, choice = Slider("rank", 1, 20, 10), Choice("cut in", low_rank.layer_choices(model), low_rank.ALL)
    return Panel(draw, rank=slider, where=choice)


def attention_of(model, layer):
    return model.model.layers[layer].self_attn


def test_a_cache_of_r_numbers_gives_the_keys_and_values_of_rank_r(model, tokens):
    weight = attention_of(model, 0).kv_b_proj.weight.detach()
    up, down = low_rank.factors(weight, 7)
    cached = torch.randn(24, 20) @ down.T
    assert cached.shape == (24, 7)
    cut = attention_of(low_rank.low_rank(model, 7), 0).kv_b_proj.weight
    assert torch.linalg.matrix_rank(cut) == 7
    torch.testing.assert_close(up @ down, cut.detach())


def test_no_matrix_of_that_rank_is_nearer(model):
    weight = attention_of(model, 1).kv_b_proj.weight.detach()
    up, down = low_rank.factors(weight, 5)
    lost = torch.linalg.svdvals(weight)[5:].square().sum().sqrt()
    torch.testing.assert_close((weight - up @ down).norm(), lost)


def test_only_the_named_layer_is_cut_and_the_original_never(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    cut = low_rank.low_rank(model, 3, "layer 1")
    changed = [name for name, p in cut.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["model.layers.1.self_attn.kv_b_proj.weight"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_damage_is_counted_against_the_model_itself(model, tokens, episodes):
    compare, kind = low_rank.damage(model, tokens, episodes), model.attention
    none = compare(low_rank.low_rank(model, 20))
    assert none.moved < 1e-4
    assert none.logits < 1e-3
    some = compare(low_rank.low_rank(model, 2))
    assert 0 < some.moved <= 1
    assert some.logits > 0.1
    assert model.attention == kind


def test_moved_attention_is_half_the_absolute_difference(model, tokens, episodes):
    cut = low_rank.low_rank(model, 4)
    found = low_rank.damage(model, tokens, episodes)(cut).moved
    masses = []
    with torch.no_grad():
        for each in (model, cut):
            before, each.attention = each.attention, "dense"
            masses.append(torch.stack([layer.mass[0] for layer in each(tokens, trace=True)[1]]))
            each.attention = before
    by_hand = (masses[0] - masses[1]).clamp(min=0).sum(-1).mean()  # what leaves some keys arrives at others
    assert found == pytest.approx(float(by_hand), abs=1e-5)


def test_the_slider_works_at_every_position(panel):
    bytes_of_rank = set()
    for values in panel.grid():
        fig, sentence = panel.draw(**values)
        matplotlib.pyplot.close(fig)
        assert f"Rank {values['rank']} of 20 in {values['where']}" in sentence
        assert f"{2 * (values['rank'] + 8)} bytes per token and layer in bf16 instead of 56" in sentence
        bytes_of_rank.add(values["rank"])
    assert {1, 20} <= bytes_of_rank


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rank": 0}, "rank = 0 lies outside 1 to 20"),
        ({"rank": 21}, "rank = 21 lies outside 1 to 20"),
        ({"rank": 2.5}, "not a whole number"),
        ({"rank": 4, "where": "layer 9"}, "place 'layer 9' is unknown: use one of all layers, layer 0"),
    ],
)
def test_what_cannot_be_cut_is_said(panel, values, says):
    with pytest.raises(ValueError, match=says):
        panel.draw(**values)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 5e-5)])
def test_a_layer_of_any_head_sizes_is_the_same_in_both_modes(dtype, most, model, monkeypatch):
    assert mla_figures.between_modes(model.config, dtype) < most
    monkeypatch.setattr(Attention, "absorb_query", lambda self, q: 1.01 * wide(self, q))
    assert mla_figures.between_modes(model.config, dtype) > 100 * most


wide = Attention.absorb_query


def test_logits_are_compared_between_modes_and_the_model_is_left_as_it_was(model, tokens, monkeypatch):
    before = model.attention, model.top_k
    assert mla_figures.between_logits(model, tokens) < 5e-5
    monkeypatch.setattr(Attention, "absorb_query", lambda self, q: 1.01 * wide(self, q))
    assert mla_figures.between_logits(model, tokens) > 1e-4
    assert (model.attention, model.top_k) == before


def test_only_a_mixture_of_conventions_swings():
    found = mla_figures.swings(Config.mini(), distance=5, positions=40)
    assert {name: len(scores) for name, scores in found.items()} == dict.fromkeys(found, 35)
    swing = [float(scores.max() - scores.min()) for scores in found.values()]
    assert max(swing[:2]) < 1e-3 and swing[2] > 1
    assert abs(found["both halves"][0] - found["both neighbours"][0]) > 0.1, "two conventions, two scores"


def said(picture):
    fig, words = picture
    matplotlib.pyplot.close(fig)
    return words


def test_caches_are_tokens_times_bytes():
    words = said(mla_figures.draw_caches({"MHA": 5_000_000, "MLA": 70_000}, tokens=100_000))
    assert "MHA 500 GB, MLA 7 GB" in words


def test_drift_names_each_heads_lowest_cosine():
    alike = torch.tensor([[1.0, 1.0], [0.5, -0.8], [0.7, 0.0]])
    assert "within 3 tokens: head 0 0.5, head 1 -0.8" in said(mla_figures.draw_drift(alike))


def test_crossing_says_both_ends():
    words = said(mla_figures.draw_crossing(lambda n: (1000 + n, 10 * n), [1, 10, 1000], crossing=112, cached=50))
    assert "for 1 new token the MHA mode costs 100 times" in words
    assert "for 1,000 the MQA mode 5.0 times" in words
    assert "they cross at 112" in words


def test_pairs_are_those_that_the_rotations_turn():
    words = said(mla_figures.draw_pairs())
    assert "neighbours: MLA: 0-1, 2-3, 4-5, 6-7" in words
    assert "halves: the indexer: 0-4, 1-5, 2-6, 3-7" in words
    with pytest.raises(ValueError, match="width=7"):
        mla_figures.draw_pairs(7)


def test_swing_is_the_range():
    assert "a by 3.0, b by 0.0" in said(mla_figures.draw_swing({"a": torch.tensor([1.0, -2]), "b": torch.ones(2)}, 5))


def test_turns_are_those_of_the_published_sizes():
    words = said(mla_figures.draw_turns(Config.v32_exp()))
    assert "of the 32 pairs" in words
    assert "leaves 11 pairs alone, slows 9 by 40 and blends 12" in words
    with pytest.raises(ValueError, match="no YaRN"):
        mla_figures.draw_turns(Config.mini())


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: a @ b,
        lambda a, b: torch.stack([a @ column for column in b.T], dim=-1),
        lambda a, b: torch.stack([torch.stack([row.dot(column) for column in b.T]) for row in a]),
        lambda a, b: (a[:, :, None] * b).sum(1),
        lambda a, b: torch.einsum("ij,jk->ik", a, b),
    ],
    ids=["matrix", "loop of vectors", "loop of numbers", "broadcast", "einsum"],
)
def test_the_same_work_counts_the_same_however_it_is_written(product):
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    found, flops = count_flops(lambda: product(a, b))
    torch.testing.assert_close(found, a @ b)
    assert flops == 2 * 3 * 5 * 7
