"""Generated tasks: what a model must be able to do, with the place where the answer stands known exactly.

Text alone cannot show what sparse attention has to achieve: bytes are local, and a window of 16 predicts them as
well as an indexer does. A needle needs one token far away, and since the task wrote it there, it can be asked not
only whether the model answered but whether the indexer *selected* the place.

- :class:`Copy`: distinct random symbols, repeated. Nothing but looking back helps, and every second token teaches
  it: a model that is shown needles straight away guesses for ever, one that has copied first learns them at once.
- :class:`Needles`: multi-query associative recall. Pairs ``key value`` overwrite random places of real text, and
  later each key appears again: its value is to be predicted, once, so that one place alone holds the answer.

A task is anything with ``generate(generator, size) -> Episodes`` and ``score(logits, episodes) -> dict``. All
randomness comes from the generator handed in, so a seed is a test set that everyone can rebuild.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dsa.datasets import byte_tokenizer
from dsa.datasets.corpus import Corpus


@dataclass(frozen=True)
class Episodes:
    """One batch of a task: B sequences of T tokens with n questions each.

    - ``tokens`` (B, T): ids.
    - ``loss_mask`` (B, T) bool: token t is to be predicted (from t - 1) and counts in the loss. What nobody can
      predict, such as a key, does not.
    - ``query`` (B, n): where each question stands; the model answers at this position.
    - ``source`` (B, n): the earlier position that holds the token to be answered.
    """

    tokens: torch.Tensor
    loss_mask: torch.Tensor
    query: torch.Tensor
    source: torch.Tensor

    @property
    def answers(self) -> torch.Tensor:
        """The token to be answered to each question, (B, n)."""
        return self.tokens.gather(1, self.source)

    @property
    def distance(self) -> torch.Tensor:
        """How many positions before its question each answer stands, (B, n)."""
        return self.query - self.source

    def correct(self, logits: torch.Tensor) -> torch.Tensor:
        """Whether the likeliest token of the whole vocabulary is the answer: logits (B, T, vocab) -> (B, n) bool."""
        rows = torch.arange(len(self.tokens), device=logits.device)[:, None]
        return logits[rows, self.query].argmax(-1) == self.answers


class Task(Protocol):
    """What training and evaluation need of a task."""

    def generate(self, generator: torch.Generator, size: int) -> Episodes:
        """``size`` new episodes, which follow from the generator alone."""

    def score(self, logits: torch.Tensor, episodes: Episodes) -> dict[str, float]:
        """Measures of the model's answers, by name."""


