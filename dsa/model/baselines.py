"""Which keys a query may see: what the indexer is compared with.

Sparse attention is attention over a chosen set, and the indexer is only one way to choose. Three others need no
training and frame its result: the most recent K tokens (`window`, what a cheap model would do), K tokens at random
(`random`, the floor), and the K tokens that dense attention itself weighs most (`oracle`, the ceiling, which costs a
full dense attention and so saves nothing). All return selections as the kernels want them: (B, T, min(K, S)), -1 for
empty.
"""

import torch
from torch import Tensor

from dsa.kernels import ops
from dsa.kernels.reference import causal_mask

KINDS = ("dense", "sparse", "window", "random", "oracle")
"""What `model.attention` may be; "sparse" is the indexer's choice."""


def window(batch: int, T: int, S: int, top_k: int, device: torch.device | str = "cpu") -> Tensor:
    """Choose the last `top_k` visible keys, the query's own included."""
    own = torch.arange(S - T, S, device=device)[:, None]  # (T, 1)
    keys = own - torch.arange(min(top_k, S), device=device)  # (T, K)
    return keys.clamp(min=ops.EMPTY).expand(batch, -1, -1)


def random(batch: int, T: int, S: int, top_k: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Choose `top_k` visible keys with equal chances; the same seed gives the same choice."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, T, S, generator=generator).to(device)
    return ops.select(scores.masked_fill(~causal_mask(T, S, scores.device), float("-inf")), top_k)


def oracle(mass: Tensor, top_k: int) -> Tensor:
    """Choose the keys of greatest attention mass: (B, T, S) -> (B, T, min(K, S))."""
    T, S = mass.shape[1:]
    return ops.select(mass.masked_fill(~causal_mask(T, S, mass.device), float("-inf")), top_k)


def attention_recall(mass: Tensor, selected: Tensor) -> Tensor:
    """The share of its attention that each query keeps: mass (B, T, S), selected (B, T, K) -> (B, T) in 0 ... 1."""
    return mass.gather(-1, selected.clamp(min=0)).masked_fill(selected == ops.EMPTY, 0).sum(-1)
