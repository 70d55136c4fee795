"""Writing on: read the prompt once, then one token at a time from the cache.

Each new token costs K gathered latents a layer, whatever the length (plus the indexer's look at every key, small but
linear): the cache is what turns sparse attention into less work.
"""

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from dsa.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tensor | list[Tensor]:
    """Continue prompts.

    Args:
        model: as it is set: `model.attention` and `model.top_k` count.
        prompt: token ids (B, T), or a list of prompts of any lengths.
        max_new_tokens: how many to add.
        temperature: 0 takes the likeliest token; above, tokens are drawn, the flatter the higher.
        seed: of the drawing; a prompt alone and in a list is continued alike.

    Returns:
        (B, T + max_new_tokens), the prompt included; for a list, a list of 1-d tensors.

    Raises:
        ValueError: for an empty prompt, a negative temperature or count, and what exceeds the model's context.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be at least 0; 0 takes the likeliest token")
    if not isinstance(prompt, Tensor):
        alone = [_one_prompt(one, model.model.embed_tokens.weight.device) for one in prompt]
        return [_continue(model, one, max_new_tokens, temperature, seed)[0] for one in alone]
    return _continue(model, prompt, max_new_tokens, temperature, seed)


def _one_prompt(ids: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """One prompt of a list: ids (T,) -> (1, T)."""
    tokens = torch.as_tensor(ids, device=device)
    if tokens.ndim != 1:
        raise ValueError(f"a list must hold prompts, each a run of ids, not {ids!r}: for one prompt give [ids]")
    return tokens.long()[None] if tokens.numel() == 0 else tokens[None]


def _continue(model: Transformer, prompt: Tensor, max_new_tokens: int, temperature: float, seed: int) -> Tensor:
    model.check_tokens(prompt)
    generator = torch.Generator(prompt.device).manual_seed(seed)
    cache = model.new_cache(prompt.shape[0], prompt.shape[1] + max_new_tokens)
    tokens, last = prompt, prompt
    for _ in range(max_new_tokens):
        hidden, _ = model.hidden(last, cache)
        logits = model.lm_head(hidden[:, -1]).float()  # (B, vocab)
        last = sample(logits, temperature, generator)
        tokens = torch.cat([tokens, last], dim=1)
    return tokens


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Pick the next token of each row: logits (B, vocab) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


if __name__ == "__main__":
    import_module("dsa.inference.command").main()
