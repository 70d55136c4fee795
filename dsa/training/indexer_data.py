"""What a model can be taught on: its own vocabulary decides.

A model whose vocabulary is that of our tokenizer (305 ids) reads bytes and needles; its loss is bits per byte, and its
recall can be asked for. Any other model reads the ids of its own tokenizer, and its loss is nats per token: tokens
of different tokenizers are of different lengths, so these losses compare one model with itself and with nothing else.
Bytes as ids would be in range for every larger vocabulary and would mean nothing to the model, so they are refused.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsa.datasets import byte_tokenizer, token_ids
from dsa.datasets import corpus as texts
from dsa.datasets.corpus import Corpus
from dsa.datasets.recall_tasks import Episodes, Task
from dsa.training.pretrain import PAIRS, MixedNeedles

NEEDLES_FROM = 4 * max(PAIRS)  # tokens that hold the most pairs of MixedNeedles and their questions
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class PlainText:
    """Text and nothing else: every token but the first counts, nothing is asked."""

    corpus: Corpus
    length: int
    split: str = "train"

    def generate(self, generator: torch.Generator, size: int) -> Episodes:
        """``size`` windows of the text."""
        tokens = self.corpus.batch(generator, size, self.length, self.split)
        loss_mask = torch.ones_like(tokens, dtype=torch.bool)
        loss_mask[:, 0] = False
        nothing = tokens[:, :0]
        return Episodes(tokens, loss_mask, nothing, nothing)

    def score(self, logits: Tensor, episodes: Episodes) -> dict[str, float]:
        """No measures: there are no questions."""
        return {}


@dataclass(frozen=True)
class IndexerData:
    """A corpus in the ids of one model; ``in_bytes`` says that they are our tokenizer's."""

    corpus: Corpus
    length: int
    in_bytes: bool

    @property
    def needles(self) -> bool:
        """Whether needles can be asked for: they need our ids, and room."""
        return self.in_bytes and self.length >= NEEDLES_FROM

    @property
    def task(self) -> Task:
        """What is trained on."""
        return MixedNeedles(self.corpus, self.length) if self.needles else PlainText(self.corpus, self.length)


def load(folder: Path, vocab_size: int, path: Path | None, length: int) -> IndexerData:
    """Read the corpus at ``path`` (None: the standard library) for the model in ``folder``.

    Raises ValueError for text that the model has no ids for, ids that it does not have, and too little of either.
    """
    stored = bool(token_ids.token_files(path))
    in_bytes = not stored and vocab_size == byte_tokenizer.VOCAB
    if stored:
        assert path is not None
        corpus = token_ids.load_token_ids(path)
    elif in_bytes:
        corpus = texts.load(path)
    else:
        corpus = token_ids.retokenize(*_text_and_encoder(folder, vocab_size, path))
    _check_ids(corpus, vocab_size)
    corpus.require_length(length)
    return IndexerData(corpus, length, in_bytes)


def _text_and_encoder(folder: Path, vocab_size: int, path: Path | None):
    if not (folder / TOKENIZER).is_file():
        raise ValueError(
            f"vocab_size={vocab_size}, but our tokenizer, which turns text into bytes, has {byte_tokenizer.VOCAB} ids: "
            f"{'they do not fit' if vocab_size < byte_tokenizer.VOCAB else 'they would be noise to this model'}. "
            f"Put its own {TOKENIZER} into {folder}, or give --corpus token ids of its own (.npy or .safetensors)"
        )
    encode = token_ids.encoder(folder / TOKENIZER)
    return texts.load(path), encode


def _check_ids(corpus: Corpus, vocab_size: int) -> None:
    largest = max(int(part.max()) for part in (corpus.train, corpus.held_out, corpus.scripts) if len(part))
    if largest >= vocab_size:
        raise ValueError(
            f"{corpus.source} holds token id {largest}, but the model's vocab_size={vocab_size}: "
            "give ids that its own tokenizer made"
        )
