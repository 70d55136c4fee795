"""Dense attention on a processor, as fast as this library makes it: the fair baseline.

Whoever says that sparse attention is so many times faster has to say than what. Three things make a dense baseline
slow without a word, and are avoided here. Values narrower than keys send the fused kernel to a T x S matrix: they are
padded. A causal mask of a chunk (1 < T < S) costs it up to 1.7 times as long, because the mask is a T x S matrix too:
past keys need no mask, the chunk's own are a causal square, and the two results are merged by their log-sum-exp. And
for one decoded token whose heads share a key the fused kernel is slow in bf16, and with many heads: there two matrix
products a tile of keys do it, with a running maximum.
"""

import torch
from torch import Tensor

from dsa.kernels.cpu.scoring import compute_dtype
from dsa.kernels.reference import at_least_fp32
from dsa.kernels.tiled import pad_values, tiles

QUERY_TILE = 1024  # smaller ones are slower, which would flatter sparse attention
KEY_TILE = 2048  # of decoding
FUSED_DECODE_HEADS = 64  # up to which the fused kernel decodes faster in fp32


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The library's fused kernel: q (B, H, T, D), k and v (B, H, S, D) -> the result, and log-sum-exp (B, H, T)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def attend_tile(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One tile of queries (B, H, T, D), the last of the positions of k and v (B, H, S, D): -> (B, H, T, D)."""
    T, S = q.shape[2], k.shape[2]
    own, own_lse = flash_attention(q, k[:, :, S - T :], v[:, :, S - T :], scale, causal=True)
    if T == S:
        return own
    past, past_lse = flash_attention(q, k[:, :, : S - T], v[:, :, : S - T], scale, causal=False)
    # each part's share of the joint softmax is e^lse over the sum of both: for the past that is a sigmoid
    past_share = torch.sigmoid(past_lse - own_lse)[..., None]
    return own.lerp(past, past_share.to(own.dtype))


def prefill(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q (B, T, H, D), k (B, S, G, D), v (B, S, G, V), V <= D -> (B, T, H, V)."""
    V, H = v.shape[3], q.shape[2]
    v = pad_values(v, k)
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).expand(-1, H, -1, -1) for x in (k, v))  # (B, H, T or S, D)
    out = [
        attend_tile(q[:, :, rows], k[:, :, :seen], v[:, :, :seen], scale)
        for rows, seen in tiles(q.shape[2], k.shape[2], QUERY_TILE)
    ]
    return torch.cat(out, dim=2).transpose(1, 2)[..., :V]


def decode(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One token whose heads share a key: q (H, D), k (S, D), v (S, V) -> (H, V)."""
    if k.dtype == torch.float32 and len(q) <= FUSED_DECODE_HEADS:
        one = (None, None)  # sequence, head: the heads of the query become its rows
        return flash_attention(q[one].to(k.dtype), k[one], pad_values(v, k)[one], scale, causal=False)[0][
            0, 0, :, : v.shape[1]
        ]
    return decode_tiles(q, k, v, scale)


def decode_tiles(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same by an online softmax over tiles of keys."""
    dtype = compute_dtype(k.dtype)
    q = q.to(dtype)
    out = at_least_fp32(q).new_zeros(len(q), v.shape[1])
    row_sum, row_max = out.new_zeros(len(q), 1), out.new_full((len(q), 1), float("-inf"))
    for keys, values in zip(k.split(KEY_TILE), v.split(KEY_TILE), strict=True):
        logits = at_least_fp32(q @ keys.to(dtype).t()).mul_(scale)
        new_max = torch.maximum(row_max, logits.amax(-1, keepdim=True))
        weights, rescale = logits.sub_(new_max).exp_(), (row_max - new_max).exp_()
        row_sum, row_max = row_sum * rescale + weights.sum(-1, keepdim=True), new_max
        out = out.mul_(rescale).add_(weights.to(dtype) @ values.to(dtype))
    return out / row_sum
