"""Sampling completions for reinforcement learning: many prompts at once, from the cache, with tools that answer.

Prompts are padded on the left to one length (`datasets.rl_transcripts`), so a batch writes its tokens in the same
columns. Where a tool has something to say to a row, its tokens take the place of the next samples; they are read like
any other and marked as not the model's own. A row that has ended is filled up with padding.

**The trap.** Sampling reads one token at a time from a cache, training reads the whole row at once. If the two choose
other keys, the gradient belongs to a model that did not write the text: the ratio of probabilities in GRPO is then not
1 where it should be. It happens when the sampler runs in other numbers, with another K, or dense. Here both run the
same operations, so a selection can differ by the order of floating-point sums only. :func:`gap` measures what is left,
in selections and in log-probabilities, for any two settings of a model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa.datasets import rl_domains, rl_transcripts
from dsa.datasets.rl_domains import Problem
from dsa.datasets.rl_symbols import END, PAD
from dsa.datasets.rl_transcripts import PROMPT, Transcript
from dsa.generation.decode import prefill
from dsa.generation.sampling import Sampling
from dsa.model.transformer import Transformer


@dataclass(frozen=True)
class Rollout:
    """B completions of problems, P = PROMPT tokens of prompt before them.

    - ``tokens`` (B, T): prompt and completion, padding behind the end;
    - ``own`` (B, T) bool: sampled by the model, its END included; neither prompt, nor tool, nor padding;
    - ``logprobs`` (B, T): log-probability with which each own token was sampled, 0 elsewhere.
    """

    problems: list[Problem]
    tokens: Tensor
    own: Tensor
    logprobs: Tensor

    @property
    def lengths(self) -> Tensor:
        """How many tokens the model wrote itself: (B,)."""
        return self.own.sum(1)

    @property
    def ended(self) -> Tensor:
        """Whether the model came to an end by itself: (B,) bool."""
        return ((self.tokens == END) & self.own).any(1)

    def transcripts(self) -> list[Transcript]:
        """The completions, one by one."""
        rows = zip(self.problems, self.tokens[:, PROMPT:].tolist(), self.own[:, PROMPT:].tolist(), strict=True)
        return [Transcript(problem, *_until_end(tokens, own)) for problem, tokens, own in rows]


def _until_end(tokens: list[int], own: list[bool]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    stop = next((n + 1 for n, token in enumerate(tokens) if token == END and own[n]), len(tokens))
    return tuple(tokens[:stop]), tuple(own[:stop])


class _Row:
    """One completion while it is written: what the model has said, and what the tool still has to say."""

    def __init__(self, problem: Problem):
        self.problem, self.said, self.waiting, self.done = problem, list[int](), list[int](), False

    def take(self, sampled: int) -> tuple[int, bool]:
        """The next token, and whether it is the model's own: the tool's if it has something to say, else the sample."""
        if self.done:
            return PAD, False
        if self.waiting:
            return self.waiting.pop(0), False
        self.said.append(sampled)
        self.done = sampled == END
        self.waiting = list(rl_domains.reply(self.problem, tuple(self.said)))
        return sampled, True


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Evaluation mode and no gradients, and back to the mode before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def sample(
    model: Transformer,
    problems: Sequence[Problem],
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    max_completion_length: int = rl_transcripts.COMPLETION,
) -> Rollout:
    """Write one completion under each problem, with the model as it is set; temperature 0 takes the likeliest token.

    Raises ValueError for a negative temperature or no room for a completion.
    """
    sampling = Sampling(temperature)
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length={max_completion_length} must be at least 1")
    tokens, rows = rl_transcripts.prompts(problems), [_Row(problem) for problem in problems]
    own, logprobs = [torch.zeros_like(tokens, dtype=torch.bool)], [torch.zeros(tokens.shape)]
    with evaluating(model):
        cache, last = model.new_cache(len(rows), PROMPT + max_completion_length), tokens
        for _ in range(max_completion_length):
            drawn = sampling.sample(prefill(model, last, cache), [generator])
            taken = [row.take(token) for row, token in zip(rows, drawn.ids.tolist(), strict=True)]
            last = torch.tensor([[token] for token, _ in taken])  # (B, 1)
            own.append(torch.tensor([[mine] for _, mine in taken]))
            logprobs.append(drawn.logprobs[:, None].masked_fill(~own[-1], 0))
            tokens = torch.cat([tokens, last], dim=1)
            if all(row.done for row in rows):
                break
    return Rollout(list(problems), tokens, torch.cat(own, dim=1), torch.cat(logprobs, dim=1))


def logprobs_of(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probability of each token, seen from the one before: logits (B, T, vocab) -> (B, T), 0 for the first."""
    found = (logits[:, :-1] / (temperature or 1.0)).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(found, (1, 0))


def gap(model: Transformer, rollout: Rollout, temperature: float = 1.0) -> dict[str, float]:
    """How far the model, reading the rows at once as it is now set, is from the one that sampled them.

    ``logprob`` is the largest difference of an own token's log-probability, ``ratio`` the mean of |ratio - 1| over own
    tokens, where ratio = p_now / p_sampled.
    """
    with evaluating(model):
        now = logprobs_of(model(rollout.tokens), rollout.tokens, temperature)
    apart = (now - rollout.logprobs)[rollout.own]
    return {"logprob": apart.abs().max().item(), "ratio": (apart.exp() - 1).abs().mean().item()}


def selections_agree(model: Transformer, tokens: Tensor) -> float:
    """Share of queries, over all layers, that choose the same keys token by token and all at once, for tokens (B, T).

    Raises ValueError for a model that selects nothing.
    """
    if model.attention == "dense":
        raise ValueError("attention='dense' selects nothing that could be compared: set it to 'sparse'")
    with evaluating(model):
        whole = [layer.selected for layer in model(tokens, trace=True)[1]]
        cache, same = model.new_cache(*tokens.shape), []
        for t in range(tokens.shape[1]):
            _, trace = model(tokens[:, t : t + 1], cache, trace=True)
            for at_once, layer in zip(whole, trace, strict=True):
                one, other = at_once[:, t].sort(-1).values, layer.selected[:, 0].sort(-1).values  # (B, K)
                width = min(one.shape[1], other.shape[1])  # the rest of the wider one is empty, -1, and sorts first
                same.append((one[:, -width:] == other[:, -width:]).all(-1).float().mean())
    return torch.stack(same).mean().item()


def accuracy(
    model: Transformer,
    names: Sequence[str],
    size: int = 250,
    *,
    temperature: float = 1.0,
    seed: int = 20_250_929,
    level: int | None = None,
) -> dict[str, float]:
    """Share of correct completions in each domain, of ``size`` problems each, the same for every model."""
    found = {}
    for name in names:
        generator = torch.Generator().manual_seed(seed)
        problems = rl_transcripts.draw(generator, [name], size, level)
        rollout = sample(model, problems, generator, temperature=temperature)
        found[name] = sum(one.correct for one in rollout.transcripts()) / size
    return found
