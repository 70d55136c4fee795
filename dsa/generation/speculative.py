"""Speculative decoding: the extra layer guesses, the model checks several tokens in one pass, and nothing changes.

A pass that decodes one token reads every weight it needs, and one that reads three tokens reads them once as well. So
let something cheap guess the next tokens, and let the model read its own last token and the guesses together: it
then says after each of them what it would have written. Guesses are kept as long as they are that, and the model's
own next token comes on top. The output is the greedy one, token for token, whoever guesses; only the number of passes
depends on how good the guesses are. "Accepted length" is tokens written per pass: 1 if all guesses fail, 1 + `drafts`
if none does.

What was rejected stands in the caches already. It need not be erased: both caches are set back to the last token that
stayed, and the next pass writes over the rest. The guessing layer's entries for guessed positions came from its own
states, so they are always set back and made again from the model's.

Rows of a batch stay in step, so each pass keeps what *all* rows accept; one sequence alone gains most.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa.generation.decode import CHUNK, decode_step, in_chunks
from dsa.generation.generate import check, endings
from dsa.model.mtp import MTP
from dsa.model.transformer import Transformer


@dataclass(frozen=True)
class Speculation:
    """What was written, and how fast.

    Attributes:
        tokens: (B, T + new), the prompt included, as `generate` returns it.
        accepted: for each pass of the model after the prompt, how many guesses it kept.
    """

    tokens: Tensor
    accepted: list[int]

    @property
    def accepted_length(self) -> float:
        """Tokens written per pass of the model; plain decoding has 1."""
        return 1 + sum(self.accepted) / max(1, len(self.accepted))


class Drafter:
    """The extra layer with its memory: reads what the model reads, and guesses."""

    def __init__(self, model: Transformer, mtp: MTP, batch: int, capacity: int):
        self.model, self.mtp = model, mtp
        self.cache = mtp.new_cache(model, batch, capacity)
        self.length = 0  # positions read

    def read(self, hidden: Tensor, following: Tensor) -> Tensor:
        """Read states (B, T, D) and the tokens after them (B, T) -> the last state of its own (B, 1, D)."""
        context = self.model.context(self.length, following.shape[1], following.device)
        states = self.mtp.forward_mtp(hidden, following, context, self.cache).hidden
        self.length += following.shape[1]
        return states[:, -1:]

    def guess(self, state: Tensor, count: int) -> Tensor:
        """Guess tokens (B, count), the later ones from its own normed states, which it then forgets."""
        length = self.length
        guesses = [self.mtp.logits(state)[:, -1].argmax(-1, keepdim=True)]
        while len(guesses) < count:
            state = self.read(self.mtp.normed(state), guesses[-1])  # normed, as the model's states are
            guesses.append(self.mtp.logits(state)[:, -1].argmax(-1, keepdim=True))
        self.length = length
        self.cache.rewind(length)
        return torch.cat(guesses, dim=1)


@torch.no_grad()
def speculate(
    model: Transformer,
    mtp: MTP,
    prompt: Tensor,
    max_new_tokens: int = 64,
    *,
    drafts: int = 1,
    stop: int | Collection[int] = (),
    chunk: int = CHUNK,
) -> Speculation:
    """Continue prompts greedily, in fewer passes than `generate` and with the same result.

    Args:
        model: as it is set; the extra layer follows its settings.
        mtp: the extra layer, attached to the model.
        prompt: ids (B, T).
        max_new_tokens: how many to add at most.
        drafts: guesses a pass. The published layer was trained for one.
        stop: ids that end a sequence.
        chunk: tokens that one pass over the prompt reads.

    Raises:
        ValueError: as `generate` does, and for less than one draft.
    """
    if drafts < 1:
        raise ValueError(f"drafts={drafts} must be at least 1: without guesses use dsa.generate")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    check(model, prompt, max_new_tokens)
    return _Writing(model, mtp, prompt, max_new_tokens).write(drafts, endings(stop), chunk)


class _Writing:
    """One continuation under way."""

    def __init__(self, model: Transformer, mtp: MTP, prompt: Tensor, new: int):
        batch, length = prompt.shape
        self.model, self.prompt, self.new = model, prompt, new
        self.cache = model.new_cache(batch, length + new)
        self.drafter = Drafter(model, mtp, batch, length + new)
        self.written = prompt[:, :0]  # (B, n)
        self.accepted: list[int] = []

    def write(self, drafts: int, stop: frozenset[int], chunk: int) -> Speculation:
        """Read the prompt, then guess and check until all is written."""
        state = self.read_prompt(chunk)
        while self.written.shape[1] < self.new and not _ended(self.written, stop).all():
            few = min(drafts, self.new - self.written.shape[1] - 1)  # the model's own token comes on top
            guesses = self.drafter.guess(state, few) if few else self.written[:, :0]
            state = self.check_guesses(guesses)
        tokens = torch.cat([self.prompt, _cut(self.written, stop)], dim=1)
        return Speculation(tokens, self.accepted)

    def read_prompt(self, chunk: int) -> Tensor:
        """Read the prompt with model and extra layer -> the latter's last state."""
        for part, hidden in in_chunks(self.model, self.prompt, self.cache, chunk):
            read = self.cache.length  # the token after this part: the prompt's own, or the first that is written
            after = self.prompt[:, read : read + 1]
            after = after if after.numel() else self.next_tokens(hidden[:, -1:])
            state = self.drafter.read(hidden, torch.cat([part[:, 1:], after], dim=1))
        self.written = after
        return state

    def next_tokens(self, hidden: Tensor) -> Tensor:
        """What the model would write after each position: (B, T, D) -> (B, T)."""
        return self.model.logits(hidden).argmax(-1).to(self.prompt.dtype)

    def check_guesses(self, guesses: Tensor) -> Tensor:
        """Let the model read its last token and the guesses (B, k); keep what it agrees with, and its next token."""
        before = self.cache.length
        hidden = decode_step(self.model, torch.cat([self.written[:, -1:], guesses], dim=1), self.cache)
        own = self.next_tokens(hidden)  # (B, 1 + k)
        agreed = (own[:, :-1] == guesses).all(0).long()  # (k,): by all rows
        kept = int(agreed.cumprod(0).sum())
        self.accepted.append(kept)
        self.cache.rewind(before + 1 + kept)
        self.written = torch.cat([self.written, own[:, : kept + 1]], dim=1)
        return self.drafter.read(hidden[:, : kept + 1], own[:, : kept + 1])


def _ended(written: Tensor, stop: frozenset[int]) -> Tensor:
    """Which rows hold a stop token: (B, n) -> (B,)."""
    return torch.isin(written, torch.tensor(sorted(stop), device=written.device, dtype=written.dtype)).any(1)


def _cut(written: Tensor, stop: frozenset[int]) -> Tensor:
    """End rows (B, n) at their stop token, as `generate` does: the shorter ones are filled up with it."""
    written, last = written.clone(), 0
    for row in written:
        end = next((place for place, token in enumerate(row.tolist()) if token in stop), len(row) - 1)
        row[end:] = row[end].clone()
        last = max(last, end)
    return written[:, : last + 1]
