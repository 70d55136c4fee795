"""The same operations as whole matrices: easy to check, easy to differentiate, and no cheaper than dense attention.

Everything of size T x S is built and what must not count is masked away. That is how sparse attention is most often
written down, in published inference code too, and it saves nothing: the masked scores were computed first.
It serves as the reference that the fast path in `tiled` is held against. Signatures are those of `loops`.
"""

import torch
from torch import Tensor

from dsa.kernels.loops import EMPTY


def causal_mask(T: int, S: int, device: torch.device | None = None) -> Tensor:
    """Which keys the last T of S positions may see: (T, S) booleans, True where visible."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def at_least_fp32(x: Tensor) -> Tensor:
    """Widen half precision to fp32 and leave fp32 and fp64 as they are: scores and softmaxes are never half."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Score every visible key for every query (report Eq. 1); see `loops.index_scores`."""
    q, k, w = at_least_fp32(q), at_least_fp32(k), at_least_fp32(w)
    per_head = torch.einsum("btjw,bsw->btjs", q, k).relu()  # (B, T, J, S)
    scores = torch.einsum("btj,btjs->bts", w, per_head)  # Eq. 1
    return scores.masked_fill(~causal_mask(q.shape[1], k.shape[1], q.device), float("-inf"))


def topk_latest_on_ties(scores: Tensor, top_k: int) -> Tensor:
    """Choose the `top_k` best of each row, the later key among equals: (n, S) -> (n, K), in order of position."""
    threshold = scores.topk(top_k, dim=-1).values[:, -1:]
    above, tied = scores > threshold, scores == threshold
    rank_from_the_end = tied.flip(-1).cumsum(-1).flip(-1)  # 1 for the last tied key
    chosen = above | (tied & (rank_from_the_end <= top_k - above.sum(-1, keepdim=True)))
    return chosen.nonzero()[:, 1].view(-1, top_k)  # (n, K): each row has exactly K


def select(scores: Tensor, top_k: int) -> Tensor:
    """Choose the `top_k` best visible keys of each row: (B, T, S) -> (B, T, min(K, S)); see `loops.select`.

    `topk` takes any of equal scores. ReLU makes exact zeros, so ties are real, and which is taken would differ between
    prefill and decode: rows in which a tie is cut through are chosen again, by rule.
    """
    top_k = min(top_k, scores.shape[-1])
    values, indices = scores.topk(top_k, dim=-1)
    threshold = values[..., -1:]
    tie_cut = ((scores >= threshold).sum(-1) > top_k) & (threshold[..., 0] > float("-inf"))  # (B, T)
    if tie_cut.any():
        indices[tie_cut] = topk_latest_on_ties(scores[tie_cut], top_k)
    return indices.masked_fill(values == float("-inf"), EMPTY)


def index_topk(q: Tensor, k: Tensor, w: Tensor, top_k: int) -> Tensor:
    """Score and choose in one call -> selected (B, T, min(K, S))."""
    return select(index_scores(q, k, w), top_k)


def selection_mask(selected: Tensor, S: int) -> Tensor:
    """Turn index lists into a mask: selected (B, T, K) -> (B, T, S) booleans, True where chosen."""
    slots = selected.masked_fill(selected == EMPTY, S)  # empty slots fall into an extra last column
    chosen = torch.zeros(*selected.shape[:-1], S + 1, dtype=torch.bool, device=selected.device)
    return chosen.scatter(-1, slots, True)[..., :S]


def sparse_attention(q: Tensor, kv: Tensor, selected: Tensor, scale: float, value_width: int) -> Tensor:
    """Attend to the selected tokens only (report Eq. 2), by masking all others; see `loops.sparse_attention`."""
    logits = scale * torch.einsum("bthc,bsc->bths", at_least_fp32(q), at_least_fp32(kv))
    mask = selection_mask(selected, kv.shape[1])[:, :, None]  # (B, T, 1, S)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bths,bsc->bthc", weights.to(kv.dtype), kv[..., :value_width])  # Eq. 2


def attention_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Every head's scaled products, -inf in the future: q (B, T, H, *), k (B, S, G, *) -> (B, T, H, S)."""
    k = k.expand(-1, -1, q.shape[2], -1)  # G = 1: all heads share the key
    logits = scale * torch.einsum("bthd,bshd->bths", at_least_fp32(q), at_least_fp32(k))
    mask = causal_mask(q.shape[1], k.shape[1], q.device)[:, None]  # (T, 1, S)
    return logits.masked_fill(~mask, float("-inf"))


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Ordinary causal attention; see `loops.dense_attention`."""
    weights = attention_logits(q, k, scale).softmax(-1).to(v.dtype)
    return torch.einsum("bths,bshv->bthv", weights, v.expand(-1, -1, q.shape[2], -1))


def attention_mass(q: Tensor, k: Tensor, scale: float, selected: Tensor | None = None) -> Tensor:
    """How much attention each key gets, all heads together (report Eq. 3 and 4); see `loops.attention_mass`."""
    logits = attention_logits(q, k, scale)
    if selected is not None:  # each head over the selected set first, then the mean
        slots = selected[:, :, None].expand(-1, -1, q.shape[2], -1)  # (B, T, H, K)
        logits = logits.gather(-1, slots.clamp(min=0)).masked_fill(slots == EMPTY, float("-inf"))
    return logits.softmax(-1).mean(2)


def kl_divergence(mass: Tensor, scores: Tensor) -> Tensor:
    """KL(mass || softmax(scores)) of each row: (..., S), (..., S) -> (...). Scores of -inf take no part."""
    log_i = scores.log_softmax(-1).masked_fill(scores == float("-inf"), 0)
    return (torch.special.xlogy(mass, mass) - mass * log_i).sum(-1)


def gather_selected(scores: Tensor, selected: Tensor) -> Tensor:
    """Pick the scores of the selected keys: (B, T, S), (B, T, K) -> (B, T, K), -inf in empty slots."""
    return scores.gather(-1, selected.clamp(min=0)).masked_fill(selected == EMPTY, float("-inf"))


def indexer_loss(
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    q: Tensor,
    k: Tensor,
    scale: float,
    selected: Tensor | None = None,
) -> Tensor:
    """KL(p || softmax(I)), the mean over all queries (report Eq. 3 and 4); see `loops.indexer_loss`."""
    scores = index_scores(index_q, index_k, index_w)
    if selected is not None:
        scores = gather_selected(scores, selected)
    mass = attention_mass(q.detach(), k.detach(), scale, selected)
    return kl_divergence(mass, scores).mean()
