"""Looking into a score shows what the model computed: the shares add up to its scores, everywhere the panel goes."""

import matplotlib.pyplot as plt
import pytest
import torch

import small
from course.figures.index_heads import draw_heads, factors
from course.ui.panel import Choice, Panel, Slider

T = 24


@pytest.fixture(scope="module")
def found():
    return factors(small.model(3), small.tokens(1, T)[0])


def test_the_shares_of_the_heads_add_up_to_the_models_own_scores(found):
    model = small.model(3)
    model.attention = "dense"
    _, trace = model(small.tokens(1, T), trace=True)
    for layer, seen in enumerate(trace):
        assert torch.allclose(found.attention_probs[layer], seen.mass[0], atol=1e-5)
        for t in range(T):
            summed = found.shares(layer, t, "ReLU").sum(0)
            assert torch.allclose(summed, seen.scores[0, t, : t + 1], atol=1e-4)


def test_without_activation_negative_products_count(found):
    products = found.products(1, T - 1)
    assert torch.equal(found.shares(1, T - 1, "none"), found.w[1, T - 1][:, None] * products)
    assert not torch.allclose(found.shares(1, T - 1, "none"), found.shares(1, T - 1, "ReLU"))


def test_it_draws_everywhere_and_says_what_is_there(found):
    panel = Panel(
        draw_heads(found, top_k=4),
        layer=Slider("layer", 0, 2, 2),
        back=Slider("token", 0, T - 1, 0),
        activation=Choice("activation", ["ReLU", "none"], "ReLU"),
    )
    for values in panel.grid(60):
        fig, words = panel.draw(**values)
        t, layer = T - 1 - values["back"], values["layer"]
        scores = found.shares(layer, t, values["activation"]).sum(0)
        assert f"Highest score: token {int(scores.argmax())} " in words
        kept = scores.topk(min(4, t + 1)).indices
        assert f"The {len(kept)} kept hold {float(found.attention_probs[layer, t, kept].sum()):.0%} of" in words
        plt.close(fig)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"layer": 3}, "layer = 3 lies outside 0 to 2"),
        ({"back": T}, f"token = {T} lies outside 0 to {T - 1}"),
        ({"activation": "GELU"}, "activation 'GELU' is unknown: use one of ReLU, none"),
    ],
)
def test_a_readers_mistake_is_a_sentence(found, wrong, says):
    with pytest.raises(ValueError, match=says):
        draw_heads(found)(**({"layer": 0, "back": 0, "activation": "ReLU"} | wrong))


def test_a_dense_model_has_no_score_to_look_into():
    with pytest.raises(ValueError, match="dense and has no indexer"):
        factors(small.model(3, small.config(**small.DENSE)), small.tokens(1, T)[0])
