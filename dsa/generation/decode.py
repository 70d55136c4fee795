"""The decode step, one for all: read tokens into a cache, get the states from which the next ones are predicted.

`generate`, speculative decoding, rollouts for reinforcement learning and runs of a few full-width layers differ in what
they feed and in what they do with the result, and in nothing between. A prompt is read in chunks, so that a pass is as
small for a long one as for a short one; a decoded token is a chunk of one. Ids are the caller's to check, once: those
that a model has chosen itself need no check, and checking would wait for the device at each token.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dsa.model.cache import Cache
from dsa.model.transformer import Transformer

CHUNK = 2048  # tokens of a prompt that one pass reads, all sequences together


@torch.inference_mode()
def decode_step(model: Transformer, tokens: Tensor, cache: Cache) -> Tensor:
    """Read the next tokens (B, T), one or many, and remember them -> normed hidden states (B, T, D).

    They are inference tensors, for which autograd keeps no books at all: that alone makes a small model's step about
    a sixth shorter. Whatever is computed from them under `no_grad` is an ordinary tensor again.
    """
    return model.run_layers(tokens, cache).hidden


def in_chunks(model: Transformer, tokens: Tensor, cache: Cache, chunk: int = CHUNK) -> Iterator[tuple[Tensor, Tensor]]:
    """Read tokens (B, T), `chunk` a pass, all rows together; yields each part and its states (B, t, D)."""
    for part in tokens.split(max(1, chunk // len(tokens)), dim=1):
        yield part, decode_step(model, part, cache)


@torch.no_grad()
def next_logits(model: Transformer, tokens: Tensor, cache: Cache, chunk: int = CHUNK) -> Tensor:
    """Read tokens (B, T), a prompt in chunks or one each -> the logits of what comes next (B, vocab)."""
    for _, states in in_chunks(model, tokens, cache, chunk):
        hidden = states
    return model.logits(hidden[:, -1:])[:, 0]
