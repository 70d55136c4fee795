"""The two exercises of chapter 03 that belong to its bug museum: what a ReLU is for, and the test that was missing.

The second one turns the usual arrangement round. The reader does not write code that the checker tests, but a test,
and the checker shows it models: right ones, which it must accept, and each exhibit of the museum, which it must refuse.
A test that refuses everything is as wrong as one that accepts everything. Some mistakes are made in the last layer
alone, where no other layer carries them to the last token, so that a test must look at every row. And that layer's
attention writes nothing yet, so that no logit moves: a test must look at what is selected.
"""

from copy import deepcopy

import torch
from torch import Tensor

from course.bugs import bug_catalogue
from course.exercises.exercise import Answer, Exercise, require
from dsa.kernels import loops


def my_two_heads() -> tuple[Tensor, Tensor]:
    """Queries q (2, 2) and weights w (2,) of an indexer with two heads.

    The keys (0, 1) and (0, -1) must both score higher than the keys
    (1, 0) and (-1, 0).
    """
    q = torch.tensor([[0.0, 1.0], [0.0, -1.0]])  # one head for each
    w = torch.tensor([1.0, 1.0])
    return q, w


def _both_north():
    """Both heads look for the same key."""
    return torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([1.0, 1.0])


def _signed():
    """Gives the southern head a negative weight: it then pushes the south away."""
    return torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([1.0, -1.0])


def _one_each():
    """Looks for the north with one head and away from the east with the other: west wins over south."""
    return torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.tensor([1.0, 1.0])


def _check_two_heads(answer: Answer) -> None:
    q, w = answer()
    fits = getattr(q, "shape", None) == (2, 2) and getattr(w, "shape", None) == (2,)
    require(fits, "return q of shape (2, 2) and w of shape (2,)")
    q, w = q.float(), w.float()
    keys = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]])
    scores = loops.index_scores(q[None, None].expand(1, 4, 2, 2), keys[None], w[None, None].expand(1, 4, 2))[0, -1]
    names = ("north", "south", "east", "west")
    said = ", ".join(f"{name} {score:.2f}" for name, score in zip(names, scores.tolist(), strict=True))
    require(min(scores[:2]) > max(scores[2:]), f"your scores are {said}: north and south must beat east and west")


def my_test(model, tokens, golden) -> bool:
    """True if the model's indexer works, False if it does not.

    golden[K], for K in 4, 8 and 64, is what a right model gave:
    golden[K].logits (1, 40, vocab), golden[K].sets[layer][t], a set.
    """
    model.top_k = 4
    _, trace = model(tokens, trace=True)
    for layer, right in zip(trace, golden[4].sets, strict=True):
        rows = layer.selected[0].tolist()
        if [{s for s in row if s >= 0} for row in rows] != right:
            return False
    return True


def _everything_selected(model, tokens, golden) -> bool:
    """Tests with K >= S, as the published code was tested: every token is chosen whatever its score."""
    model.top_k = 64
    return torch.allclose(model(tokens), golden[64].logits, atol=1e-3)


def _one_layer(model, tokens, golden) -> bool:
    """Tests the first layer only, all rows of it."""
    model.top_k = 4
    _, trace = model(tokens, trace=True)
    return bug_catalogue.chosen_sets(trace[0].selected[0]) == golden[4].sets[0]


def _last_rows(model, tokens, golden) -> bool:
    """Tests the last query of every layer: it has no future, so nobody sees what the mask does."""
    model.top_k = 4
    _, trace = model(tokens, trace=True)
    rows = [bug_catalogue.chosen_sets(layer.selected[0])[-1] for layer in trace]
    return rows == [sets[-1] for sets in golden[4].sets]


def _last_logits(model, tokens, golden) -> bool:
    """Tests what the last token predicts: what only earlier tokens read does not show in it."""
    model.top_k = 4
    return torch.allclose(model(tokens)[:, -1], golden[4].logits[:, -1], atol=1e-4)


def _every_logit(model, tokens, golden) -> bool:
    """Tests all logits and no selection: where attention writes nothing yet, a wrong selection moves none of them."""
    for top_k in (4, 8):
        model.top_k = top_k
        if not torch.allclose(model(tokens), golden[top_k].logits, atol=1e-6):
            return False
    return True


def _to_the_bit(model, tokens, golden) -> bool:
    """Demands equal bits: a right model that lists its tokens in another order fails."""
    model.top_k = 4
    return torch.equal(model(tokens), golden[4].logits)


def _same_token(model, tokens, golden) -> bool:
    """Looks at the likeliest next token only, which often survives a wrong choice."""
    model.top_k = 8
    return torch.equal(model(tokens)[:, -1].argmax(-1), golden[8].logits[:, -1].argmax(-1))


def _check_test(answer: Answer) -> None:
    model, tokens, golden = bug_catalogue.fixture_model()
    missed = []
    for name, circumstance, right in bug_catalogue.cases():
        with circumstance, torch.no_grad():
            said = answer(deepcopy(model), tokens.clone(), golden)
        require(said in (True, False), f"return True or False, not {said!r}")
        require(said or not right, f"your test refuses {name}")
        if said and not right:
            missed.append(name)
    total = len(bug_catalogue.INDEXER_BUGS) + len(bug_catalogue.MASK_BUGS)
    silent = any(name.endswith("last layer only") for name in missed)
    why = ". In the last layer they move no logit, since its attention writes nothing yet: look at what is selected"
    caught = f"your test catches {total - len(missed)} of {total} mistakes; missed: {'; '.join(missed)}"
    require(not missed, caught + why * silent)


EXERCISES = (
    Exercise(
        "What only a ReLU can say", 2, 10,
        "Four keys: north (0, 1), south (0, -1), east (1, 0), west (-1, 0). Without an activation no indexer can rank "
        "both north and south above both east and west: its score is v . k for some v, so north and south have "
        "opposite scores, and so have east and west. With a ReLU two heads are enough. Find them.",
        ("A head with a ReLU scores keys on its own side, and is silent about the other.",
         "Two heads with opposite queries: together they say |q . k|.",
         "q = north and south; both weights positive."),
        my_two_heads, (_both_north, _signed, _one_each), _check_two_heads,
    ),
    Exercise(
        "The test that was missing", 3, 30,
        "Write the test that the museum's mistakes would not have survived. It gets a model, 40 tokens, and what a "
        "right model gave for three values of K. It may set `model.top_k`. The checker shows your test two right "
        "models, one of which lists its chosen tokens in another order, and then the same model with each of the "
        "mistakes, and with some of them in one layer only. Accept the first two, refuse all others. (The output "
        "projection of the last layer's attention is still zero: what that layer selects moves no logit.)",
        ("Which of the three K is useless here, with 40 tokens?",
         "`_, trace = model(tokens, trace=True)`; then `trace[layer].selected[0]` holds a row of chosen tokens for "
         "each query, with -1 in empty slots. Compare sets, not lists.",
         "Compare *every* row of *every* layer: the last query has no future, so a mistake with the mask does not show "
         "in its choice, unless a layer below has spoilt what it reads."),
        my_test, (_everything_selected, _one_layer, _last_rows, _last_logits, _every_logit, _to_the_bit, _same_token),
        _check_test,
    ),
)  # fmt: skip
