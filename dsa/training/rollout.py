"""Sampling completions for reinforcement learning: many prompts at once, from the cache, with tools that answer.

Prompts are padded on the left to one length (`datasets.rl_transcripts`), so a batch writes its tokens in the same
columns. Where a tool has something to say to a row, its tokens take the place of the next samples; they are read like
any other and marked as not the model's own. A row that has ended is filled up with padding.

**The trap.** Sampling reads one token at a time from a cache, training reads the whole row at once. If the two choose
other keys, the gradient belongs to a model that did not write the text: the ratio of probabilities in GRPO is then not
1 where it should be. It happens when the sampler runs in other numbers, with another K, or dense. Here both run the
same operations, so a selection can differ by the order of floating-point sums only. :func:`train_infer_mismatch`
measures what is left, in log-probabilities and ratios, and :func:`selection_agreement` in selections, for any two
settings of a model.

Attention is not the only one who chooses. A router chooses experts, and top-p chooses the tokens that may be drawn at
all. What was chosen while sampling can be written down with the samples and be chosen again in training, though the
weights have moved since: DeepSeek-V3.2's *keep routing* (:func:`replayed_routing`) and *keep sampling mask*
(:func:`logprobs_of`).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa.datasets import rl_domains, rl_transcripts
from dsa.datasets.rl_domains import Problem
from dsa.datasets.rl_symbols import END, PAD
from dsa.datasets.rl_transcripts import PROMPT, Transcript
from dsa.generation.decode import next_logits
from dsa.generation.sampling import Sampling
from dsa.model.transformer import Transformer


@dataclass(frozen=True)
class Rollout:
    """B completions of problems, P = PROMPT tokens of prompt before them.

    - ``tokens`` (B, T): prompt and completion, padding behind the end;
    - ``completion_mask`` (B, T) bool: sampled by the model, its END included; neither prompt, nor tool, nor padding;
    - ``logprobs`` (B, T): log-probability with which each own token was sampled, 0 elsewhere;
    - ``sampling_mask`` (B, T, vocab) bool: the tokens among which each own token was drawn, all tokens elsewhere. It
      takes vocab bytes a token; None if all could be drawn, or if nobody asked;
    - ``routing`` (B, T, expert layers, experts per token): what the routers chose when they read each token, -1 for the
      last one, which nobody read; None if nobody asked.
    """

    problems: list[Problem]
    tokens: Tensor
    completion_mask: Tensor
    logprobs: Tensor
    sampling_mask: Tensor | None = None
    routing: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """How many tokens the model wrote itself: (B,)."""
        return self.completion_mask.sum(1)

    @property
    def ended(self) -> Tensor:
        """Whether the model came to an end by itself: (B,) bool."""
        return ((self.tokens == END) & self.completion_mask).any(1)

    def rows(self, which: Tensor) -> "Rollout":
        """The completions that ``which`` (B,) bool picks."""
        return Rollout(
            [problem for problem, picked in zip(self.problems, which.tolist(), strict=True) if picked],
            self.tokens[which], self.completion_mask[which], self.logprobs[which],
            None if self.sampling_mask is None else self.sampling_mask[which],
            None if self.routing is None else self.routing[which],
        )  # fmt: skip

    def transcripts(self) -> list[Transcript]:
        """The completions, one by one."""
        written, own = self.tokens[:, PROMPT:].tolist(), self.completion_mask[:, PROMPT:].tolist()
        rows = zip(self.problems, written, own, strict=True)
        return [Transcript(problem, *_until_end(tokens, mask)) for problem, tokens, mask in rows]


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
        self.waiting = list(rl_domains.tool_reply(self.problem, tuple(self.said)))
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


@contextmanager
def recorded_routing(model: Transformer) -> Iterator[list[list[Tensor]]]:
    """Write down what each router chooses: for each layer of experts a list of choices (tokens, per token), by pass."""
    chosen = [list[Tensor]() for _ in model.gates()]
    hooks = [
        gate.register_forward_hook(lambda _gate, _tokens, routed, layer=layer: layer.append(routed[0]))
        for gate, layer in zip(model.gates(), chosen, strict=True)
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replayed_routing(model: Transformer, routing: Tensor | None) -> Iterator[None]:
    """Send tokens (B, T) to the experts of ``routing`` (B, T, layers, per token), -1 to those that the router chooses.

    What the experts count, and the routers' gradient, are those of today's weights. None changes nothing.
    """
    gates = model.gates()
    try:
        for number, gate in enumerate(gates):
            gate.replay = None if routing is None else routing[:, :, number].flatten(0, 1)
        yield
    finally:
        for gate in gates:
            gate.replay = None


def sample(
    model: Transformer,
    problems: Sequence[Problem],
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_completion_length: int = rl_transcripts.COMPLETION,
    keep_sampling_mask: bool = False,
    keep_routing: bool = False,
) -> Rollout:
    """Write one completion under each problem, with the model as it is set; temperature 0 takes the likeliest token.

    Below 1, ``top_p`` draws from the likeliest tokens that have this probability together. The last two say what is to
    be written down beside the text, for training to repeat.

    Raises ValueError for a negative temperature, a top_p outside 0 to 1, no room for a completion, and routing to be
    kept of a model without experts.
    """
    sampling = Sampling(temperature, top_p)
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length={max_completion_length} must be at least 1")
    if keep_routing and not model.gates():
        raise ValueError("keep_routing=True, but this model has no experts whose choice could be kept: leave it False")
    tokens, rows = rl_transcripts.prompts(problems), [_Row(problem) for problem in problems]
    own, logprobs, masks = [torch.zeros_like(tokens, dtype=torch.bool)], [torch.zeros(tokens.shape)], list[Tensor]()
    with evaluating(model), ExitStack() as stack:
        chosen = stack.enter_context(recorded_routing(model)) if keep_routing else []
        cache, last = model.new_cache(len(rows), PROMPT + max_completion_length), tokens
        for _ in range(max_completion_length):
            logits = next_logits(model, last, cache)  # (B, vocab)
            drawn = sampling.sample(logits, [generator])
            taken = [row.take(token) for row, token in zip(rows, drawn.ids.tolist(), strict=True)]
            last = torch.tensor([[token] for token, _ in taken])  # (B, 1)
            own.append(torch.tensor([[mine] for _, mine in taken]))
            logprobs.append(drawn.logprobs[:, None].masked_fill(~own[-1], 0))
            if keep_sampling_mask and top_p < 1:
                masks.append(sampling.log_probabilities(logits).isfinite() | ~own[-1])
            tokens = torch.cat([tokens, last], dim=1)
            if all(row.done for row in rows):
                break
    everything = [torch.ones_like(mask) for mask in masks[:1]] * PROMPT
    return Rollout(
        list(problems), tokens, torch.cat(own, dim=1), torch.cat(logprobs, dim=1),
        torch.stack(everything + masks, dim=1) if masks else None,
        _by_token(chosen, len(rows)) if chosen else None,
    )  # fmt: skip


def _by_token(chosen: list[list[Tensor]], rows: int) -> Tensor:
    """What routers chose, layer by layer and pass by pass -> (B, T, layers, per token), -1 for the token never read."""
    layers = [torch.cat([one.unflatten(0, (rows, -1)) for one in layer], dim=1) for layer in chosen]
    return torch.nn.functional.pad(torch.stack(layers, dim=2), (0, 0, 0, 0, 0, 1), value=-1)


def logprobs_of(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, sampling_mask: Tensor | None = None
) -> Tensor:
    """The log-probability of each token, seen from the one before: logits (B, T, vocab) -> (B, T), 0 for the first.

    With a ``sampling_mask`` (B, T, vocab), as a rollout under top-p leaves it, it is the probability among those that
    are left. Sampler and policy then share one set of actions; without it the policy's probability of what was drawn
    would be too small by what top-p cut off, and the ratio would not be 1 on unchanged weights.
    """
    logits = logits[:, :-1]
    if sampling_mask is not None:  # at t it is about the token at t, as the logits at t - 1 are
        logits = logits.masked_fill(~sampling_mask[:, 1:], float("-inf"))
    found = (logits / (temperature or 1.0)).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(found, (1, 0))


def train_infer_mismatch(model: Transformer, rollout: Rollout, temperature: float = 1.0) -> dict[str, float]:
    """How far the model, reading the rows at once as it is now set, is from the one that sampled them.

    What the rollout has kept of the sampler's choices is chosen again. ``logprob`` is the largest difference of an own
    token's log-probability, ``ratio`` the mean of |ratio - 1| over own tokens, where ratio = p_now / p_sampled.
    """
    with evaluating(model), replayed_routing(model, rollout.routing):
        now = logprobs_of(model(rollout.tokens), rollout.tokens, temperature, rollout.sampling_mask)
    apart = (now - rollout.logprobs)[rollout.completion_mask]
    return {"logprob": apart.abs().max().item(), "ratio": (apart.exp() - 1).abs().mean().item()}


def selection_agreement(model: Transformer, tokens: Tensor) -> float:
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
        problems = rl_transcripts.sample_problems(generator, [name], size, level)
        rollout = sample(model, problems, generator, temperature=temperature)
        found[name] = sum(one.correct for one in rollout.transcripts()) / size
    return found
