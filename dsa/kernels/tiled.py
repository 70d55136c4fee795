"""The same operations doing less work: in tiles of queries, and over gathered keys.

Two things are different from `reference`, and both matter. Nothing of size T x S is kept: a tile of queries is scored,
chosen and forgotten before the next one begins. And the selected tokens are *gathered*: attention over K of S tokens
then costs K, whatever S is. A query tile sees only the keys up to its own last position, which halves the
scoring of a prompt. All of it is plain torch and differentiable; signatures are those of `loops`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from dsa.kernels import indexer_loss as closed_form
from dsa.kernels import reference
from dsa.kernels.loops import EMPTY
from dsa.kernels.reference import at_least_fp32, causal_mask

QUERY_TILE = 128  # queries scored or attended at once
KEY_TILE = 1024  # keys scored at once: J x 128 x 1024 partial scores stay in cache
DENSE_TILE = 1024  # the dense baseline is fastest with larger tiles, and shall be as fast as it can


def tiles(T: int, S: int, size: int) -> Iterator[tuple[slice, int]]:
    """Cut T queries into tiles: yields the queries' slice and the number of keys that its last query sees."""
    for begin in range(0, T, size):
        end = min(begin + size, T)
        yield slice(begin, end), S - T + end


def score_tile(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Score one tile of queries against the keys up to its last query (report Eq. 1): -> (B, T, S)."""
    q, w = at_least_fp32(q), at_least_fp32(w)
    parts = []
    longer = max(1, QUERY_TILE // (8 * q.shape[1]))  # a decoded token has room for more keys at once
    for keys in k.split(KEY_TILE * longer, dim=1):
        per_head = torch.einsum("btjw,bsw->btjs", q, at_least_fp32(keys)).relu_()
        parts.append(torch.einsum("btj,btjs->bts", w, per_head))  # Eq. 1
    scores = torch.cat(parts, dim=-1)
    return scores.masked_fill_(~causal_mask(q.shape[1], k.shape[1], q.device), float("-inf"))


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Score every visible key for every query (report Eq. 1); see `loops.index_scores`."""
    T, S = q.shape[1], k.shape[1]
    rows = [
        F.pad(score_tile(q[:, rows], k[:, :seen], w[:, rows]), (0, S - seen), value=float("-inf"))
        for rows, seen in tiles(T, S, QUERY_TILE)
    ]
    return torch.cat(rows, dim=1)


def select(scores: Tensor, top_k: int) -> Tensor:
    """Choose the `top_k` best visible keys of each row, as `reference.select` does."""
    return reference.select(scores, top_k)


def index_topk(q: Tensor, k: Tensor, w: Tensor, top_k: int) -> Tensor:
    """Score and choose tile by tile -> selected (B, T, min(K, S)); no score outlives its tile."""
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    selected = torch.full((B, T, min(top_k, S)), EMPTY, device=q.device)
    for rows, seen in tiles(T, S, QUERY_TILE):
        chosen = select(score_tile(q[:, rows], k[:, :seen], w[:, rows]), top_k)
        selected[:, rows, : chosen.shape[-1]] = chosen
    return selected


def gather_rows(kv: Tensor, selected: Tensor) -> Tensor:
    """Gather the selected tokens: kv (B, S, D), selected (B, T, K) -> (B, T, K, D). Empty slots gather row 0."""
    slots = selected.clamp(min=0).flatten(1)  # (B, T * K)
    if kv.is_contiguous():
        B, S, D = kv.shape
        first = torch.arange(B, device=kv.device)[:, None] * S
        gathered = kv.view(B * S, D).index_select(0, (slots + first).flatten())
    else:  # part of a cache for several sequences: `reshape` would copy all of it, K rows are wanted
        gathered = torch.stack([row.index_select(0, chosen) for row, chosen in zip(kv, slots, strict=True)])
    return gathered.view(*selected.shape, -1)  # (B, T, K, D)


def sparse_tile(q: Tensor, kv: Tensor, selected: Tensor, scale: float, value_width: int) -> Tensor:
    """Attend from one tile of queries to its gathered tokens (report Eq. 2): -> (B, T, H, C)."""
    keys = gather_rows(kv, selected)  # (B, T, K, C + R)
    logits = scale * at_least_fp32(q @ keys.mT)  # (B, T, H, K)
    weights = logits.masked_fill((selected == EMPTY)[:, :, None], float("-inf")).softmax(-1)
    return weights.to(kv.dtype) @ keys[..., :value_width]  # Eq. 2


def sparse_attention(q: Tensor, kv: Tensor, selected: Tensor, scale: float, value_width: int) -> Tensor:
    """Attend to the selected tokens only (report Eq. 2), by gathering them; see `loops.sparse_attention`."""
    out = [
        sparse_tile(q[:, rows], kv, selected[:, rows], scale, value_width)
        for rows, _ in tiles(q.shape[1], kv.shape[1], QUERY_TILE)
    ]
    return torch.cat(out, dim=1)


def pad_values(v: Tensor, k: Tensor) -> Tensor:
    """Values as wide as keys, which the fused kernel wants: MLA's are the first numbers of the keys, others padded."""
    if v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and v.requires_grad == k.requires_grad:
        return k
    return F.pad(v, (0, k.shape[-1] - v.shape[-1]))


def dense_tile(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of one tile of queries (B, H, T, *) to the keys up to its last query (B, H, S, *)."""
    T, S = q.shape[2], k.shape[2]
    if T in (1, S):
        return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=T > 1)
    # a mask of numbers would lock the GPU's fastest kernel out; it knows this one by name
    flash = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    mask = causal_lower_right(T, S) if flash else causal_mask(T, S, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Ordinary causal attention by the library's fused kernel, as fast as it goes: the fair baseline.

    Values narrower than keys are padded, because the fused kernel otherwise falls back to a T x S matrix without a
    word. A key shared by all heads (G = 1) and a single query make the heads the rows of one matrix.
    """
    V, width = v.shape[-1], k.shape[-1]
    if width > V:
        v = pad_values(v, k)
    if q.shape[1] == 1 and k.shape[2] == 1:  # decode, MQA mode: H queries that all see all keys
        rows = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        return rows[..., :V]
    heads = (-1, q.shape[2], -1, -1)
    q, k, v = (
        q.transpose(1, 2),
        k.transpose(1, 2).expand(heads),
        v.transpose(1, 2).expand(heads),
    )  # (B, H, T or S, *)
    out = [
        dense_tile(q[:, :, rows], k[:, :, :seen], v[:, :, :seen], scale)
        for rows, seen in tiles(q.shape[2], k.shape[2], DENSE_TILE)
    ]
    return torch.cat(out, dim=2).transpose(1, 2)[..., :V]  # (B, T, H, V)


def attention_mass(q: Tensor, k: Tensor, scale: float, selected: Tensor | None = None) -> Tensor:
    """How much attention each key gets, all heads together (report Eq. 3 and 4); see `loops.attention_mass`.

    With `selected` and a shared key only the selected keys are ever looked at.
    """
    T, S = q.shape[1], k.shape[1]
    parts = []
    for rows, seen in tiles(T, S, QUERY_TILE):
        if selected is None:
            mass = reference.attention_mass(q[:, rows], k[:, :seen], scale)
            parts.append(F.pad(mass, (0, S - seen)))
        elif k.shape[2] == 1:
            keys = gather_rows(k[:, :, 0], selected[:, rows])  # (B, T, K, width)
            logits = scale * at_least_fp32(q[:, rows] @ keys.mT)  # (B, T, H, K)
            empty = (selected[:, rows] == EMPTY)[:, :, None]
            parts.append(logits.masked_fill(empty, float("-inf")).softmax(-1).mean(2))
        else:
            parts.append(reference.attention_mass(q[:, rows], k[:, :seen], scale, selected[:, rows]))
    return torch.cat(parts, dim=1)


def loss_tile(index_q, index_k, index_w, q, k, scale: float, selected: Tensor | None):
    """One tile's KL(p || softmax(I)), summed over its queries, with its gradients by the first three arguments."""
    if selected is None:
        return closed_form.dense_tile(index_q, index_k, index_w, closed_form.attention_target(q, k, scale))  # Eq. 3
    target, keys = attention_mass(q, k, scale, selected), gather_rows(index_k, selected)
    loss, grad_q, grad_keys, grad_w = closed_form.selected_tile(
        index_q, keys, index_w, target, selected == EMPTY
    )  # Eq. 4
    grad_k = torch.zeros_like(index_k, dtype=grad_keys.dtype)
    for grad, slots, grad_gathered in zip(grad_k, selected.clamp(min=0), grad_keys, strict=True):
        # gathering backwards: each gradient is added to the row its key came from; in empty slots it is 0
        grad.index_add_(0, slots.flatten(), grad_gathered.flatten(0, 1))
    return loss, grad_q, grad_k, grad_w


class _IndexerLoss(torch.autograd.Function):
    """The rows of the loss are independent: a tile's loss and gradient are computed together, then it is forgotten."""

    @staticmethod
    def forward(ctx, index_q, index_k, index_w, q, k, scale, selected):  # type: ignore[override]
        """Sum the tiles' losses and, in the same pass, their gradients."""
        (B, T, H, D), S = q.shape, k.shape[1]
        heads = max(H, index_q.shape[2])
        per_query = B * (heads * S if selected is None else max(heads, D) * selected.shape[2])  # its largest buffer
        tile = max(1, min(QUERY_TILE, closed_form.MAX_TILE_ELEMENTS // per_query))
        grads = [torch.zeros_like(at_least_fp32(x)) for x in (index_q, index_k, index_w)]  # never half precision
        total = grads[0].new_zeros(())
        for rows, seen in tiles(T, S, tile):
            chosen = None if selected is None else selected[:, rows]
            parts = (index_q[:, rows], index_k[:, :seen], index_w[:, rows], q[:, rows], k[:, :seen])
            loss, grad_q, grad_k, grad_w = loss_tile(*parts, scale, chosen)
            total += loss
            grads[0][:, rows], grads[2][:, rows] = grad_q, grad_w
            grads[1][:, :seen] += grad_k
        queries = B * T  # the loss is the mean over them
        inputs = (index_q, index_k, index_w)
        ctx.save_for_backward(*((grad / queries).to(x.dtype) for grad, x in zip(grads, inputs, strict=True)))
        return total / queries

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_output):
        """Scale the gradients that `forward` has already computed."""
        return (*(grad * grad_output[0] for grad in ctx.saved_tensors), None, None, None, None)


def indexer_loss(
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    q: Tensor,
    k: Tensor,
    scale: float,
    selected: Tensor | None = None,
) -> Tensor:
    """KL(p || softmax(I)), the mean over all queries (report Eq. 3 and 4): in closed form, without a T x S matrix."""
    return _IndexerLoss.apply(index_q, index_k, index_w, q.detach(), k.detach(), scale, selected)
