"""Attention over selected tokens (report Eq. 2), for a prompt and for one token at a time, with a cache in FP8 too.

A program takes one query and BLOCK_H of its heads, and walks through the query's list of tokens BLOCK_K at a time. For
each block it gathers the latents, multiplies them with the query, and updates an online softmax; nothing as long as the
list is ever stored. All heads share one latent per token, and that makes the gathering affordable: a gathered row of
1,152 bytes serves 64 heads, so tensor cores have 64 x 2 x 1,088 operations for it. Fewer heads would leave them idle:
16 rows are too few for the wide instruction. All 128 heads would need 128 x 512 fp32 numbers for the
answer alone, more than the registers hold. Hence 64.

A program of 64 rows has two groups of warps, and 64 rows are work for one. Each should take half of the columns. But
where the compiler sees the result of a product go into another, it gives every group all columns, so that a row's sum
needs no exchange: both then compute the same logits, half of the program's multiplying for nothing. It does not look
through a branch. So with BRANCH_SOFTMAX a block's softmax is computed inside an `if` that is always taken; the tuner
compares both.

Rows are gathered by their own addresses. Neighbouring threads read neighbouring numbers of one row, so memory is
read in whole lines although the rows lie anywhere; what is lost against contiguous keys is only that no copying
engine can fetch a whole tile by one address.

The online softmax keeps the largest logit so far and rescales what was summed when it grows; powers of two replace
powers of e, because that is the instruction there is. Its logarithm (`lse`, base 2) is kept for the backward
pass, which then needs no second softmax.

*Decode* has one query per sequence, too few programs to fill a GPU. So the list is cut into `splits` parts,
each worked on by its own program, and a second kernel merges the partial answers: weighted by 2^(lse - largest lse)
they give exactly the softmax over all.

*The FP8 cache* holds 512 codes, 4 scales and the rotary key of a token in 656 bytes. Codes are multiplied by
their scales as they arrive, in registers; scales are powers of two, so bf16 holds the result exactly.

With `selected=None` the list is 0, 1, 2, ...: the same kernel is then dense attention on the latents, the fair
thing to compare with.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa.kernels.triton.launch import Kernel, Launcher, check_int32_offsets, launch, length_bucket, padded_width

LOG2_E = 1.4426950408889634
GROUP = 128  # FP8 codes of a latent that share a scale


@triton.jit
def gather_kv(
    latent_ptr, rope_ptr, scale_ptr, token, filled, latent_stride, rope_stride, scale_stride,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    FP8: tl.constexpr, GROUPS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Gather BLOCK_K tokens, zeros for empty slots: latents (BLOCK_K, BLOCK_C) and rotary keys (BLOCK_K, BLOCK_R)."""
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    latent = tl.load(
        latent_ptr + token[:, None] * latent_stride + c[None, :], mask=filled[:, None] & (c < C)[None, :], other=0.0
    )
    rope = tl.load(
        rope_ptr + token[:, None] * rope_stride + r[None, :], mask=filled[:, None] & (r < R)[None, :], other=0.0
    )
    if FP8:
        group = tl.arange(0, GROUPS)
        scale = tl.load(scale_ptr + token[:, None] * scale_stride + group[None, :], mask=filled[:, None], other=0.0)
        codes = latent.to(tl.float32).reshape(BLOCK_K, GROUPS, BLOCK_C // GROUPS)
        latent = (codes * scale[:, :, None]).reshape(BLOCK_K, BLOCK_C).to(dtype)
    return latent, rope


@triton.jit
def online_softmax_block(q_latent, q_rope, latent, rope, filled, scale, row_max, row_sum):
    """Weights of one block (BLOCK_H, BLOCK_K), the new maximum, what rescales older sums to it, and the new sum."""
    logits = tl.dot(q_latent, tl.trans(latent), input_precision="ieee") * scale
    logits += tl.dot(q_rope, tl.trans(rope), input_precision="ieee") * scale
    logits = tl.where(filled[None, :], logits, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(logits, axis=1))
    weights = tl.exp2(logits - new_max[:, None])  # base 2: LOG2_E is in `scale`
    rescale = tl.exp2(row_max - new_max)
    return weights.to(latent.dtype), new_max, rescale, row_sum * rescale + tl.sum(weights, axis=1)


@triton.jit
def sparse_attention_kernel(
    q_ptr, kv_ptr, rope_ptr, scale_ptr, selected_ptr, out_ptr, lse_ptr,
    T, S, H, K, K_bucket, rows, keys_per_split, scale,
    kv_batch_stride, kv_stride, rope_batch_stride, rope_stride, scale_batch_stride, scale_stride,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    FP8: tl.constexpr, GROUPS: tl.constexpr, DENSE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BRANCH_SOFTMAX: tl.constexpr,
):  # fmt: skip
    """One program: one query, BLOCK_H heads, one part of the list."""
    head_tiles = tl.cdiv(H, BLOCK_H)
    query = (tl.program_id(0) // head_tiles).to(tl.int64)  # b * T + t
    heads = tl.program_id(0) % head_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    row = query * H + heads
    q_at = q_ptr + row[:, None] * (C + R)
    q_latent = tl.load(q_at + c[None, :], mask=(heads < H)[:, None] & (c < C)[None, :], other=0.0)
    q_rope = tl.load(q_at + C + r[None, :], mask=(heads < H)[:, None] & (r < R)[None, :], other=0.0)
    sequence = query // T
    kv_ptr += sequence * kv_batch_stride
    rope_ptr += sequence * rope_batch_stride
    scale_ptr += sequence * scale_batch_stride
    seen = S - T + (query % T).to(tl.int32) + 1

    row_max = tl.full((BLOCK_H,), -1e30, tl.float32)  # finite: an empty block must not give inf - inf
    row_sum = tl.zeros((BLOCK_H,), tl.float32)
    out = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    begin = tl.program_id(1) * keys_per_split
    end = tl.minimum(begin + keys_per_split, seen if DENSE else K)
    for first in tl.range(begin, end, BLOCK_K, disable_licm=True):
        slots = first + tl.arange(0, BLOCK_K)
        if DENSE:
            token, filled = slots, slots < end
        else:
            token = tl.load(selected_ptr + query * K + slots, mask=slots < end, other=-1).to(tl.int32)
            filled = token >= 0
        latent, rope = gather_kv(
            kv_ptr, rope_ptr, scale_ptr, token, filled, kv_stride, rope_stride, scale_stride,
            C, R, BLOCK_C, BLOCK_R, BLOCK_K, FP8, GROUPS, q_latent.dtype,
        )  # fmt: skip
        if not BRANCH_SOFTMAX or K > 0:  # always true, which the compiler cannot know: see above
            weights, new_max, rescale, row_sum = online_softmax_block(
                q_latent, q_rope, latent, rope, filled, scale, row_max, row_sum
            )
        else:
            weights, new_max, rescale = tl.zeros((BLOCK_H, BLOCK_K), latent.dtype), row_max, row_max
        out = tl.dot(weights, latent, out * rescale[:, None], input_precision="ieee")  # Eq. 2
        row_max = new_max

    out /= tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    part = tl.program_id(1) * rows + row
    tl.store(
        out_ptr + part[:, None] * C + c[None, :], out.to(out_ptr.dtype.element_ty),
        mask=(heads < H)[:, None] & (c < C)[None, :],
    )  # fmt: skip
    tl.store(lse_ptr + part, row_max + tl.log2(row_sum), mask=heads < H)


@triton.jit
def merge_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, rows, SPLITS,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: one row of the answer from its parts."""
    row = tl.program_id(0).to(tl.int64)
    split, c = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_C)
    part = split.to(tl.int64) * rows + row
    lse = tl.load(part_lse_ptr + part, mask=split < SPLITS, other=float("-inf"))
    largest = tl.maximum(tl.max(lse), -1e30)
    weights = tl.exp2(lse - largest)
    total = tl.sum(weights)
    mask = (split < SPLITS)[:, None] & (c < C)[None, :]
    parts = tl.load(parts_ptr + part[:, None] * C + c[None, :], mask=mask, other=0.0)
    out = tl.sum(parts * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * C + c, out.to(out_ptr.dtype.element_ty), mask=c < C)
    tl.store(lse_ptr + row, largest + tl.log2(total))


def tile_config(heads: int, keys: int, warps: int, stages: int = 2, branch_softmax: bool = False) -> triton.Config:
    """One configuration for the tuner."""
    tile = {"BLOCK_H": heads, "BLOCK_K": keys, "BRANCH_SOFTMAX": branch_softmax}
    return triton.Config(tile, num_warps=warps, num_stages=stages)


SPARSE_ATTENTION = Kernel(
    sparse_attention_kernel,
    [
        *(tile_config(64, 32, 8, 3, True), tile_config(64, 64, 8, 2, True), tile_config(64, 64, 8, 1, True)),
        *(tile_config(64, 64, 8), tile_config(64, 32, 8, 3), tile_config(32, 32, 4), tile_config(16, 16, 4)),
    ],
    key=("H", "K_bucket", "C", "R", "FP8", "DENSE"),
)
MERGE = Kernel(merge_kernel, [triton.Config({}, num_warps=4)], key=())


@dataclass(frozen=True)
class LatentKV:
    """What a cache holds for S tokens, plain or in FP8.

    latent (B, S, C) and rope (B, S, R), both fp16, bf16 or fp32; or latent as e4m3 codes with scale (B, S, C / 128).
    """

    latent: Tensor
    rope: Tensor
    scale: Tensor | None = None

    @classmethod
    def split(cls, kv: Tensor, value_width: int) -> "LatentKV":
        """Two views of kv (B, S, C + R)."""
        kv = kv if kv.stride(-1) == 1 else kv.contiguous()
        return cls(kv[..., :value_width], kv[..., value_width:])


def attend(
    q: Tensor, kv: LatentKV, selected: Tensor | None, scale: float, splits: int = 1, launcher: Launcher = launch
) -> tuple[Tensor, Tensor]:
    """Attend to the selected tokens, or to all visible ones.

    Args:
        q: absorbed queries (B, T, H, C + R).
        kv: the cache.
        selected: token indices (B, T, K), -1 for empty; None for dense causal attention.
        scale: what the dot products are multiplied by before the softmax.
        splits: into how many parts a query's list is cut: 1 for prompts, more where queries are few.

    Returns:
        The attended latents (B, T, H, C) and the logarithm (base 2) of the softmax's sum (B, T, H). A query without
        any selected token gets zeros.
    """
    (B, T, H, _), (S, C), R = q.shape, kv.latent.shape[1:], kv.rope.shape[-1]
    check_int32_offsets("kv", kv.latent)
    K = S if selected is None else selected.shape[-1]
    keys_per_split = 64 * triton.cdiv(triton.cdiv(K, splits), 64)  # whole blocks, whichever size is chosen
    splits = max(1, triton.cdiv(K, keys_per_split))
    dtype = q.dtype if splits == 1 else torch.float32  # partial answers are merged in fp32
    out = torch.empty(splits, B, T, H, C, dtype=dtype, device=q.device)
    lse = torch.empty(splits, B, T, H, dtype=torch.float32, device=q.device)
    is_fp8 = kv.scale is not None
    kv_scale = kv.scale if kv.scale is not None else lse  # a kernel's pointer must point at something

    def grid(tile):
        return B * T * triton.cdiv(H, tile["BLOCK_H"]), splits

    launcher(
        SPARSE_ATTENTION, grid, q_ptr=q.contiguous(), kv_ptr=kv.latent, rope_ptr=kv.rope, scale_ptr=kv_scale,
        selected_ptr=lse if selected is None else selected.contiguous(), out_ptr=out, lse_ptr=lse,
        T=T, S=S, H=H, K=K, K_bucket=length_bucket(K), rows=B * T * H,
        kv_batch_stride=kv.latent.stride(0), kv_stride=kv.latent.stride(1),
        rope_batch_stride=kv.rope.stride(0), rope_stride=kv.rope.stride(1),
        scale_batch_stride=kv_scale.stride(0) if is_fp8 else 0, scale_stride=kv_scale.stride(1) if is_fp8 else 0,
        keys_per_split=keys_per_split, scale=scale * LOG2_E, C=C, R=R, BLOCK_C=padded_width(C), BLOCK_R=padded_width(R),
        FP8=is_fp8, GROUPS=C // GROUP if is_fp8 else 1, DENSE=selected is None,
    )  # fmt: skip
    return (out[0], lse[0]) if splits == 1 else merge(out, lse, q.dtype, launcher)


def merge(parts: Tensor, part_lse: Tensor, dtype: torch.dtype, launcher: Launcher = launch) -> tuple[Tensor, Tensor]:
    """Make one softmax of several: parts (splits, B, T, H, C), part_lse (splits, B, T, H) -> as `attend` returns."""
    splits, C = parts.shape[0], parts.shape[-1]
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    lse = torch.empty(parts.shape[1:-1], dtype=torch.float32, device=parts.device)
    launcher(
        MERGE, lambda tile: (lse.numel(),), parts_ptr=parts, part_lse_ptr=part_lse, out_ptr=out, lse_ptr=lse,
        rows=lse.numel(), SPLITS=splits, C=C, BLOCK_C=padded_width(C), BLOCK_SPLITS=triton.next_power_of_2(splits),
    )  # fmt: skip
    return out, lse


def num_splits(queries: int, heads: int, keys: int, programs: int = 264) -> int:
    """How many parts give a GPU of 132 SMs two programs each, with 64 heads a program and 128 keys a part."""
    return max(1, min(programs // max(1, queries * triton.cdiv(heads, 64)), keys // 128))
