"""Which token comes next: the likeliest one, or one drawn from what is left of the distribution.

Temperature flattens or sharpens it. Top-p ("nucleus") then cuts the tail: kept are the likeliest tokens that together
have at least that probability. A tail of a hundred thousand tokens, each nearly impossible, is together likely enough
to derail a text every few words; that is what the cut prevents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
        """So many sources of chance, each as if it were alone."""
        return [torch.Generator(device).manual_seed(self.seed) for _ in range(count)]

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from, for a temperature above 0: logits (B, vocab) -> (B, vocab), rows sum to 1."""
        likely = (logits / self.temperature).softmax(-1)
        if self.top_p == 1:
            return likely
        ordered, places = likely.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the probability of all likelier tokens
        kept = ordered.masked_fill(before >= self.top_p, 0)
        return torch.zeros_like(likely).scatter(-1, places, kept / kept.sum(-1, keepdim=True))

    def pick(self, logits: Tensor, chances: Sequence[torch.Generator], drawing: Sequence[bool] | None = None) -> Tensor:
        """Choose a token for each row.

        Args:
            logits: (B, vocab).
            chances: one source of chance for all rows together, or one for each.
            drawing: for each row with its own source, whether it draws now; the others' sources are left alone.

        Returns:
            ids (B,); where a row does not draw, its likeliest token.
        """
        best = logits.argmax(-1)
        if self.temperature == 0:
            return best
        likely = self.probabilities(logits)
        if len(chances) == 1:
            return torch.multinomial(likely, 1, generator=chances[0])[:, 0]
        for row, chance in enumerate(chances):
            if drawing is None or drawing[row]:
                best[row] = torch.multinomial(likely[row], 1, generator=chance)[0]
        return best