@dataclass(frozen=True)
class Copy:
    """A segment of distinct random keys and values, repeated until ``length`` tokens are full.

    The segment's own length is drawn anew for each sequence, between an eighth and a half of ``length``: a model
    cannot learn "look 20 back", it must find the symbol it sees and answer what followed it. ``first`` and ``symbols``
    say which ids are drawn: keys and values, unless the model has another alphabet.
    """

    length: int = 64
    first: int = byte_tokenizer.FIRST_KEY
    symbols: int = byte_tokenizer.KEYS + byte_tokenizer.VALUES

    def __post_init__(self) -> None:
        most = 2 * self.symbols
        if not 16 <= self.length <= most:
            raise ValueError(f"copy length must lie in 16 to {most} (twice the distinct symbols), not {self.length}")

    def generate(self, generator: torch.Generator, size: int) -> Episodes:
        """``size`` sequences; every token of a repeat but its very first is a question."""
        half = self.length // 2
        noise = torch.rand(size, self.symbols, generator=generator)
        symbols = self.first + noise.argsort(1)  # (B, symbols), each once
        period = torch.randint(self.length // 8, half + 1, (size, 1), generator=generator)
        place = torch.arange(self.length)
        tokens = symbols.gather(1, place % period)  # (B, T)
        query = torch.arange(half, self.length - 1).expand(size, -1)  # in a repeat, whatever the period
        return Episodes(tokens, place > period, query, query + 1 - period)

    def score(self, logits: torch.Tensor, episodes: Episodes) -> dict[str, float]:
        """``copy``: share of the second half predicted right."""
        return {"copy": episodes.correct(logits).float().mean().item()}


@dataclass(frozen=True)
class Needles:
    """``pairs`` definitions ``key value``, then as many ``queries`` or fewer, written over windows of ``corpus``.

    Keys are distinct and each is asked once at most; values repeat. The places are random and do not overlap, all
    definitions stand before all questions.
    """

    corpus: Corpus
    length: int = 256
    pairs: int = 8
    queries: int = 8
    split: str = "train"

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= self.pairs <= byte_tokenizer.KEYS:
            raise ValueError(
                f"{self.pairs} pairs and {self.queries} queries: needs 1 <= queries <= pairs <= {byte_tokenizer.KEYS}"
            )
        if 2 * (self.pairs + self.queries) > self.length:
            raise ValueError(
                f"{self.pairs} pairs and {self.queries} queries fill {2 * (self.pairs + self.queries)} tokens, "
                f"more than length {self.length}; take fewer or a longer sequence"
            )

    def generate(self, generator: torch.Generator, size: int) -> Episodes:
        """``size`` sequences of text with needles in them."""
        tokens = self.corpus.batch(generator, size, self.length, self.split)
        keys = byte_tokenizer.FIRST_KEY + torch.rand(size, byte_tokenizer.KEYS, generator=generator).argsort(1)
        values = (
            torch.randint(byte_tokenizer.VALUES, (size, self.pairs), generator=generator) + byte_tokenizer.FIRST_VALUE
        )
        asked = torch.rand(size, self.pairs, generator=generator).argsort(1)[:, : self.queries]  # (B, n)
        # starts of two-token slots, in order and without overlap: distinct places among fewer, each moved by its rank
        count = self.pairs + self.queries
        free = torch.rand(size, self.length - count, generator=generator)
        slots = free.argsort(1)[:, :count].sort(1).values + torch.arange(count)
        defined, query = slots[:, : self.pairs], slots[:, self.pairs :]
        tokens.scatter_(1, defined, keys[:, : self.pairs]).scatter_(1, defined + 1, values)
        tokens.scatter_(1, query, keys.gather(1, asked)).scatter_(1, query + 1, values.gather(1, asked))
        loss_mask = (tokens < byte_tokenizer.FIRST_KEY).scatter(1, query + 1, True)
        loss_mask[:, 0] = False
        return Episodes(tokens, loss_mask, query, defined.gather(1, asked) + 1)

    def score(self, logits: torch.Tensor, episodes: Episodes) -> dict[str, float]:
        """``recall``: share of all questions answered right; ``recall_far``: of those more than 32 back."""
        right, far = episodes.correct(logits).float(), episodes.distance > 32
        return {"recall": right.mean().item(), "recall_far": right[far].mean().item()}


@dataclass(frozen=True)
class Haystack:
    """A reader's text with one needle: ``tokens`` (T,), and the positions of key, value and the asking key."""

    tokens: torch.Tensor
    key: int
    value: int
    query: int

    @property
    def answer(self) -> int:
        """The id to be predicted at ``query``."""
        return int(self.tokens[self.value])


def insert_needle(text: str, length: int = 256, depth: float = 0.25, key: int = 0, value: int = 0) -> Haystack:
    """Write one ``key value`` into a text, between two words, and ask for the key at the end.

    ``depth`` 0 is the text's start, 1 its end. A text too long for ``length`` tokens keeps its last ones. Raises
    ValueError for a depth outside 0 to 1 or a length under 4.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in 0 (the start) to 1 (the end), not {depth}")
    if length < 4:
        raise ValueError(f"a text with a needle needs length 4 or more (key, value, key and a token), not {length}")
    ids = byte_tokenizer.last_tokens(byte_tokenizer.encode(text), length - 3)
    starts = [word.start for word in byte_tokenizer.words(ids)] + [len(ids)]
    position = min(starts, key=lambda start: abs(start - depth * len(ids)))
    key_id = byte_tokenizer.key(key)
    tokens = [*ids[:position], key_id, byte_tokenizer.value(value), *ids[position:], key_id]
    return Haystack(torch.tensor(tokens), position, position + 1, len(tokens) - 1)
