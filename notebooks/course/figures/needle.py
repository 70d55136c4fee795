"""A needle in a text: does whoever chooses the tokens find the one that matters?

A symbol and a value are hidden in a text and the symbol is asked for at its end. One earlier token holds the answer,
and its place is known. So there are two questions with sharp answers: was that token among the K chosen, and did the
model answer right?
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from course.ui.panel import Draw
from course.ui.reading import checked_int
from course.ui.style import COLOURS
from dsa.datasets import byte_tokenizer
from dsa.datasets.recall_tasks import Haystack, insert_needle
from dsa.model.transformer import Transformer

RUNS = {"dense": "dense", "indexer": "sparse", "window": "window", "random": "random"}
"""What to call a run, and what `model.attention` is set to for it."""
KEY, VALUE = 7, 11  # any would do; a model that is blind says the same value whatever the right one is


@dataclass(frozen=True)
class Answer:
    """What became of the question in one run: was the value's token chosen in any layer, and how sure is the model?"""

    found: bool
    right: bool
    probability: float
    said: str


@torch.no_grad()
def ask(model: Transformer, hidden: Haystack, top_k: int) -> dict[str, Answer]:
    """Ask for the needle once in each of RUNS; the model's settings are restored."""
    before = model.attention, model.top_k
    try:
        model.top_k = top_k
        return {name: _ask(model, hidden, attention) for name, attention in RUNS.items()}
    finally:
        model.attention, model.top_k = before


def _ask(model: Transformer, hidden: Haystack, attention: str) -> Answer:
    model.attention = attention
    logits, trace = model(hidden.tokens[None], trace=True)
    chances = logits[0, hidden.query].softmax(-1)
    said = int(chances.argmax())
    found = attention == "dense" or any((layer.selected[0, hidden.query] == hidden.value).any() for layer in trace)
    label = byte_tokenizer.token_labels([said])[0]
    return Answer(bool(found), said == hidden.answer, float(chances[hidden.answer]), label)


def draw_needle(model: Transformer, text: str) -> Draw:
    """Make a panel's callback: draw(depth, top_k) -> (figure, sentence); depth in percent of the text."""
    longest = model.config.max_position_embeddings

    def draw(depth: int, top_k: int) -> tuple[Figure, str]:
        checked_int("depth", depth, 0, 100, "0 is the beginning of the text, 100 its end")
        checked_int("top-k", top_k, 1, longest, f"the model reads at most {longest} tokens")
        hidden = insert_needle(text, length=longest, depth=depth / 100, key=KEY, value=VALUE)
        answers = ask(model, hidden, top_k)
        back = hidden.query - hidden.value
        return _figure(answers, back, top_k), _sentence(answers, back, top_k)

    return draw


def _sentence(answers: dict[str, Answer], back: int, top_k: int) -> str:
    finders = [name for name, answer in answers.items() if answer.right]
    losers = [name for name, answer in answers.items() if not answer.right]
    found = f"right: {', '.join(finders) or 'nobody'}; wrong: {', '.join(losers) or 'nobody'}"
    return f"The value stands {back} tokens back and each query keeps {top_k}. Asked for it, {found}."


def _figure(answers: dict[str, Answer], back: int, top_k: int) -> Figure:
    fig, ax = plt.subplots(figsize=(7.4, 2.3))
    for row, answer in enumerate(answers.values()):
        ax.barh(
            row, answer.probability, color=COLOURS[0] if answer.right else "#b0b0b0", hatch="" if answer.right else "//"
        )
        sign = "right" if answer.right else f"wrong: says {answer.said}"
        chosen = "value among the chosen" if answer.found else "value not among the chosen"
        ax.text(max(answer.probability, 0) + 0.01, row, f"{sign} ({chosen})", va="center", fontsize=9)
    ax.set_yticks(range(len(answers)), list(answers))
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.6), xticks=[0, 0.5, 1], xlabel="probability of the right value")
    ax.set_title(f"The needle is {back} tokens back, top-k is {top_k}")
    ax.grid(visible=False, axis="y")
    return fig
