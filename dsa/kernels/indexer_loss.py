"""The indexer's loss in closed form: the KL divergence of one tile of queries, and its gradient written by hand.

Autograd would keep every head's products until `backward`, which for L tokens is a matrix of L x L a head. Nothing
of that is needed. The target p gets no gradient, so the derivative of KL(p || softmax(I)) with respect to a score is
softmax(I) - p, and Eq. 1 is short enough to be differentiated by hand: two products of the sizes of the first one. Each
row has its loss and its gradient before the next row is looked at, and a tile's buffers are forgotten with it.

The functions take one tile; `tiled.indexer_loss` cuts the tiles and sums what they give.
"""

import torch
from torch import Tensor

from dsa.kernels.reference import at_least_fp32, causal_mask

MAX_TILE_ELEMENTS = 2**22  # of the largest buffer, 16 MB in fp32: larger ones are new pages each time, which is slow


def attention_target(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention summed over heads, rows normalised to 1: the p of Eq. 3, in one buffer of all heads' logits.

    q (B, T, H, D), k (B, S, G, D), the queries at the last T of the S places -> (B, T, S).
    """
    T, H, S, G = *q.shape[1:3], *k.shape[1:3]
    q, k = at_least_fp32(q) * scale, at_least_fp32(k)
    if G == 1:
        weights = (q.flatten(1, 2) @ k[:, :, 0].mT).unflatten(1, (T, H))  # (B, T, H, S), all heads one product
    else:
        weights = torch.einsum("bthd,bshd->bths", q, k).contiguous()
    weights[..., S - T :].masked_fill_(~causal_mask(T, T, q.device)[:, None], float("-inf"))
    weights.sub_(weights.amax(-1, keepdim=True)).exp_()  # a softmax that is not normalised yet
    norms = 1 / (H * weights.sum(-1))  # (B, T, H)
    return (norms[:, :, None] @ weights)[:, :, 0]  # (B, T, S): normalising and averaging over the heads in one product


def kl_and_grad(target: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || softmax(I)) summed over all rows, and its derivative by I: (B, T, S) twice -> scalar, (B, T, S).

    Scores of -inf take no part; p must be 0 there.
    """
    log_i = scores.log_softmax(-1)
    dlogits = log_i.exp() - target  # dKL/dI = softmax(I) - p, because p sums to 1
    log_i.masked_fill_(scores == float("-inf"), 0)
    return torch.special.xlogy(target, target).sum() - (target * log_i).sum(), dlogits  # Eq. 3, Eq. 4


def score(products: Tensor, w: Tensor) -> Tensor:
    """Eq. 1 from the products q . k (B, T, J, S), which are cut off at 0 in place, and w (B, T, J): -> (B, T, S)."""
    return (w[:, :, None] @ products.relu_())[:, :, 0]


def score_backward(dlogits: Tensor, rectified: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1 backwards: from dL/dI (B, T, S) to dL/dw (B, T, J) and dL/d(q . k) (B, T, J, S).

    With I = sum_j w_j r_j and r_j = ReLU(q_j . k): dL/dw_j = sum_s dL/dI r_j, and dL/d(q_j . k) = dL/dI w_j where
    r_j > 0. The latter overwrites `rectified`: it is as large, and the largest thing here.
    """
    grad_w = (rectified @ dlogits[..., None])[..., 0]  # (B, T, J)
    return grad_w, rectified.sign_().mul_(w[..., None]).mul_(dlogits[:, :, None])


def dense_tile(q: Tensor, k: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 3 for one tile of queries against all keys up to its last query.

    q (B, T, J, W), k (B, S, W), w (B, T, J), target (B, T, S) -> the sum of the rows' losses, and its gradients by q, k
    and w, in at least fp32.
    """
    q, k, w = at_least_fp32(q), at_least_fp32(k), at_least_fp32(w)
    T, J, S = *q.shape[1:3], k.shape[1]
    rows = q.flatten(1, 2)  # (B, T * J, W)
    products = (rows @ k.mT).unflatten(1, (T, J))  # (B, T, J, S)
    scores = score(products, w)
    scores[..., S - T :].masked_fill_(~causal_mask(T, T, q.device), float("-inf"))
    loss, dlogits = kl_and_grad(target, scores)
    grad_w, grad = score_backward(dlogits, products, w)
    grad = grad.flatten(1, 2)  # (B, T * J, S)
    return loss, (grad @ k).unflatten(1, (T, J)), grad.mT @ rows, grad_w


def selected_tile(q: Tensor, keys: Tensor, w: Tensor, target: Tensor, empty: Tensor):
    """Eq. 4 for one tile: each query has its own selected keys (B, T, K, W), `empty` (B, T, K) marks unfilled slots.

    target (B, T, K); returns as `dense_tile` does, the keys' gradient (B, T, K, W) for the slots they were fetched to.
    """
    q, keys, w = at_least_fp32(q), at_least_fp32(keys), at_least_fp32(w)
    products = q @ keys.mT  # (B, T, J, K)
    scores = score(products, w).masked_fill_(empty, float("-inf"))
    loss, dlogits = kl_and_grad(target, scores)
    grad_w, grad = score_backward(dlogits, products, w)
    return loss, grad @ keys, grad.mT @ q, grad_w
