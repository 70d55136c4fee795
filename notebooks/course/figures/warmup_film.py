"""A film of the dense warm-up: one text, seen by the indexers again and again while they learn.

Everything except the indexers is frozen, so what they are shown of the text and the attention they are to imitate stay
the same throughout. A `Film` keeps these once, and takes a picture every few steps: the indexers' softmax for every
query. A slider then moves through the training without training anything, and what it draws is what the weights of
that step really said.
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from course.experiments.activation import indexers, teacher_batches
from course.ui.panel import Draw
from course.ui.reading import checked_int
from course.ui.style import COLOURS
from dsa.datasets import byte_tokenizer
from dsa.kernels import ops, reference
from dsa.model import baselines
from dsa.model.transformer import Transformer

LEAST = 1e-4  # shares below it are drawn at the bottom edge


class Film:
    """What the indexers make of one text, every few steps of their training: `warm_up(model, ..., after=film)`.

    Attributes:
        ids: the T tokens.
        steps: after how many steps each picture was taken; the first one at 0.
        shares: softmax(I) of each picture, (layers, T, T), rows sum to 1.
        attention_probs: the attention to imitate (Eq. 3), (layers, T, T).
    """

    def __init__(self, model: Transformer, ids: Tensor, every: int = 5):
        if model.config.index_topk is None:
            raise ValueError("this model is dense and has no indexer to film: add one first, with_indexer(model)")
        if every < 1:
            raise ValueError(f"every={every}: take a picture every 1 or more steps")
        self.ids, self.every, self._done = ids.tolist(), every, 0
        self._teacher = teacher_batches(model, ids[None])
        self.attention_probs = torch.cat([layer.attention_probs for layer in self._teacher])
        self.steps: list[int] = [0]
        self.shares: list[Tensor] = [self._look(model)]

    def __call__(self, model: nn.Module) -> None:
        """Count a step, and take a picture if it is time."""
        self._done += 1
        if self._done % self.every == 0:
            self.steps.append(self._done)
            self.shares.append(self._look(model))

    @torch.no_grad()
    def _look(self, model: nn.Module) -> Tensor:
        assert isinstance(model, Transformer)
        made = zip(indexers(model), self._teacher, strict=True)
        scores = [ops.index_scores(*indexer(one.x, one.query_latent, one.rope)) for indexer, one in made]
        return torch.cat(scores).softmax(-1)

    def kl(self, layer: int, t: int) -> list[float]:
        """KL(p || softmax(I)) of one query in every picture (Eq. 3), in nats."""
        p = self.attention_probs[layer, t, : t + 1]
        found = (reference.kl_divergence(p, shares[layer, t, : t + 1].log()) for shares in self.shares)
        return [float(one) for one in found]

    def attention_recall(self, picture: int, layer: int, t: int, top_k: int) -> tuple[float, float]:
        """The attention on the indexer's best keys of one query, and on the best keys."""
        p, guess = self.attention_probs[layer, t, : t + 1], self.shares[picture][layer, t, : t + 1]
        chosen = [ops.select(row[None, None], top_k) for row in (guess, p)]
        ours, best = (float(baselines.attention_recall(p[None, None], one)) for one in chosen)
        return ours, best


def draw_film(film: Film, top_k: int = 16) -> Draw:
    """Make a panel's callback: draw(step, layer, back) -> (figure, sentence); the query stands `back` tokens before
    the last one. ValueError for a step of which there is no picture.
    """
    layers, T = len(film.attention_probs), len(film.ids)

    def draw(step: int, layer: int, back: int) -> tuple[Figure, str]:
        if step not in film.steps:
            raise ValueError(f"step = {step}: pictures were taken every {film.every} steps, up to {film.steps[-1]}")
        checked_int("layer", layer, 0, layers - 1, f"the model has {layers} layers, the first is 0")
        checked_int("token", back, 0, T - 1, f"the text has {T} tokens, the last is 0")
        t, picture = T - 1 - back, film.steps.index(step)
        fig, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.7), width_ratios=[2.1, 1])
        _draw_shares(left, film, picture, layer, t)
        _draw_kl(right, film, picture, layer, t)
        fig.suptitle(f"After {step} steps: layer {layer}, token {t}", fontsize=11)
        return fig, _sentence(film, picture, layer, t, top_k)

    return draw


def _draw_shares(ax: Axes, film: Film, picture: int, layer: int, t: int) -> None:
    """Attention and the indexer's softmax over the visible keys."""
    p, guess = film.attention_probs[layer, t, : t + 1], film.shares[picture][layer, t, : t + 1]
    ax.plot(p.clamp(min=LEAST), "o", color=COLOURS[0], markersize=4, mfc="none", label="attention p")
    ax.plot(guess.clamp(min=LEAST), "x", color=COLOURS[3], markersize=4, label="softmax(I)")
    ax.set_yscale("log")
    ax.set(ylim=(0.7 * LEAST, 1.6), xlabel="key position", ylabel="share")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, fontsize=8, borderpad=0)


def _draw_kl(ax: Axes, film: Film, picture: int, layer: int, t: int) -> None:
    """This query's divergence over the whole film, the present picture marked."""
    found = film.kl(layer, t)
    ax.plot(film.steps, found, color="#8a8a8a", marker="")
    ax.plot(film.steps[picture], found[picture], "o", color=COLOURS[3], markersize=7, clip_on=False)
    ax.set(xlabel="step", ylim=(0, 1.08 * max(*found, 0.1)))
    ax.set_title("KL of this query", fontsize=10)


def _sentence(film: Film, picture: int, layer: int, t: int, top_k: int) -> str:
    """What the picture shows, in words."""
    p, guess = film.attention_probs[layer, t], film.shares[picture][layer, t]
    most, found = int(p.argmax()), film.kl(layer, t)
    ours, best = film.attention_recall(picture, layer, t, top_k)
    names = byte_tokenizer.token_labels(film.ids)
    return (
        f"After {film.steps[picture]} steps, layer {layer}, token {t} ({names[t]}): KL {found[picture]:.2f}, at first "
        f"{found[0]:.2f}. Attention's favourite is token {most} ({names[most]}) with {float(p[most]):.0%}; the indexer "
        f"gives it {float(guess[most]):.0%}. The indexer's best {min(top_k, t + 1)} hold {ours:.0%} of the attention, "
        f"the best possible {best:.0%}."
    )
