"""Writing on: read the prompt in chunks, then one token at a time from the cache.

Each new token costs K gathered latents a layer, whatever the length (plus the indexer's look at every key, small but
linear): the cache is what turns sparse attention into less work. Reading in chunks keeps a pass as small for a long
prompt as for a short one.

Prompts of different lengths go together. All begin at position 0 and go in step: the tokens that all prompts have are
read at once, then one position after another, where a row whose prompt goes on takes the prompt's token instead of a
new one. So there is no padding, and no position or mask to get wrong. It costs a pass for each position by which
the longest prompt exceeds the shortest; prompts that differ by more than is to be written go separately.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa.generation import memory
from dsa.generation.decode import CHUNK, next_logits
from dsa.generation.sampling import Sampling
from dsa.model.cache import check_capacity
from dsa.model.transformer import Transformer


@dataclass(frozen=True)
class Plan:
    """What is to be written.

    Attributes:
        new: tokens to add at most.
        sampling: how each is chosen.
        stop: ids that end a sequence.
        chunk: tokens that one pass over a prompt reads.
    """

    new: int
    sampling: Sampling
    stop: frozenset[int]
    chunk: int

    def __post_init__(self) -> None:
        if self.new < 0:
            raise ValueError(f"max_new_tokens={self.new} must be at least 0")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1: a pass reads one token or more")


def generate(
    model: Transformer,
    prompt: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    top_p: float = 1.0,
    stop: int | Collection[int] = (),
    chunk: int = CHUNK,
) -> Tensor | list[Tensor]:
    """Continue prompts.

    Args:
        model: as it is set: `model.attention` and `model.top_k` count.
        prompt: token ids (B, T), or a list of prompts of any lengths.
        max_new_tokens: how many to add at most.
        temperature: 0 takes the likeliest token; above, tokens are drawn, the flatter the higher.
        seed: of the drawing; a prompt alone and in a list is continued alike.
        top_p: draw from the likeliest tokens that have this probability together.
        stop: ids that end a sequence; they are its last token.
        chunk: tokens that one pass over the prompts reads. More is faster and takes more memory.

    Returns:
        (B, T + max_new_tokens), the prompt included; for a list, a list of 1-d tensors. A list's sequences end with
        their stop token. Rows of a tensor that stopped early are filled up with it; the tensor ends when all have.

    Raises:
        ValueError: for an empty prompt, a negative temperature or count, what exceeds the model's context, and a cache
            for which there is no memory; all before anything is allocated.
    """
    plan = _plan(max_new_tokens, temperature, seed, top_p, stop, chunk)
    if isinstance(prompt, Tensor):
        check(model, prompt, plan.new)
        return torch.cat([prompt, *(ids[:, None] for ids in _stream(model, prompt, plan))], dim=1)
    device = model.model.embed_tokens.weight.device
    prompts = [_one_prompt(one, device) for one in prompt]
    groups = _groups([len(one) for one in prompts], max_new_tokens)
    for group in groups:
        for i in group:
            check(model, prompts[i][None], max_new_tokens, rows=len(group))
    found: dict[int, Tensor] = {}
    for group in groups:
        found |= dict(zip(group, _together(model, [prompts[i] for i in group], plan), strict=True))
    return [found[i] for i in range(len(prompts))]


def stream(
    model: Transformer,
    prompt: Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    top_p: float = 1.0,
    stop: int | Collection[int] = (),
    chunk: int = CHUNK,
) -> Iterator[Tensor]:
    """Continue prompts (B, T) and yield each new token of all rows, ids (B,), as soon as it is there.

    The tokens, the arguments and the errors are those of `generate`; errors come at once, not with the first token.
    """
    plan = _plan(max_new_tokens, temperature, seed, top_p, stop, chunk)
    check(model, prompt, plan.new)
    return _stream(model, prompt, plan)


def _plan(new: int, temperature: float, seed: int, top_p: float, stop: int | Collection[int], chunk: int) -> Plan:
    return Plan(new, Sampling(temperature, top_p, seed), endings(stop), chunk)


def endings(stop: int | Collection[int]) -> frozenset[int]:
    """The ids that end a sequence, given as one or several."""
    return frozenset((stop,) if isinstance(stop, int) else stop)


def _one_prompt(ids: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """One prompt of a list: ids (T,)."""
    tokens = torch.as_tensor(ids, device=device)
    if tokens.ndim != 1:
        raise ValueError(f"a list must hold prompts, each a run of ids, not {ids!r}: for one prompt give [ids]")
    return tokens.long() if tokens.numel() == 0 else tokens


def check(model: Transformer, prompt: Tensor, new: int, rows: int | None = None) -> None:
    """Refuse a prompt (B, T) that `new` tokens cannot follow, or that has no room, beside others (`rows` in all)."""
    model.check_tokens(prompt)
    length = prompt.shape[1] + new
    check_capacity(model.config, length)
    memory.check_room(model, rows or len(prompt), length)


def _groups(lengths: Sequence[int], spread: int) -> list[list[int]]:
    """Which prompts go together: their numbers, in runs whose lengths differ by `spread` at most."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and lengths[number] - lengths[groups[-1][0]] <= spread:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _stream(model: Transformer, prompt: Tensor, plan: Plan) -> Iterator[Tensor]:
    """Yield the next token of all rows (B,), until all have stopped."""
    steps = _steps(model, list(prompt), plan, plan.sampling.generators(1, prompt.device))
    ended: dict[int, int] = {}  # row -> the token that ended it
    for ids in steps:
        for row, end in ended.items():
            ids[row] = end
        yield ids
        if plan.stop:  # whether a row has ended is the one thing that is read back from the device, token by token
            ended |= {row: token for row, token in enumerate(ids.tolist()) if token in plan.stop}
        if len(ended) == len(prompt):
            return


