"""The fourth square: single tokens, by a proxy that nobody learned. After SparQ attention (arXiv 2312.04985).

A product q . k is mostly made by the few components in which q is large. So take those r of each query, compare only
them, and choose the best tokens; then attend to these with all components. Nothing is trained, no key is added, and the
cost is r / (C + R) of the full scores: cheap by a constant factor, like DSA, and unlike blocks.

Shorter products are flatter, so SparQ raises the softmax again by the share of |q| that the r components hold. Heads
that share a key share the r components too (those with the greatest sum of |q|). What SparQ does besides, giving the
mean value to the mass that was not chosen, we leave out: no other design here has it.
"""

import torch
from torch import Tensor

from course.experiments.attention_variants.selective_attention import SelectiveAttention
from dsa.kernels import ops
from dsa.kernels.reference import causal_mask
from dsa.model.indexer import IndexFactors


def short_products(q: Tensor, kv: Tensor, components: int, scale: float) -> Tensor:
    """Compare in each query's largest components only: (B, T, H, W), (B, S, W) -> logits (B, T, H, S)."""
    top = q.abs().sum(2).topk(min(components, q.shape[-1]), dim=-1).indices  # (B, T, r), one choice for all heads
    kept = torch.zeros_like(q[:, :, 0]).scatter(-1, top, 1.0)  # (B, T, W): a mask, where a kernel would gather
    short = q * kept[:, :, None]
    held = short.abs().sum(-1) / q.abs().sum(-1)  # (B, T, H): the share of |q|
    return scale * torch.einsum("bthw,bsw->bths", short, kv) / held.clamp(min=1e-6).sqrt()[..., None]


class Sparq(SelectiveAttention):
    """MLA over the tokens whose short products weigh most."""

    def choose(self, q: Tensor, kv: Tensor, index: IndexFactors | None) -> Tensor:
        """Choose by the short products' softmax, added over heads."""
        visible = causal_mask(q.shape[1], kv.shape[1], q.device)
        logits = short_products(q, kv, self.budget.components, self.scale)
        shares = logits.masked_fill(~visible[:, None], float("-inf")).softmax(-1).sum(2)  # (B, T, S)
        return ops.select(shares.masked_fill(~visible, float("-inf")), self.budget.keys)
