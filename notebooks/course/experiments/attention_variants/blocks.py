"""What all designs that choose blocks share: cutting a text into blocks, choosing some, and listing their tokens.

Block n holds the tokens n Z ... n Z + Z - 1, counted from the text's beginning. A query may choose among blocks that
are wholly past, and always reads its own block, as far as it goes: what is nearest is nearly always needed, and its
summary would hold tokens of the future.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa.kernels import ops
from dsa.kernels.reference import select


def cut(x: Tensor, size: int, empty: float = 0.0) -> Tensor:
    """Cut a sequence into blocks, the last one filled up with `empty`: (B, S, *) -> (B, N, Z, *), N = ceil(S / Z)."""
    missing = -x.shape[1] % size
    padded = F.pad(x, (*(0,) * (2 * (x.ndim - 2)), 0, missing), value=empty)
    return padded.unflatten(1, (-1, size))


def own_block(T: int, S: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """The block each of the last T of S positions is in: (T,)."""
    return torch.arange(S - T, S, device=device) // size


def past(T: int, S: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Which blocks lie wholly before a query's own: (T, N) booleans."""
    blocks = torch.arange(-(-S // size), device=device)
    return blocks < own_block(T, S, size, device)[:, None]


def best(scores: Tensor, count: int, S: int, size: int) -> Tensor:
    """Choose each query's own block and the `count - 1` best past ones: (B, T, N) -> (B, T, min(count, N)), or -1."""
    T, device = scores.shape[1], scores.device
    scores = scores.masked_fill(~past(T, S, size, device), float("-inf"))
    own = own_block(T, S, size, device)[None, :, None].expand(len(scores), -1, 1)
    return select(scores.scatter(-1, own, float("inf")), count)  # infinity: the own block always wins a slot


def tokens_of(chosen: Tensor, S: int, size: int) -> Tensor:
    """List the visible tokens of the chosen blocks: (B, T, n) -> (B, T, n Z), -1 where there is none."""
    T = chosen.shape[1]
    places = chosen[..., None] * size + torch.arange(size, device=chosen.device)  # (B, T, n, Z)
    own = torch.arange(S - T, S, device=chosen.device)[:, None, None]
    return places.masked_fill((chosen[..., None] == ops.EMPTY) | (places > own), ops.EMPTY).flatten(-2)


def shared(logits: Tensor, S: int, size: int) -> Tensor:
    """One score for all heads, as NSA has it: each head's softmax over past blocks, added: (B, T, H, N) -> (B, T, N).

    Adding the logits instead would let one head veto what another one needs. A query without a past block gets zeros.
    """
    visible = past(logits.shape[1], S, size, logits.device)[:, None]  # (T, 1, N)
    # a row of -inf alone has the softmax nan
    return logits.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0).sum(2)
