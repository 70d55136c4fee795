"""Functions that are wrong on purpose: what `injected_bugs` puts in the place of right ones.

Each has the signature of the function it replaces and differs from it in one step, which its docstring names. Where
only the outcome is changed, the right function is called first: it is bound as a default argument, `right`, because by
the time of the call its own name leads here.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa.kernels import ops, reference
from dsa.kernels.loops import EMPTY
from dsa.model import rope
from dsa.model.attention import Attention
from dsa.model.indexer import Indexer
from dsa.model.rope import Rope

# ---- the indexer's query, key and weights


def rotate_neighbours(self: Indexer, x: Tensor, angles: Rope) -> Tensor:
    """Turn pairs (2i, 2i + 1) instead of (i, i + R/2)."""
    turned, still = x.split([self.rotary, self.width - self.rotary], dim=-1)
    return torch.cat([angles.interleaved(turned), still], dim=-1)


def rotate_last(self: Indexer, x: Tensor, angles: Rope) -> Tensor:
    """Turn the last R dimensions instead of the first."""
    still, turned = x.split([self.width - self.rotary, self.rotary], dim=-1)
    return torch.cat([still, angles.half_split(turned)], dim=-1)


def key_with_large_eps(self: Indexer, x: Tensor) -> Tensor:
    """Normalise with eps 1e-5 instead of 1e-6."""
    return F.layer_norm(self.wk(x), (self.width,), self.k_norm.weight, self.k_norm.bias, eps=1e-5)


def key_with_rms_norm(self: Indexer, x: Tensor) -> Tensor:
    """Divide by the root mean square, subtract no mean, add no bias."""
    return F.rms_norm(self.wk(x), (self.width,), self.k_norm.weight, eps=1e-6)


def hadamard(width: int) -> Tensor:
    """Sylvester's matrix, scaled to be orthogonal: (W, W)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * width**-0.5


