"""The sampler, one for all: which token comes next, the likeliest, or one drawn from what is left of the distribution.

Temperature flattens or sharpens it. Top-p ("nucleus") then cuts the tail: kept are the likeliest tokens that together
have at least that probability. A tail of a hundred thousand tokens, each nearly impossible, is together likely enough
to derail a text every few words; that is what the cut prevents.

Whoever learns from what was drawn, as reinforcement learning does, needs the probability it was drawn with: `sample`
gives both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """Tokens that were chosen, ids (B,), and the log-probability of each in what was drawn from (B,)."""

    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Sampling:
    """How to choose a next token.

    Attributes:
        temperature: 0 takes the likeliest token; above, tokens are drawn, the flatter the higher.
        top_p: draw from the likeliest tokens that have this probability together; 1 keeps all.
        seed: of the drawing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0; 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1; 1 keeps all tokens")

    def generators(self, count: int, device: torch.device) -> list[torch.Generator]:
        """So many random generators, each as if it were alone."""
        return [torch.Generator(device).manual_seed(self.seed) for _ in range(count)]

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from: logits (B, vocab) -> (B, vocab), -inf for what top-p cuts off, the rest renormalised.

        At temperature 0 nothing is drawn; it gives the model's own distribution.
        """
        logits = logits / (self.temperature or 1.0)
        if self.top_p == 1:
            return logits.log_softmax(-1)
        ordered, places = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the probability of all likelier tokens
        cut = torch.zeros_like(places, dtype=torch.bool).scatter(-1, places, before >= self.top_p)
        return logits.masked_fill(cut, float("-inf")).log_softmax(-1)

    def sample(
        self, logits: Tensor, generators: Sequence[torch.Generator], drawing: Sequence[bool] | None = None
    ) -> Sample:
        """Choose a token for each row.

        Args:
            logits: (B, vocab).
            generators: one for all rows together, or one for each.
            drawing: for each row with its own generator, whether it draws now; the others' generators are left alone.

        Returns:
            ids and their log-probabilities, (B,) each; where a row does not draw, its likeliest token.
        """
        logprobs = self.log_probabilities(logits)
        ids = logits.argmax(-1)
        if self.temperature > 0 and len(generators) == 1:
            ids = torch.multinomial(logprobs.exp(), 1, generator=generators[0])[:, 0]
        elif self.temperature > 0:
            for row, generator in enumerate(generators):
                if drawing is None or drawing[row]:
                    ids[row] = torch.multinomial(logprobs[row].exp(), 1, generator=generator)[0]
        return Sample(ids, logprobs.gather(-1, ids[:, None])[:, 0])
