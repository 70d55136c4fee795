"""What was written under a prompt, by the model and by its tool, and how it becomes a batch.

A prompt is padded on the left to :data:`PROMPT` tokens, so that all completions of a batch begin in the same column.
The padding is an ordinary token, read in training as in sampling, and the base has learned to ignore it: no mask is
needed, and a token's top-k is chosen among the same keys in both. (Servers do without padding, at the price of batches
whose rows end in different places.)

:class:`Demonstrations` is what the base reads: solutions, of which a share has one symbol changed. A model that
imitates them knows the tasks and makes slips, which is where reinforcement learning finds something to do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from dsa.datasets import rl_domains
from dsa.datasets.recall_tasks import Episodes
from dsa.datasets.rl_domains import Problem
from dsa.datasets.rl_symbols import BRACKETS, DIGITS, END, FAILED, NAMES, PAD, Ids

PROMPT, COMPLETION = 18, 16  # the longest prompt; the longest solution with the tool's words and one token to spare
LENGTH = PROMPT + COMPLETION
_CONFUSABLE = {token: group for group in (DIGITS, NAMES, BRACKETS) for token in group}


@dataclass(frozen=True)
class Transcript:
    """A completion: ``tokens`` of the model and of the tool in order, and which are the model's own."""

    problem: Problem
    tokens: Ids
    completion_mask: tuple[bool, ...]

    @property
    def completion(self) -> Ids:
        """The model's tokens alone, which is what a checker sees."""
        return tuple(token for token, own in zip(self.tokens, self.completion_mask, strict=True) if own)

    @property
    def correct(self) -> bool:
        """Whether it solves its problem."""
        return rl_domains.correct(self.problem, self.completion)


def run_with_tool(problem: Problem, completion: Sequence[int]) -> Transcript:
    """Let a model write ``completion`` and the tool reply; after its ✗ all that is left to write is END."""
    tokens, own, written = list[int](), list[bool](), list[int]()
    for token in completion:
        token = END if FAILED in tokens else token
        written.append(token)
        reply = rl_domains.tool_reply(problem, tuple(written))
        tokens += [token, *reply]
        own += [True, *(False for _ in reply)]
        if token == END:
            break
    return Transcript(problem, tuple(tokens), tuple(own))


def demonstration(problem: Problem) -> Transcript:
    """A right solution."""
    return run_with_tool(problem, rl_domains.solve(problem))


def noisy_demonstration(rng: Random, problem: Problem) -> Transcript:
    """A solution with one digit, name or bracket exchanged for another."""
    completion = list(rl_domains.solve(problem))
    place = rng.choice([n for n, token in enumerate(completion) if token in _CONFUSABLE])
    completion[place] = rng.choice([token for token in _CONFUSABLE[completion[place]] if token != completion[place]])
    return run_with_tool(problem, completion)


def prompts(problems: Sequence[Problem]) -> Tensor:
    """Prompts padded on the left: (B, PROMPT)."""
    return torch.tensor([[PAD] * (PROMPT - len(p.prompt)) + list(p.prompt) for p in problems])


def batch(transcripts: Sequence[Transcript]) -> Episodes:
    """Transcripts as a batch (B, LENGTH) in which the model's own tokens count."""
    rest = [COMPLETION - len(one.tokens) for one in transcripts]
    written = [list(one.tokens) + [PAD] * left for one, left in zip(transcripts, rest, strict=True)]
    own = [list(one.completion_mask) + [False] * left for one, left in zip(transcripts, rest, strict=True)]
    loss_mask = torch.cat([torch.zeros(len(own), PROMPT, dtype=torch.bool), torch.tensor(own)], dim=1)
    tokens = torch.cat([prompts([one.problem for one in transcripts]), torch.tensor(written)], dim=1)  # (B, LENGTH)
    nowhere = torch.empty(len(tokens), 0, dtype=torch.int64)
    return Episodes(tokens, loss_mask, nowhere, nowhere)


def sample_problems(
    generator: torch.Generator, names: Sequence[str], size: int, level: int | None = None
) -> list[Problem]:
    """``size`` problems, domains in turn, all else drawn."""
    rng = Random(int(torch.randint(2**62, (1,), generator=generator)))
    return [rl_domains.generate(rng, names[n % len(names)], level) for n in range(size)]


@dataclass(frozen=True)
class Demonstrations:
    """A task: worked solutions in ``names``' domains, a share ``noise`` of which has a mistake in it."""

    names: tuple[str, ...] = tuple(rl_domains.DOMAINS)
    noise: float = 0.4

    def generate(self, generator: torch.Generator, size: int) -> Episodes:
        """``size`` transcripts."""
        problems = sample_problems(generator, self.names, size)
        rng = Random(int(torch.randint(2**62, (1,), generator=generator)))
        return batch([noisy_demonstration(rng, p) if rng.random() < self.noise else demonstration(p) for p in problems])

    def score(self, logits: Tensor, episodes: Episodes) -> dict[str, float]:
        """``said``: share of the model's own tokens that were the likeliest."""
        mask = episodes.loss_mask[:, 1:]
        right = logits[:, :-1].argmax(-1) == episodes.tokens[:, 1:]
        return {"said": right[mask].float().mean().item()}
