"""The gradients of attention over selected tokens: one kernel for the queries, one for the latents.

With p the attention weights, g the gradient of the answer and d = g . out (one per head), the gradient of a logit
is p (g . v - d), times the scale. From there it is two products:

    dq = sum over the list of dlogit * kv          a sum along the list: a program keeps it, as the forward does
    dkv[s] = sum over queries and heads            queries anywhere may have chosen token s: programs share it
             of dlogit * q  and (first C numbers)  p * g

The weights are not stored by the forward pass, only the logarithm of each softmax's sum; p = 2^(logit - lse) comes
back from it in one product.

One program could find both. It would have to keep dq (64 x 576 numbers) and a block of dkv at once, more than the
registers hold. So the work is done by two kernels, each of which computes the logits again: 7 products where 5 are
needed. The second one turns everything around: a program keeps a block of BLOCK_K tokens of one query's list and
walks through the heads, so that the gradient of a token is summed over all heads in registers before it meets those
of other queries in memory, by atomic addition in fp32. The order of those additions is not fixed, so the last
digits of dkv may differ from run to run.

The block of dkv lies on its side, (C numbers) x (tokens). Upright, its rows would be the 32 tokens, and the wide
matrix instruction wants 64; with 64 tokens each thread spills 7 KB of registers. On its side the rows are the 512
dimensions of a latent. Weights and dlogits are computed behind a branch (BRANCH_SOFTMAX, see `sparse_attention`): done
once instead of twice, they leave so many registers free that hardly anything is spilled.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa.kernels.triton.launch import Kernel, Launcher, launch, padded_width
from dsa.kernels.triton.sparse_attention import LOG2_E, LatentKV, attend, gather_kv, tile_config


@triton.jit
def softmax_backward_block(q_latent, q_rope, grad, latent, rope, filled, lse, delta, scale, LOG2_E: tl.constexpr):
    """One block of attention weights and of the gradients of its logits, times the scale: two of (BLOCK_H, BLOCK_K)."""
    logits = tl.dot(q_latent, tl.trans(latent), input_precision="ieee") * (scale * LOG2_E)
    logits += tl.dot(q_rope, tl.trans(rope), input_precision="ieee") * (scale * LOG2_E)
    weights = tl.where(filled[None, :], tl.exp2(logits - lse[:, None]), 0.0)
    dp = tl.dot(grad, tl.trans(latent), input_precision="ieee") - delta[:, None]  # g . v - d
    return weights.to(latent.dtype), (weights * dp * scale).to(latent.dtype)


@triton.jit
def query_gradient_kernel(
    q_ptr, kv_ptr, rope_ptr, selected_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    T, H, K, kv_batch_stride, kv_stride, scale, LOG2_E: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BRANCH_SOFTMAX: tl.constexpr,
):  # fmt: skip
    """One program: dq of one query and BLOCK_H heads; also d = g . out, which the other kernel wants."""
    head_tiles = tl.cdiv(H, BLOCK_H)
    query = (tl.program_id(0) // head_tiles).to(tl.int64)
    heads = tl.program_id(0) % head_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    row = query * H + heads
    latent_mask, rope_mask = (heads < H)[:, None] & (c < C)[None, :], (heads < H)[:, None] & (r < R)[None, :]
    q_at = row[:, None] * (C + R)
    q_latent = tl.load(q_ptr + q_at + c[None, :], mask=latent_mask, other=0.0)
    q_rope = tl.load(q_ptr + q_at + C + r[None, :], mask=rope_mask, other=0.0)
    grad = tl.load(grad_ptr + row[:, None] * C + c[None, :], mask=latent_mask, other=0.0)
    delta = tl.zeros((BLOCK_H,), tl.float32)
    for begin in tl.range(0, C, BLOCK_R):  # in strips: whole rows of both would not leave room for anything else
        at, mask = row[:, None] * C + begin + r[None, :], (heads < H)[:, None] & (begin + r < C)[None, :]
        strip = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        delta += tl.sum(strip * tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32), axis=1)
    tl.store(delta_ptr + row, delta, mask=heads < H)
    lse = tl.load(lse_ptr + row, mask=heads < H, other=float("inf"))
    kv_ptr += query // T * kv_batch_stride
    rope_ptr += query // T * kv_batch_stride

    dq_latent = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    dq_rope = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    for first in tl.range(0, K, BLOCK_K, disable_licm=True):
        slots = first + tl.arange(0, BLOCK_K)
        token = tl.load(selected_ptr + query * K + slots, mask=slots < K, other=-1).to(tl.int32)
        filled = token >= 0
        latent, rope = gather_kv(
            kv_ptr, rope_ptr, kv_ptr, token, filled, kv_stride, kv_stride, 0,
            C, R, BLOCK_C, BLOCK_R, BLOCK_K, False, 1, q_latent.dtype,
        )  # fmt: skip
        if not BRANCH_SOFTMAX or K > 0:  # always true, which the compiler cannot know: see sparse_attention
            _, dlogits = softmax_backward_block(q_latent, q_rope, grad, latent, rope, filled, lse, delta, scale, LOG2_E)
        else:
            dlogits = tl.zeros((BLOCK_H, BLOCK_K), latent.dtype)
        dq_latent = tl.dot(dlogits, latent, dq_latent, input_precision="ieee")
        dq_rope = tl.dot(dlogits, rope, dq_rope, input_precision="ieee")
    dtype = dq_ptr.dtype.element_ty
    tl.store(dq_ptr + q_at + c[None, :], dq_latent.to(dtype), mask=latent_mask)
    tl.store(dq_ptr + q_at + C + r[None, :], dq_rope.to(dtype), mask=rope_mask)


@triton.jit
def latent_gradient_kernel(
    q_ptr, kv_ptr, rope_ptr, selected_ptr, grad_ptr, lse_ptr, delta_ptr, dkv_ptr,
    T, S, H, K, kv_batch_stride, kv_stride, scale, LOG2_E: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BRANCH_SOFTMAX: tl.constexpr,
):  # fmt: skip
    """One program: what one query, all its heads, adds to the gradients of BLOCK_K of its tokens."""
    key_tiles = tl.cdiv(K, BLOCK_K)
    query = (tl.program_id(0) // key_tiles).to(tl.int64)
    slots = tl.program_id(0) % key_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    token = tl.load(selected_ptr + query * K + slots, mask=slots < K, other=-1).to(tl.int32)
    filled = token >= 0
    kv_ptr += query // T * kv_batch_stride
    rope_ptr += query // T * kv_batch_stride
    latent, rope = gather_kv(
        kv_ptr, rope_ptr, kv_ptr, token, filled, kv_stride, kv_stride, 0,
        C, R, BLOCK_C, BLOCK_R, BLOCK_K, False, 1, q_ptr.dtype.element_ty,
    )  # fmt: skip
    dlatent = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)  # lying on their sides: see above
    drope = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for first in tl.range(0, H, BLOCK_H, disable_licm=True):
        heads = first + tl.arange(0, BLOCK_H)
        row = query * H + heads
        latent_mask, rope_mask = (heads < H)[:, None] & (c < C)[None, :], (heads < H)[:, None] & (r < R)[None, :]
        q_at = q_ptr + row[:, None] * (C + R)
        q_latent = tl.load(q_at + c[None, :], mask=latent_mask, other=0.0)
        q_rope = tl.load(q_at + C + r[None, :], mask=rope_mask, other=0.0)
        grad = tl.load(grad_ptr + row[:, None] * C + c[None, :], mask=latent_mask, other=0.0)
        lse = tl.load(lse_ptr + row, mask=heads < H, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=heads < H, other=0.0)
        if not BRANCH_SOFTMAX or K > 0:  # always true, which the compiler cannot know: see sparse_attention
            weights, dlogits = softmax_backward_block(
                q_latent, q_rope, grad, latent, rope, filled, lse, delta, scale, LOG2_E
            )
        else:
            weights = tl.zeros((BLOCK_H, BLOCK_K), latent.dtype)
            dlogits = weights
        dlatent = tl.dot(tl.trans(grad), weights, dlatent, input_precision="ieee")
        dlatent = tl.dot(tl.trans(q_latent), dlogits, dlatent, input_precision="ieee")
        drope = tl.dot(tl.trans(q_rope), dlogits, drope, input_precision="ieee")
    dkv_ptr += query // T * S * (C + R)
    at = token[None, :] * (C + R)
    tl.atomic_add(dkv_ptr + at + c[:, None], dlatent, mask=filled[None, :] & (c < C)[:, None], sem="relaxed")
    tl.atomic_add(dkv_ptr + at + C + r[:, None], drope, mask=filled[None, :] & (r < R)[:, None], sem="relaxed")


KEY = ("H", "K", "C", "R")
TILES = [
    tile_config(64, 32, 8, 1, True),
    tile_config(64, 16, 8, 1, True),
    tile_config(64, 32, 8, 1),
    tile_config(32, 32, 4, 1),
    tile_config(16, 16, 4, 1),
]
QUERY_GRADIENT = Kernel(query_gradient_kernel, TILES, key=KEY)
LATENT_GRADIENT = Kernel(latent_gradient_kernel, TILES, key=KEY, reset_to_zero=["dkv_ptr"])


def gradients(
    q: Tensor,
    kv: Tensor,
    selected: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    scale: float,
    launcher: Launcher = launch,
) -> tuple[Tensor, Tensor]:
    """From the gradient of the answer to those of queries and latents.

    q (B, T, H, C + R), kv (B, S, C + R), selected (B, T, K); out, grad (B, T, H, C) and lse (B, T, H) as `attend`
    returned them -> dq (B, T, H, C + R), dkv (B, S, C + R).
    """
    (B, T, H, width), (S, C), K = q.shape, (kv.shape[1], out.shape[-1]), selected.shape[-1]
    parts = LatentKV.split(kv, C)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = torch.zeros(kv.shape, dtype=torch.float32, device=q.device)
    shared = {
        "q_ptr": q.contiguous(), "kv_ptr": parts.latent, "rope_ptr": parts.rope, "grad_ptr": grad.contiguous(),
        "selected_ptr": selected.contiguous(), "lse_ptr": lse, "delta_ptr": torch.empty_like(lse),
        "T": T, "H": H, "K": K, "kv_batch_stride": parts.latent.stride(0), "kv_stride": parts.latent.stride(1),
        "scale": scale, "LOG2_E": LOG2_E, "C": C, "R": width - C,
        "BLOCK_C": padded_width(C), "BLOCK_R": padded_width(width - C),
    }  # fmt: skip
    launcher(QUERY_GRADIENT, lambda tile: (B * T * triton.cdiv(H, tile["BLOCK_H"]),), out_ptr=out, dq_ptr=dq, **shared)
    launcher(LATENT_GRADIENT, lambda tile: (B * T * triton.cdiv(K, tile["BLOCK_K"]),), dkv_ptr=dkv, S=S, **shared)
    return dq, dkv.to(kv.dtype)


class SparseAttention(torch.autograd.Function):
    """Attention over selected tokens with its gradients; the list of tokens has none."""

    @staticmethod
    def forward(ctx, q, kv, selected, scale, value_width):  # type: ignore[override]
        """Keep the answer and the logarithm of the softmax's sum, not the weights."""
        out, lse = attend(q, LatentKV.split(kv, value_width), selected, scale)
        ctx.save_for_backward(q, kv, selected, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, *grad):
        """Launch both kernels."""
        q, kv, selected, out, lse = ctx.saved_tensors
        dq, dkv = gradients(q, kv, selected, out, lse, grad[0], ctx.scale)
        return dq, dkv, None, None, None
