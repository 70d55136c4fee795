"""The catalogue's entries are injected bugs, and what is said of their visibility agrees with the list."""

import matplotlib.pyplot as plt
import pytest
import torch

import small
from course.bugs import bug_catalogue, injected_bugs
from dsa.datasets.recall_tasks import Episodes
from dsa.kernels import ops
from dsa.model.attention import Trace

T = 32


@pytest.fixture(scope="module")
def model():
    return small.model(2).double()


@pytest.fixture(scope="module")
def episodes():
    tokens = small.tokens(2, T)
    places = torch.tensor([[T - 2], [T - 2]])
    return Episodes(tokens, torch.ones_like(tokens, dtype=torch.bool), places, places - 20)


@pytest.mark.parametrize("name", bug_catalogue.INDEXER_BUGS)
def test_a_bug_is_visible_where_the_list_says(model, episodes, name):
    needs = injected_bugs.find_bug(name).visible_when
    assert bug_catalogue.bug_effects(model, episodes, T)(name).visible == (needs == injected_bugs.ALWAYS)
    found = bug_catalogue.bug_effects(model, episodes, 4)(name)
    assert found.visible == (needs != injected_bugs.SMALL_KEYS)
    if found.visible:
        assert found.swapped > 0


def test_small_keys_show_the_eps(model, episodes):
    found = bug_catalogue.bug_effects(bug_catalogue.shrink_keys(model), episodes, 4)("LayerNorm with eps 1e-5")
    assert found.visible and found.swapped > 0
    assert all(p.std() > 0.01 for name, p in model.named_parameters() if name.endswith("wk.weight"))  # it was a copy


def test_no_mistake_no_damage_and_settings_come_back(model, episodes):
    model.attention, model.top_k = "window", 7
    harmless = injected_bugs.Bug("none", "Nothing.", "No.", "never", injected_bugs.Patch(ops, "select", ops.select))
    found = bug_catalogue.bug_effects(model, episodes, 4)(harmless)
    assert (found.logits, found.swapped, found.visible) == (0, 0, False)
    assert (model.attention, model.top_k) == ("window", 7)
    with pytest.raises(ValueError, match="no mistake 'x'"):
        bug_catalogue.bug_effects(model, episodes, 4)("x")


def test_swapped_counts_what_is_missing_and_what_is_too_much(model, episodes):
    def first_keys(q, k, w, top_k, right=ops.index_topk):
        return right(q, k, w, top_k) * 0

    wrong = injected_bugs.Bug(
        "first", "Only the first.", "No.", "K < S", injected_bugs.Patch(ops, "index_topk", first_keys)
    )
    assert 0.5 < bug_catalogue.bug_effects(model, episodes, 4)(wrong).swapped < 1


class Fake:
    """A model that says what it is told to: logits (2, T, vocab), and one layer's selected keys (2, T, K)."""

    attention, top_k = "dense", 1

    def __init__(self, logits, selected):
        self.said = logits, selected

    def __call__(self, tokens, trace):
        return self.said[0], [Trace(None, self.said[1], torch.empty(0))]


@pytest.mark.parametrize(("right", "wrong", "change"), [(2, 6, 0.25), (6, 2, -0.25), (6, 6, 0.25)])
def test_the_effect_is_the_largest_change_of_a_logit_and_the_share_of_the_larger_selection(
    episodes, right, wrong, change
):
    """Against either smaller one, choosing too few keys, or the right ones and more, would be no effect at all."""
    logits, keys = torch.zeros(2, T, 61), torch.arange(6).expand(2, T, 6)
    fake = Fake(logits, keys[..., :right])
    effect = bug_catalogue.bug_effects(fake, episodes, 6)
    fake.said = logits.clone(), keys[..., :wrong]
    fake.said[0][1, 7, 3], fake.said[0][0, 2, 5] = change, -change / 2  # two of 3,904 logits
    none = injected_bugs.Bug("none", "None.", "No.", "never", injected_bugs.Patch(ops, "select", ops.select))
    found = effect(none)
    assert found.logits == 0.25 and found.visible
    assert found.swapped == pytest.approx(1 - min(right, wrong) / max(right, wrong))


def test_the_fixture_model_tells_all_cases_apart():
    model, tokens, golden = bug_catalogue.fixture_model()
    model.top_k = 4
    for name, circumstance, right in bug_catalogue.cases():
        with circumstance, torch.no_grad():
            _, trace = model(tokens, trace=True)
        sets = [bug_catalogue.chosen_sets(layer.selected[0]) for layer in trace]
        assert (sets == golden[4].sets) == right, name


def test_a_bug_in_the_last_layer_leaves_the_layers_below_the_last_row_and_the_logits_alone():
    model, tokens, golden = bug_catalogue.fixture_model()
    model.top_k = 4
    for name in bug_catalogue.MASK_BUGS:
        with bug_catalogue.in_one_layer(2, injected_bugs.find_bug(name))(), torch.no_grad():
            logits, trace = model(tokens, trace=True)
        sets = [bug_catalogue.chosen_sets(layer.selected[0]) for layer in trace]
        assert sets[:2] == golden[4].sets[:2] and sets[2] != golden[4].sets[2], name
        assert sets[2][-1] == golden[4].sets[2][-1]
        assert torch.equal(logits, golden[4].logits)  # nor does any logit tell


def test_the_picture_counts_what_is_visible():
    wide = {"a": bug_catalogue.BugEffect(0.0, 0.0, 1.0), "b": bug_catalogue.BugEffect(2.0, 0.1, 1.0)}
    narrow = {"a": bug_catalogue.BugEffect(3.0, 0.1, 1.0), "b": bug_catalogue.BugEffect(1.0, 0.2, 1.0)}
    fig, words = bug_catalogue.draw_bug_effects({32: wide, 4: narrow})
    assert words.endswith("with K = 32 1 of 2, with K = 4 2 of 2.")
    assert list(fig.axes[0].lines[0].get_xdata()) == [1e-16, 2.0]
    plt.close(fig)