def _together(model: Transformer, prompts: list[Tensor], plan: Plan) -> list[Tensor]:
    """Continue prompts (T,), each of its own length, as each would be alone."""
    texts = [prompt.tolist() for prompt in prompts]
    ends = [len(text) + plan.new for text in texts]
    written = [text[: min(map(len, texts))] for text in texts]
    going = {row for row, end in enumerate(ends) if end > len(written[row])}
    generators = plan.sampling.generators(len(prompts), prompts[0].device)
    for step in _steps(model, prompts, plan, generators):
        ids = step.tolist()
        for row in sorted(going):
            written[row].append(ids[row])
            stopped = len(written[row]) > len(texts[row]) and written[row][-1] in plan.stop
            if stopped or len(written[row]) == ends[row]:
                going.remove(row)
        if not going:
            break
    return [
        torch.tensor(ids, device=prompt.device, dtype=prompt.dtype)
        for ids, prompt in zip(written, prompts, strict=True)
    ]


def _steps(
    model: Transformer, prompts: list[Tensor], plan: Plan, generators: list[torch.Generator]
) -> Iterator[Tensor]:
    """Yield token after token of all rows (B,), from the end of the shortest prompt on: the prompts' own, then new."""
    lengths = [len(prompt) for prompt in prompts]
    last = max(lengths) + plan.new
    if last == min(lengths):
        return
    cache = model.new_cache(len(prompts), last)
    tokens = torch.stack([prompt[: min(lengths)] for prompt in prompts])  # (B, T)
    for position in range(min(lengths), last):
        logits = next_logits(model, tokens, cache, plan.chunk)  # after the prompt, a pass over one token a row
        drawing = [position >= length for length in lengths]
        ids = plan.sampling.sample(logits, generators, drawing).ids.to(prompts[0].dtype)
        for row in (row for row, draws in enumerate(drawing) if not draws):
            ids[row] = prompts[row][position]
        yield ids
        tokens = ids[:, None]
