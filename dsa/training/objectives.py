"""Losses that more than one stage uses: next tokens that count, and the indexer's divergence beside it."""

import math

import torch.nn.functional as F
from torch import Tensor

from dsa.text import tokenizer
from dsa.text.tasks import Episodes
from dsa.training import distributed


def language_loss(logits: Tensor, episodes: Episodes) -> Tensor:
    """Mean cross-entropy, in nats per token, of the tokens that count: logits (B, T, vocab) -> a scalar."""
    counts = episodes.counts[:, 1:]
    own = F.cross_entropy(logits[:, :-1][counts], episodes.tokens[:, 1:][counts])
    return own * distributed.share(int(counts.sum()))


def bits_per_byte(logits: Tensor, tokens: Tensor) -> tuple[float, int]:
    """Bits spent on tokens[:, 1:], and the raw bytes these stand for: divide sums of them to average exactly."""
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    return nats.item() / math.log(2), int(tokenizer.byte_count(tokens[:, 1:]).sum())
