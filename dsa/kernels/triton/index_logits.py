"""Index scores (report Eq. 1) in FP8: one matrix product whose answer never leaves the chip.

    I[t, s] = k_scale[s] * sum_j ReLU(q8[t, j] . k8[s]) * (w[t, j] * q_scale[t, j])

Every query meets every key, so this is the part of sparse attention that still grows with L^2, and the part
to do in the fewest and cheapest steps. The products q . k of all J heads are 64 times as many numbers as the scores. A
matrix product followed by a ReLU, a weighting and a sum would write and read them all; here they are summed
over the heads in the registers where the tensor core left them, and only the sum is written.

How the tile lies matters. A program keeps BLOCK_S keys and walks through its queries one at a time, so the product is
(BLOCK_S keys) x (J heads): the heads lie along a row, a row is held by a few neighbouring threads, and the sum over
heads needs hardly any exchange. The keys stay in shared memory for all BLOCK_T queries; a query is 8 KB.

Tiles wholly in the future are filled with -inf without a product, which halves the work of a prompt. All scales stay
outside of the product: that is what ReLU(a x) = a ReLU(x) is good for. Hopper's tensor cores sum FP8
products in about 14 bits, which is coarser than fp32 and finer than the codes themselves.

The same kernel takes fp16, bf16 and fp32 without scales.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa.kernels.triton.launch import Kernel, Launcher, check_int32_offsets, launch, length_bucket, padded_width


@triton.jit
def index_logits_kernel(
    q_ptr, w_ptr, k_ptr, k_scale_ptr, scores_ptr,
    T, S, T_bucket, S_bucket, k_batch_stride, k_stride,
    J: tl.constexpr, W: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_S keys against up to BLOCK_T queries of one sequence."""
    sequence = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(1) * BLOCK_T
    end = tl.minimum(begin + BLOCK_T, T)
    first_key = tl.program_id(0) * BLOCK_S
    keys = first_key + tl.arange(0, BLOCK_S)
    heads, dims = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_W)

    # query t stands at S - T + t: the earlier ones see none of these keys
    seeing = tl.minimum(tl.maximum(begin, first_key - (S - T)), end)
    for t in tl.range(begin, seeing):
        unseen = tl.full((BLOCK_S,), float("-inf"), tl.float32)
        tl.store(scores_ptr + (sequence * T + t) * S + keys, unseen, mask=keys < S)

    k_at = sequence * k_batch_stride + keys[:, None] * k_stride + dims[None, :]
    k = tl.load(k_ptr + k_at, mask=(keys < S)[:, None] & (dims < W)[None, :], other=0.0)
    if SCALED:
        k_scale = tl.load(k_scale_ptr + sequence * S + keys, mask=keys < S, other=0.0)

    for t in tl.range(seeing, end):
        row = (sequence * T + t) * J + heads
        q = tl.load(
            q_ptr + row[:, None] * W + dims[None, :], mask=(heads < J)[:, None] & (dims < W)[None, :], other=0.0
        )
        w = tl.load(w_ptr + row, mask=heads < J, other=0.0)
        products = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_S, BLOCK_J)
        scores = tl.sum(tl.maximum(products, 0.0) * w[None, :], axis=1)  # Eq. 1
        if SCALED:
            scores *= k_scale
        scores = tl.where(keys <= S - T + t, scores, float("-inf"))
        tl.store(scores_ptr + (sequence * T + t) * S + keys, scores, mask=keys < S)


def tile_config(keys: int, queries: int, warps: int, stages: int) -> triton.Config:
    """One configuration for the tuner."""
    return triton.Config({"BLOCK_S": keys, "BLOCK_T": queries}, num_warps=warps, num_stages=stages)


INDEX_LOGITS = Kernel(
    index_logits_kernel,
    [
        tile_config(128, 64, 4, 3),
        tile_config(256, 64, 8, 3),
        tile_config(128, 32, 4, 4),
        tile_config(512, 1, 8, 1),
        tile_config(32, 16, 4, 2),
    ],
    key=("T_bucket", "S_bucket", "J", "W"),
)


def index_logits(q: Tensor, k: Tensor, w: Tensor, k_scale: Tensor | None = None, launcher: Launcher = launch) -> Tensor:
    """Score every visible key.

    Args:
        q: index queries (B, T, J, W): FP8 codes, or plain fp16, bf16, fp32.
        k: index keys (B, S, W) of the same type; part of a larger cache is read in place.
        w: head weights (B, T, J), times the queries' scales if these are codes.
        k_scale: the keys' scales (B, S, 1), for codes.

    Returns:
        I (B, T, S) in fp32, -inf in the future.
    """
    (B, T, J, W), S = q.shape, k.shape[1]
    k = k if k.stride(-1) == 1 else k.contiguous()
    check_int32_offsets("k", k)
    scores = torch.empty(B, T, S, dtype=torch.float32, device=q.device)
    weights = w.float().contiguous()
    scale = weights if k_scale is None else k_scale.float().contiguous()  # a kernel's pointer must point at something

    def grid(tile):
        return triton.cdiv(S, tile["BLOCK_S"]), triton.cdiv(T, tile["BLOCK_T"]), B

    launcher(
        INDEX_LOGITS, grid, q_ptr=q.contiguous(), w_ptr=weights, k_ptr=k, k_scale_ptr=scale, scores_ptr=scores,
        T=T, S=S, T_bucket=length_bucket(T), S_bucket=length_bucket(S),
        k_batch_stride=k.stride(0), k_stride=k.stride(1), J=J, W=W, BLOCK_J=padded_width(J),
        BLOCK_W=max(32, padded_width(W)), SCALED=k_scale is not None,
    )  # fmt: skip
    return scores


def index_logits_fp8(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, w: Tensor, launcher: Launcher = launch
) -> Tensor:
    """Score codes as `fp8.index_scores` does: the same arguments, the same answer (B, T, S)."""
    return index_logits(q, k, w.float() * q_scale[..., 0], k_scale, launcher)
