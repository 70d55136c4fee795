"""What was tried on the processor and did not help: each idea in a few lines, to be timed beside the path that is used.

Who improves a kernel tries ten things and keeps one; the nine are forgotten, and tried again by the next. Here they are
kept, next to what beat them. All of them compute what the package's own functions compute (the tests hold them
together), so any may be taken apart, mended and timed again: `rejected_variants` does that and writes down how it came
out. Nothing else imports this file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa.kernels import ops
from dsa.kernels.cpu import dense, topk
from dsa.kernels.fp8 import QuantizedTensor, quantize_int8
from dsa.kernels.loops import EMPTY
from dsa.kernels.reference import causal_mask

CANDIDATE = "ours"  # its name in the record
TILE = 1024  # keys


@dataclass(frozen=True)
class Sparse:
    """What one sparse layer gets for T queries, the last of S positions; one sequence."""

    q: Tensor  # (1, T, H, C + R)
    kv: Tensor  # (1, S, C + R)
    index_q: Tensor  # (1, T, J, W)
    index_k: Tensor  # (1, S, W)
    w: Tensor  # (1, T, J)
    top_k: int
    latent: int  # C

    def chosen(self, backend: str | None = None) -> Tensor:
        """The K keys of each query, (1, T, K)."""
        return ops.index_topk(self.index_q, self.index_k, self.w, self.top_k, backend=backend)

    def attended(self, selected: Tensor, backend: str | None = None) -> Tensor:
        """Attention to them, (1, T, H, C)."""
        return ops.sparse_attention(self.q, self.kv, selected, self.scale, self.latent, backend=backend)

    @property
    def scale(self) -> float:
        """What products are multiplied by before the softmax."""
        return self.kv.shape[2] ** -0.5

    @property
    def hidden(self) -> Tensor:
        """True in the future: (T, S)."""
        return ~causal_mask(self.q.shape[1], self.kv.shape[1])


@dataclass(frozen=True)
class Dense:
    """Queries, keys (1, T or S, H, D) and values (1, S, H, V) of a dense layer in MHA mode."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def scale(self) -> float:
        """What products are multiplied by before the softmax."""
        return self.k.shape[3] ** -0.5

    @property
    def mask(self) -> Tensor:
        """True where visible: (T, S)."""
        return causal_mask(self.q.shape[1], self.k.shape[1])

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the fused kernel wants them: heads first."""
        return self.q.transpose(1, 2), self.k.transpose(1, 2), self.v.transpose(1, 2)


# sparse attention -----------------------------------------------------------------------------------------------------


def candidate(given: Sparse) -> Tensor:
    """The path that is used, the measure of all others: tiles in buffers made once, two-level top-k, fetched keys."""
    return given.attended(given.chosen())


def masked(given: Sparse) -> Tensor:
    """All scores, all logits, and a mask over what was not chosen."""
    return given.attended(given.chosen("reference"), "reference")


def four_lines(given: Sparse) -> Tensor:
    """The formula as one would write it first: whole matrices, plain topk, fetching by index."""
    products = torch.einsum("tjw,sw->tjs", given.index_q[0], given.index_k[0]).relu()
    scores = torch.einsum("tj,tjs->ts", given.w[0], products).masked_fill(given.hidden, float("-inf"))
    keys = given.kv[0][scores.topk(given.top_k).indices]  # (T, K, C + R)
    weights = (torch.bmm(given.q[0], keys.mT) * given.scale).softmax(-1)
    return torch.bmm(weights, keys[..., : given.latent])[None]


def fresh(given: Sparse) -> Tensor:
    """Tiles like ours, but a new tensor for each result."""
    return given.attended(topk.select_rows(fresh_scores(given), given.top_k)[None])


def fresh_scores(given: Sparse) -> Tensor:
    """Scores (T, S), tile by tile of keys, in new tensors."""
    (T, J, _), parts = given.index_q[0].shape, []
    for keys in given.index_k[0].split(TILE):
        products = (given.index_q[0].flatten(0, 1) @ keys.t()).relu().view(T, J, -1)
        parts.append(torch.bmm(given.w[0, :, None], products)[:, 0])
    return torch.cat(parts, dim=1).masked_fill(given.hidden, float("-inf"))


def plain_topk(given: Sparse) -> Tensor:
    """Ours, but `topk` over whole rows."""
    scores = ops.index_scores(given.index_q, given.index_k, given.w)
    return given.attended(scores.topk(given.top_k, sorted=False).indices)


def neighbours(given: Sparse) -> Tensor:
    """Ours, but groups of neighbours instead of strided ones."""
    x, size = ops.index_scores(given.index_q, given.index_k, given.w)[0], topk.GROUP
    best = x.unflatten(1, (-1, size)).amax(2).topk(given.top_k, sorted=False).indices  # needs S to be a multiple
    places = (best[..., None] * size + torch.arange(size)).flatten(1)
    found = x.gather(1, places).topk(given.top_k, sorted=False).indices
    return given.attended(places.gather(1, found)[None])


def strided(given: Sparse) -> Tensor:
    """What the two before are to be held against: ours with the same scores, kept whole."""
    scores = ops.index_scores(given.index_q, given.index_k, given.w)
    return given.attended(ops.select(scores, given.top_k))


def fetched_by_index(given: Sparse) -> Tensor:
    """Ours, but `kv[idx]` for all queries at once instead of `index_select` into a small buffer."""
    selected = given.chosen()[0]
    keys = given.kv[0][selected.clamp(min=0)]
    logits = torch.bmm(given.q[0], keys.mT) * given.scale
    weights = logits.masked_fill((selected == EMPTY)[:, None], float("-inf")).softmax(-1)
    return torch.bmm(weights, keys[..., : given.latent])[None]


def fused_on_fetched(given: Sparse) -> Tensor:
    """Ours, but the fused kernel attends to the fetched keys, 16 queries at a time."""
    out = []
    for q, chosen in zip(given.q[0].split(16), given.chosen()[0].split(16), strict=True):
        keys = given.kv[0].index_select(0, chosen.flatten()).view(*chosen.shape, -1)[:, None]
        out.append(F.scaled_dot_product_attention(q[:, None], keys, keys, scale=given.scale)[:, 0])
    return torch.cat(out)[None, ..., : given.latent]


def in_bf16(given: Sparse) -> Tensor:
    """Ours, with index vectors in bf16; the latents stay in fp32."""
    q, k, w = (x.bfloat16() for x in (given.index_q, given.index_k, given.w))
    return given.attended(ops.index_topk(q, k, w, given.top_k))


def in_int8(given: Sparse) -> Tensor:
    """Ours, with index vectors in eight bits. It helps, and chooses a little otherwise: a model has to be told to."""
    q, scale = quantize_int8(given.index_q)
    codes = QuantizedTensor(*quantize_int8(given.index_k))
    return given.attended(ops.index_topk(q, codes, given.w * scale[..., 0], given.top_k))


SPARSE: Mapping[str, Callable[[Sparse], Tensor]] = MappingProxyType(
    {
        CANDIDATE: candidate, "masked": masked, "four lines": four_lines, "fresh tensors": fresh,
        "whole scores, ours": strided, "whole scores, plain topk": plain_topk, "whole scores, neighbours": neighbours,
        "kv[idx]": fetched_by_index, "fused on fetched": fused_on_fetched,
        "index in bf16": in_bf16, "index in int8": in_int8,
    }
)  # fmt: skip


# dense attention ------------------------------------------------------------------------------------------------------


def candidate_dense(given: Dense) -> Tensor:
    """The baseline that is used: past keys without a mask and the own chunk, merged; values padded."""
    return dense.prefill(given.q, given.k, given.v, given.scale)


def chunk_mask(given: Dense) -> Tensor:
    """The fused kernel with the mask of a chunk, T x S."""
    q, k, v = given.parts
    v = F.pad(v, (0, k.shape[3] - v.shape[3]))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=given.mask, scale=given.scale)
    return out.transpose(1, 2)[..., : given.v.shape[3]]


def unpadded(given: Dense) -> Tensor:
    """The same with values narrower than keys: without a word it is no fused kernel any more."""
    out = F.scaled_dot_product_attention(*given.parts, attn_mask=given.mask, scale=given.scale)
    return out.transpose(1, 2)


def small_blocks(given: Dense) -> Tensor:
    """Ours, but 256 queries at a time."""
    T, S, out = given.q.shape[1], given.k.shape[1], []
    for begin in range(0, T, T // 4):
        seen = S - T + begin + T // 4
        out.append(dense.prefill(given.q[:, begin : begin + T // 4], given.k[:, :seen], given.v[:, :seen], given.scale))
    return torch.cat(out, dim=1)


DENSE: Mapping[str, Callable[[Dense], Tensor]] = MappingProxyType(
    {
        CANDIDATE: candidate_dense,
        "mask of a chunk": chunk_mask,
        "values unpadded": unpadded,
        "blocks of 256": small_blocks,
    }
)
