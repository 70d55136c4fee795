"""Losses that more than one stage uses: next tokens that count, and the indexers' divergence beside it."""

import math
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from dsa.datasets import byte_tokenizer
from dsa.datasets.recall_tasks import Episodes
from dsa.distributed import fsdp
from dsa.model.mtp import MTP
from dsa.model.transformer import Transformer


def language_loss(logits: Tensor, episodes: Episodes) -> Tensor:
    """Mean cross-entropy, in nats per token, of the tokens that count: logits (B, T, vocab) -> a scalar."""
    mask = episodes.loss_mask[:, 1:]
    mean = F.cross_entropy(logits[:, :-1][mask], episodes.tokens[:, 1:][mask])
    return mean * fsdp.token_weight(int(mask.sum()))  # a rank's mean weighs as much as it has tokens that count


def forward_with_indexer_loss(model: Transformer, tokens: Tensor, learn: bool = True) -> tuple[Tensor, Tensor]:
    """Logits (B, T, vocab), and beside them what the indexers have to learn from (Eq. 4), summed over layers.

    It is to be added to whatever the logits are trained for: neither reaches the other's weights. Under dense attention
    no indexer ranks anything, and it is zero.
    """
    if model.attention != "sparse" or not learn:
        logits = model(tokens)
        return logits, logits.new_zeros(())
    logits, divergences = model(tokens, indexer_loss=True)
    return logits, divergences.sum()


def bits_per_byte(logits: Tensor, tokens: Tensor) -> tuple[float, int]:
    """Bits spent on tokens[:, 1:], and the raw bytes these stand for: divide sums of them to average exactly."""
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    return nats.item() / math.log(2), int(byte_tokenizer.byte_count(tokens[:, 1:]).sum())


def multi_token_loss(model: Transformer, mtp: MTP, episodes: Episodes, weight: float = 0.3) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token and, `weight` times, of the one after it (DeepSeek-V3 report Eq. 24, 25).

    Args:
        model: predicts token t + 1.
        mtp: the extra layer, attached to it; predicts token t + 2. Its loss reaches the model too.
        episodes: tokens (B, T) of three or more, and which of them count.
        weight: 0.3, later 0.1 in V3.

    Returns:
        the sum of both, and the extra layer's own loss, unweighted and without gradient. Under sparse attention every
        indexer's divergence (Eq. 4), the extra layer's too, is in the sum, as in `forward_with_indexer_loss`.

    Raises:
        ValueError: for ids outside the vocabulary, and for indexers that rounding keeps from learning.
    """
    tokens, collect = episodes.tokens, None
    model.check_tokens(tokens)
    if model.attention == "sparse":
        model.check_indexers_can_learn()
        collect = "indexer_loss"
    below = model.run_layers(tokens, collect=collect)
    main = language_loss(model.logits(below.hidden), episodes)
    context = model.context(0, tokens.shape[1] - 2, tokens.device, collect)
    further = mtp.forward_mtp(below.hidden[:, :-2], tokens[:, 1:-1], context)  # states (B, T - 2, D)
    later = replace(episodes, tokens=tokens[:, 1:], loss_mask=episodes.loss_mask[:, 1:])
    extra = language_loss(F.pad(mtp.logits(further.hidden), (0, 0, 0, 1)), later)  # the last row predicts nothing
    loss = main + weight * extra
    if further.indexer_loss is not None:
        loss = loss + sum(below.indexer_losses) + further.indexer_loss
    return loss, extra.detach()