def changed_factors(change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
    """Make an Indexer.forward that changes (q, k, w) after the fact."""
    right = Indexer.forward

    def forward(self: Indexer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return change(self, *right(self, *args, **kwargs))

    return forward


def softmaxed_weights(self: Indexer, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Let the head weights be positive and sum to one."""
    return q, k, (w * (self.heads * self.width) ** 0.5).softmax(-1)


def transformed_query(self: Indexer, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply q, but not k, by the Hadamard matrix."""
    return q @ hadamard(self.width).to(q), k, w


def raw_query_latent(self: Attention, x: Tensor, angles: Rope, right: Any = Attention.queries) -> tuple[Tensor, Tensor]:
    """Hand the indexer the query latent before its norm."""
    return right(self, x, angles)[0], self.q_a_proj(x)


def attached_forward(self: Indexer, *args: Any, right: Any = Indexer.forward, **kwargs: Any) -> Any:
    """Let the indexer's loss flow on into the model."""
    self.detached = False
    try:
        return right(self, *args, **kwargs)
    finally:
        self.detached = True


# ---- scores and selection


def linear_topk(q: Tensor, k: Tensor, w: Tensor, top_k: int) -> Tensor:
    """Sum over the heads without ReLU; the heads then collapse into one."""
    scores = torch.einsum("btj,btjw,bsw->bts", w, q, k)
    future = ~reference.causal_mask(q.shape[1], k.shape[1], q.device)
    return ops.select(scores.masked_fill(future, float("-inf")), top_k)


def select_then_mask(q: Tensor, k: Tensor, w: Tensor, top_k: int) -> Tensor:
    """Choose among all keys, the future included, and drop the future afterwards."""
    scores = torch.einsum("btj,btjs->bts", w, torch.einsum("btjw,bsw->btjs", q, k).relu())
    return without_future(scores.topk(min(top_k, k.shape[1])).indices, *scores.shape[1:])


def masked_with_zero(q: Tensor, k: Tensor, w: Tensor, top_k: int) -> Tensor:
    """Give future keys the score 0, which beats every negative one."""
    scores = reference.index_scores(q, k, w)
    scores = scores.masked_fill(scores == float("-inf"), 0)
    return without_future(scores.topk(min(top_k, k.shape[1])).indices, *scores.shape[1:])


def without_future(selected: Tensor, T: int, S: int) -> Tensor:
    """Empty the slots of future keys, but always keep the query's own key: a softmax needs one."""
    own = torch.arange(S - T, S, device=selected.device)[:, None]
    kept = selected.masked_fill(selected > own, EMPTY)
    nothing_left = (kept == EMPTY).all(-1, keepdim=True)
    first_slot = torch.arange(selected.shape[-1], device=selected.device) == 0
    return torch.where(nothing_left & first_slot, own, kept)


def topk_with_fillers(q: Tensor, k: Tensor, w: Tensor, top_k: int) -> Tensor:
    """Leave in place what top-k fills short rows with: keys from the future."""
    return reference.index_scores(q, k, w).topk(min(top_k, k.shape[1])).indices


# ---- attention


def forward_with_mscale_once(self: Attention, *args: Any, right: Any = Attention.forward) -> Any:
    """Scale the softmax by mscale instead of mscale squared."""
    scale = self.scale
    try:
        # scale is m^2 / sqrt(d), so the root of m^2 / d is m / sqrt(d)
        self.scale = (scale * (self.nope + self.rotary) ** -0.5) ** 0.5
        return right(self, *args)
    finally:
        self.scale = scale


def plain_table(width: int, theta: float, yarn: Any, *where: Any, right: Any = rope.rotary_table) -> Any:
    """Forget YaRN."""
    return right(width, theta, None, *where)


# ---- experts


def route_by(
    scored: Callable[[Tensor], Tensor] = torch.sigmoid, dropped_score: float = float("-inf"),
    weigh_biased: bool = False, normalise: bool = True, scaled: bool = True,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """Make a `moe.route` with one step done wrong."""

    def route(logits: Tensor, bias: Tensor, config: Any) -> tuple[Tensor, Tensor]:
        scores = scored(logits)
        biased = scores + bias
        groups = biased.unflatten(-1, (config.n_group, -1))
        kept = groups.topk(min(2, groups.shape[-1])).values.sum(-1).topk(config.topk_group).indices
        dropped = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, kept, False)
        chosen = groups.masked_fill(dropped[..., None], dropped_score).flatten(-2)
        chosen = chosen.topk(config.num_experts_per_tok).indices
        weights = (biased if weigh_biased else scores).gather(-1, chosen)
        if normalise and config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * (config.routed_scaling_factor if scaled else 1)

    return route


# ---- what teaches the indexer


def one_headed_teacher(iq, ik, iw, q, k, scale, selected=None, right=ops.indexer_loss, **backend):
    """Imitate the first head instead of all heads together."""
    return right(iq, ik, iw, q[:, :, :1], k[:, :, :1], scale, selected, **backend)


def renormalised_teacher(iq, ik, iw, q, k, scale, selected=None, right=ops.indexer_loss, **backend):
    """Sum the dense attention over heads, cut it to the selected keys, and renormalise the remainder."""
    if selected is None:
        return right(iq, ik, iw, q, k, scale, **backend)
    mass = ops.attention_mass(q.detach(), k.detach(), scale).gather(-1, selected.clamp(min=0))
    mass = mass.masked_fill(selected == EMPTY, 0)
    scores = reference.gather_selected(ops.index_scores(iq, ik, iw), selected)
    return reference.kl_divergence(mass / mass.sum(-1, keepdim=True), scores).mean()


def no_teacher(iq, ik, iw, q, k, scale, selected=None, **backend):
    """Trust the language loss to train the indexer through top-k."""
    return 0 * (iq.sum() + ik.sum() + iw.sum())
