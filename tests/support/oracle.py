"""The independent implementation that ours is held against: `transformers`, and how to see inside it.

It shares no line with this package: dense attention under a mask, another cache, another router. Its indexer hands
out the selected keys, its router the chosen experts; forward hooks collect both. Its selections contain filler beyond
the causal limit, which is cut off here.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, logging

from dsa.kernels.reference import causal_mask, selection_mask
from dsa.model.moe import Gate

logging.disable_progress_bar()
logging.set_verbosity_error()


@dataclass
class Seen:
    """One forward pass: logits (B, T, vocab), per layer the kept keys (B, T, S) and experts (B * T, E) as masks."""

    logits: Tensor
    kept: list[Tensor]
    experts: list[Tensor]


def load(folder: Path):
    """The folder as `transformers` reads it."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def expert_mask(chosen: Tensor, E: int) -> Tensor:
    return torch.zeros(len(chosen), E, dtype=torch.bool).scatter(-1, chosen.long(), True)


@torch.no_grad()
def theirs(model, tokens: Tensor) -> Seen:
    """Run `transformers`' model and look inside."""
    T, seen = tokens.shape[1], Seen(tokens, [], [])
    hooks = []
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "indexer"):
            collect = lambda *a: seen.kept.append(selection_mask(a[-1].long(), T) & causal_mask(T, T))  # noqa: E731
            hooks.append(layer.self_attn.indexer.register_forward_hook(collect))
        if hasattr(layer.mlp, "gate"):
            collect = lambda *a: seen.experts.append(expert_mask(a[-1][2], model.config.n_routed_experts))  # noqa: E731
            hooks.append(layer.mlp.gate.register_forward_hook(collect))
    seen.logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def ours(model, tokens: Tensor) -> Seen:
    """Run our model and look at the same things."""
    T, seen = tokens.shape[1], Seen(tokens, [], [])
    hooks = [
        gate.register_forward_hook(
            lambda module, _, out: seen.experts.append(expert_mask(out[0], module.config.n_routed_experts))
        )
        for gate in model.modules()
        if isinstance(gate, Gate)
    ]
    seen.logits, trace = model(tokens, trace=True)
    for hook in hooks:
        hook.remove()
    if model.config.index_topk is not None:
        seen.kept = [selection_mask(layer.selected, T) for layer in trace]
    return seen


def differences(found: Seen, expected: Seen, tolerance: float = 5e-5) -> list[str]:
    """Everything in which two runs are not the same, in words; empty if they agree."""
    words = []
    error = (found.logits - expected.logits).abs().max().item()
    if not error <= tolerance:  # a NaN is a difference
        words.append(f"logits differ by {error:.1e}, allowed {tolerance}")
    for what in ("kept", "experts"):
        pairs = zip(getattr(found, what), getattr(expected, what), strict=True)
        rows = sum(int((a != b).any(-1).sum()) for a, b in pairs)
        if rows:
            words.append(f"{what} differ in {rows} rows")
    return words
