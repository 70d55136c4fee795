"""The film of a warm-up shows what the weights of each step said, and draws everywhere its sliders go."""

import matplotlib.pyplot as plt
import pytest
import torch

import small
from course.figures.warmup_film import Film, draw_film
from course.ui.panel import Panel, Slider
from dsa.datasets.recall_tasks import Needles
from dsa.kernels import reference
from dsa.training.indexer import warm_up
from tiny_training import tiny

T, STEPS = 20, 6


@pytest.fixture(scope="module")
def learned(text):
    """A model, its film, and the traces of its text before and after."""
    model, ids = tiny(), torch.randint(256, (T,), generator=torch.Generator().manual_seed(3))

    def traced():
        model.attention = "dense"
        with torch.no_grad():
            return model(ids[None], trace=True)[1]

    before = traced()
    film = Film(model, ids, every=2)
    warm_up(model, Needles(text, 64, 4, 4), steps=STEPS, size=2, after=film, show=False)
    return model, film, before, traced()


def test_pictures_are_what_the_weights_of_their_step_say(learned):
    _, film, before, after = learned
    assert film.steps == [0, 2, 4, 6]
    for picture, trace in ((0, before), (-1, after)):
        for layer, seen in enumerate(trace):
            assert torch.allclose(film.shares[picture][layer], seen.scores[0].softmax(-1), atol=1e-5)
            assert torch.allclose(film.attention_probs[layer], seen.mass[0], atol=1e-5)
    assert not torch.allclose(film.shares[0], film.shares[-1], atol=1e-3)


def test_the_divergence_of_a_query_is_eq_3(learned):
    _, film, before, _ = learned
    for layer, t in ((0, 0), (1, 7), (len(before) - 1, T - 1)):
        right = reference.kl_divergence(before[layer].mass[0, t], before[layer].scores[0, t])
        assert film.kl(layer, t)[0] == pytest.approx(float(right), abs=1e-4)
        assert len(film.kl(layer, t)) == len(film.steps)


def test_it_draws_everywhere_and_says_what_is_there(learned):
    _, film, _, _ = learned
    layers = len(film.attention_probs)
    panel = Panel(
        draw_film(film, top_k=4),
        step=Slider("step", 0, STEPS, 0, step=2),
        layer=Slider("layer", 0, layers - 1, 0),
        back=Slider("token", 0, T - 1, 0),
    )
    for values in panel.grid(60):
        fig, words = panel.draw(**values)
        layer, t = values["layer"], T - 1 - values["back"]
        p = film.attention_probs[layer, t, : t + 1]
        assert f"After {values['step']} steps, layer {layer}, token {t} (" in words
        assert f"KL {film.kl(layer, t)[values['step'] // 2]:.2f}, at first {film.kl(layer, t)[0]:.2f}" in words
        assert f"favourite is token {int(p.argmax())} " in words
        assert f"best possible {float(p.topk(min(4, t + 1)).values.sum()):.0%}" in words
        plt.close(fig)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"step": 3}, "step = 3: pictures were taken every 2 steps, up to 6"),
        ({"layer": 9}, "layer = 9 lies outside 0 to"),
        ({"back": T}, f"token = {T} lies outside 0 to {T - 1}"),
    ],
)
def test_a_readers_mistake_is_a_sentence(learned, wrong, says):
    with pytest.raises(ValueError, match=says):
        draw_film(learned[1])(**({"step": 0, "layer": 0, "back": 0} | wrong))


def test_what_cannot_be_filmed_is_refused():
    dense = small.model(3, small.config(**small.DENSE))
    with pytest.raises(ValueError, match="dense and has no indexer to film"):
        Film(dense, small.tokens(1, T)[0])
    with pytest.raises(ValueError, match="every=0"):
        Film(small.model(3), small.tokens(1, T)[0], every=0)
