"""Three branches and three gates: NSA, native sparse attention (arXiv 2502.11089).

1. *Compressed*: a small network makes one key of each block, and the query attends to all of these.
2. *Selected*: what attention the compressed keys got ranks the blocks, and the best are read in full.
3. *Window*: the last tokens, so that the other two need not learn what is local.

Gates, computed from the hidden state, mix the three outputs. The proxy is thus not idle: its products are branch 1, an
output of its own, and through it the compressing network learns from the language loss. No second loss is needed.

What differs from the paper. Its compressed blocks overlap (32 tokens every 16) and its selected blocks are larger (64);
ours are one and the same. It gives each branch keys of its own, which would be three latents a token here; ours share
one. It is trained so from the beginning; we start from a dense model, hence the start: the network adds nothing to the
mean, and the gate of the selected branch is nearly open, the others nearly shut.
"""

import torch
from torch import Tensor, nn

from course.experiments.attention_variants import blocks
from course.experiments.attention_variants.selective_attention import Budget
from dsa.kernels import ops
from dsa.model import baselines
from dsa.model.attention import Attention, ForwardContext, LayerOutput, dequantized, per_head
from dsa.model.cache import LayerCache
from dsa.model.config import Config

START = (-3.0, 3.0, -3.0)  # of the gates, before the sigmoid: compressed, selected, window


class Compress(nn.Module):
    """One key of a block: its mean, and what a small network sees beyond it; (B, N, Z, W) -> (B, N, W)."""

    def __init__(self, width: int, size: int, seed: int):
        super().__init__()
        self.inner = nn.Linear(size * width, width, bias=False)  # a weight for each place: it knows the order
        self.outer = nn.Linear(width, width, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.inner.weight.copy_(torch.randn(self.inner.weight.shape, generator=generator) * (size * width) ** -0.5)
            self.outer.weight.zero_()

    def forward(self, cut: Tensor) -> Tensor:
        """Compress each block."""
        return cut.mean(2) + self.outer(torch.nn.functional.silu(self.inner(cut.flatten(2))))


class Nsa(Attention):
    """MLA in three branches; of the budget one block's worth is the window's, the rest the selected blocks'.

    Raises ValueError for a budget of fewer than three blocks: a query would select its own only.
    """

    def __init__(self, config: Config, layer: int, budget: Budget):
        super().__init__(config, layer)
        if budget.blocks < 3:
            raise ValueError(f"{budget.keys} keys are {budget.blocks} blocks of {budget.block}: NSA needs at least 3")
        self.budget = budget
        self.pool = Compress(self.latent + self.rotary, budget.block, seed=layer)
        self.gates = nn.Linear(config.hidden_size, 3 * self.heads)
        with torch.no_grad():
            self.gates.weight.zero_()
            self.gates.bias.copy_(torch.tensor(START).repeat_interleave(self.heads))

    def compressed(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Branch 1: the output (B, T, H, C) and each block's attention, all heads together (B, T, N)."""
        S, size = kv.shape[1], self.budget.block
        keys = self.pool(blocks.cut(kv, size))  # (B, N, W)
        logits = self.scale * torch.einsum("bthw,bnw->bthn", q, keys)
        visible = blocks.past(q.shape[1], S, size, q.device)[:, None]  # (T, 1, N)
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1) * visible  # all 0 where no block is past: no output then
        return torch.einsum("bthn,bnc->bthc", weights, keys[..., : self.latent]), weights.detach().sum(2)

    def selected(self, importance: Tensor, S: int) -> Tensor:
        """Branch 2's tokens: (B, T, N) -> (B, T, K)."""
        size = self.budget.block
        return blocks.tokens_of(blocks.best(importance, self.budget.blocks - 1, S, size), S, size)

    def forward(self, x: Tensor, context: ForwardContext, cache: LayerCache | None = None) -> LayerOutput:
        """Attend three ways and mix: x (B, T, D) -> (B, T, D); of `context.collect` only "trace" is known."""
        q, _ = self.queries(x, context.rope)
        kv = dequantized(self.compress(x, context, cache), x.dtype)
        B, T, S = *x.shape[:2], kv.shape[1]
        absorbed = self.absorb_query(q)
        coarse, importance = self.compressed(absorbed, kv)
        chosen = self.selected(importance, S)
        recent = baselines.window(B, T, S, self.budget.block, x.device)
        fine = (ops.sparse_attention(absorbed, kv, keys, self.scale, self.latent) for keys in (chosen, recent))
        branches = [coarse, *fine]
        gates = self.gates(x).sigmoid().unflatten(-1, (3, self.heads))  # (B, T, 3, H)
        mixed = torch.einsum("btgh,btghc->bthc", gates, torch.stack(branches, 2))
        heads = per_head(mixed, self.up_projections(mixed.dtype)[1].mT)
        trace = self.trace(context, q, kv, None, chosen) if context.collect == "trace" else None
        return LayerOutput(self.o_proj(heads.flatten(-2)), trace)
