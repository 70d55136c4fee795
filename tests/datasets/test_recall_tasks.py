"""Tasks are what they say: the answer stands at its source, once, and everything follows from the generator."""

import pytest
import torch

from dsa.datasets import byte_tokenizer as tok
from dsa.datasets.recall_tasks import Copy, Needles, insert_needle


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def perfect(episodes):
    """Logits of a model that answers every question right."""
    logits = torch.zeros(*episodes.tokens.shape, tok.VOCAB)
    rows = torch.arange(len(episodes.tokens))[:, None]
    logits[rows, episodes.query, episodes.answers] = 1.0
    return logits


def test_copy_repeats_distinct_symbols():
    episodes = Copy(64).generate(seeded(), 50)
    assert torch.equal(episodes.answers, episodes.tokens.gather(1, episodes.query + 1))
    assert (episodes.tokens >= tok.FIRST_KEY).all() and (episodes.tokens < tok.VOCAB).all()
    assert len(episodes.distance[:, 0].unique()) > 10  # the period is not the same for all
    for row, counts in zip(episodes.tokens, episodes.loss_mask, strict=True):
        first = int(counts.int().argmax())  # the first counted token is the second of the first repeat
        assert len(row[: first - 1].unique()) == first - 1 and counts[first:].all()


def test_needles_have_one_source_each(text):
    task = Needles(text, length=128, pairs=8, queries=5)
    episodes = task.generate(seeded(), 40)
    tokens, query, source = episodes.tokens, episodes.query, episodes.source
    assert query.shape == source.shape == (40, 5) and (source < query).all()
    assert torch.equal(tokens.gather(1, query), tokens.gather(1, source - 1))  # the same key
    assert torch.equal(tokens.gather(1, query + 1), episodes.answers)
    for row, asked in zip(tokens, query, strict=True):
        for q in asked:
            assert (row[: q + 1] == row[q]).sum() == 2  # defined once, asked once
    assert ((tokens >= tok.FIRST_KEY).sum(1) == 2 * (8 + 5)).all()
    assert torch.equal(episodes.distance, query - source)


def test_only_what_can_be_predicted_counts(text):
    episodes = Needles(text, 128, 8, 5).generate(seeded(1), 10)
    special = episodes.tokens >= tok.FIRST_KEY
    counted = episodes.loss_mask & special
    assert (counted.sum(1) == 5).all()  # of keys and values only the answers
    assert (episodes.loss_mask | special)[:, 1:].all() and not episodes.loss_mask[:, 0].any()
    assert counted.gather(1, episodes.query + 1).all()


def test_the_text_around_a_needle_is_untouched(text):
    episodes = Needles(text, 96, 2, 1).generate(seeded(2), 5)
    plain = text.batch(seeded(2), 5, 96)
    text_places = episodes.tokens < tok.FIRST_KEY
    assert torch.equal(episodes.tokens[text_places], plain[text_places])


@pytest.mark.parametrize("pairs", [1, 16, 32])
def test_deterministic_and_fills_any_size(text, pairs):
    task = Needles(text, 128, pairs, pairs)
    a, b = task.generate(seeded(5), 8), task.generate(seeded(5), 8)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.source, b.source)
    assert not torch.equal(a.tokens, task.generate(seeded(6), 8).tokens)
    assert a.query.max() <= 126


def test_scores(text):
    for task, name in [(Copy(64), "copy"), (Needles(text, 128), "recall")]:
        episodes = task.generate(seeded(), 8)
        assert task.score(perfect(episodes), episodes)[name] == 1.0
        assert task.score(-perfect(episodes), episodes)[name] == 0.0


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_hide_keeps_words_whole(depth):
    text = "Zoë wrote 深度 on the wall, " * 3
    hidden = insert_needle(text, 256, depth, key=7, value=3)
    ids = hidden.tokens.tolist()
    assert ids[hidden.key] == ids[hidden.query] == tok.key(7)
    assert ids[hidden.value] == hidden.answer == tok.value(3) and hidden.query == len(ids) - 1
    without = ids[: hidden.key] + ids[hidden.value + 1 : -1]
    assert tok.decode(without) == text
    assert hidden.key in [word.start for word in tok.words(without)] + [len(without)]


def test_hide_keeps_the_last_tokens_of_a_long_text():
    hidden = insert_needle("a long text " * 100, 64)
    assert len(hidden.tokens) <= 64 and tok.decode(hidden.tokens[:-1]).endswith("long text ")
    assert len(insert_needle("", 8).tokens) == 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda text: Copy(128), "16 to 96.*128"),
        (lambda text: Needles(text, 64, 16, 17), "queries <= pairs"),
        (lambda text: Needles(text, 64, 33, 1), "pairs <= 32"),
        (lambda text: Needles(text, 64, 17, 16), "fill 66 tokens"),
        (lambda text: insert_needle("text", depth=1.5), "not 1.5"),
        (lambda text: insert_needle("text", length=3), "4 or more"),
        (lambda text: insert_needle("text", key=32), "0 to 31"),
    ],
)
def test_impossible_tasks_are_refused(text, call, words):
    with pytest.raises(ValueError, match=words):
        call(text)
