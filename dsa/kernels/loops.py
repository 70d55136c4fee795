"""The operations of DeepSeek Sparse Attention as loops: one equation, one line.

Read this file first. Nothing here is fast, and nothing here is clever: each function says with plain
indices what its faster twins in `reference` and `tiled` must equal. The three files have the same names,
the same signatures and the same answers, and the tests hold them together, gradients included.

Shape letters, here and everywhere: `B` batch, `T` query positions, `S` key positions, `H` attention heads,
`J` index heads, `W` index head width, `K` selected tokens. The queries are always the *last* T of the S
positions, so the query t stands at position `S - T + t` and may see the keys `0 ... S - T + t`. With that
one convention a whole prompt (T = S), a chunk of a prompt (1 < T < S) and one decoded token (T = 1) are the
same call.
"""

from itertools import product

import torch
from torch import Tensor

EMPTY = -1
"""What an unfilled slot of a selection holds: early queries see fewer than K keys."""


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Score every visible key for every query (report Eq. 1).

    Args:
        q: index queries (B, T, J, W).
        k: index keys (B, S, W), one per token, shared by the J heads.
        w: head weights (B, T, J), of either sign, their scale included.

    Returns:
        I (B, T, S), -inf where the key lies in the query's future. Never 0 there: a real score may be negative.
    """
    B, T, J, _ = q.shape
    S = k.shape[1]
    scores = q.new_full((B, T, S), float("-inf"))
    for b, t in product(range(B), range(T)):
        for s in range(S - T + t + 1):
            scores[b, t, s] = sum(w[b, t, j] * torch.relu(q[b, t, j] @ k[b, s]) for j in range(J))  # Eq. 1
    return scores


def select(scores: Tensor, top_k: int) -> Tensor:
    """Choose the best visible keys of each row: scores (B, T, S) -> selected (B, T, min(K, S)).

    A row with fewer visible keys than slots is filled up with `EMPTY`. Among equal scores the later
    key wins, so that prefill and decode choose alike. The order within a row means nothing: compare
    selections as sets.
    """
    B, T, S = scores.shape
    selected = torch.full((B, T, min(top_k, S)), EMPTY)
    for b, t in product(range(B), range(T)):
        visible = [s for s in range(S) if scores[b, t, s] > float("-inf")]
        ranked = sorted((-float(scores[b, t, s]), -s) for s in visible)[:top_k]
        best = [-s for _, s in ranked]
        selected[b, t, : len(best)] = torch.tensor(best, dtype=torch.long)
    return selected.to(scores.device)


def index_topk(q: Tensor, k: Tensor, w: Tensor, top_k: int) -> Tensor:
    """Score and choose in one call: the arguments of `index_scores` -> selected (B, T, min(K, S))."""
    return select(index_scores(q, k, w), top_k)


def sparse_attention(q: Tensor, kv: Tensor, selected: Tensor, scale: float, value_width: int) -> Tensor:
    """Attend to the selected tokens only (report Eq. 2), in the MQA mode of MLA.

    Args:
        q: absorbed queries (B, T, H, C + R).
        kv: one latent key per token (B, S, C + R), shared by all heads; its first C numbers are the value too.
        selected: token indices (B, T, K), `EMPTY` in slots to be left out.
        scale: what the dot products are multiplied by before the softmax.
        value_width: C.

    Returns:
        The attended latents (B, T, H, C).
    """
    B, T, H, _ = q.shape
    out = q.new_zeros(B, T, H, value_width)
    for b, t, h in product(range(B), range(T), range(H)):
        chosen = [int(s) for s in selected[b, t] if s != EMPTY]
        weights = torch.stack([scale * (q[b, t, h] @ kv[b, s]) for s in chosen]).softmax(0)
        out[b, t, h] = sum(p * kv[b, s, :value_width] for p, s in zip(weights, chosen, strict=True))  # Eq. 2
    return out


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend to every visible token: ordinary causal attention.

    Args:
        q: queries (B, T, H, any width).
        k: keys (B, S, G, the same width): G = H for one key per head, G = 1 for a key shared by all heads.
        v: values (B, S, G, V).
        scale: what the dot products are multiplied by before the softmax.

    Returns:
        (B, T, H, V).
    """
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    out = q.new_zeros(B, T, H, v.shape[-1])
    for b, t, h in product(range(B), range(T), range(H)):
        g, visible = h * G // H, S - T + t + 1
        weights = torch.stack([scale * (q[b, t, h] @ k[b, s, g]) for s in range(visible)]).softmax(0)
        out[b, t, h] = sum(weights[s] * v[b, s, g] for s in range(visible))
    return out


def attention_mass(q: Tensor, k: Tensor, scale: float, selected: Tensor | None = None) -> Tensor:
    """How much attention each key gets, all heads together: the teacher of the indexer (report Eq. 3 and 4).

    Args:
        q, k, scale: as in `dense_attention`.
        selected: if given (B, T, K), each head's softmax runs over these keys only, as in the sparse stage.

    Returns:
        p, summed over the heads and divided by H so that each row sums to 1: (B, T, S), or (B, T, K) in the
        order of `selected`, 0 in empty slots.
    """
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    mass = q.new_zeros(B, T, S if selected is None else selected.shape[-1])
    for b, t, h in product(range(B), range(T), range(H)):
        rows = range(S - T + t + 1) if selected is None else [int(s) for s in selected[b, t]]
        slots = [slot for slot, s in enumerate(rows) if s != EMPTY]
        logits = torch.stack([scale * (q[b, t, h] @ k[b, rows[slot], h * G // H]) for slot in slots])
        mass[b, t, slots] += logits.softmax(0) / H
    return mass


def indexer_loss(
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    q: Tensor,
    k: Tensor,
    scale: float,
    selected: Tensor | None = None,
) -> Tensor:
    """KL(p || softmax(I)), the mean over all queries: what teaches the indexer (report Eq. 3; Eq. 4 with `selected`).

    Args:
        index_q, index_k, index_w: as in `index_scores`.
        q, k, scale: the attention to imitate, as in `attention_mass`; no gradient flows into it.
        selected: if given, both distributions live on these keys only.
    """
    scores = index_scores(index_q, index_k, index_w)
    mass = attention_mass(q.detach(), k.detach(), scale, selected)
    B, T, _ = mass.shape
    total = scores.new_zeros(())
    for b, t in product(range(B), range(T)):
        rows = range(mass.shape[-1]) if selected is None else [int(s) for s in selected[b, t]]
        slots = [slot for slot, s in enumerate(rows) if s != EMPTY and scores[b, t, s] > float("-inf")]
        log_softmax = torch.stack([scores[b, t, rows[slot]] for slot in slots]).log_softmax(0)
        for slot, log_i in zip(slots, log_softmax, strict=True):
            p = mass[b, t, slot]
            total = total + torch.special.xlogy(p, p) - p * log_i  # Eq. 3, and Eq. 4 over the selected set
    return total / (B * T)
