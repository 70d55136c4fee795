"""The Triton kernels under the names and signatures of `loops`, and what they refuse.

It has no `attention_mass` and no `indexer_loss`: they are training's, and `tiled` has them on every device. Dense
attention is here for decoding on the latents only (one query a sequence, one key shared by all heads): that width is
beyond the library's fused kernels, and for the rest these are as fast as it goes.

Index vectors in eight bits are multiplied as they are where the tensor cores take FP8; elsewhere, and int8 everywhere,
as fp16, which holds every code exactly. An FP8 cache is read in place.
"""

import torch
from torch import Tensor

from dsa.kernels.fp8 import E4M3, QuantizedLatentKV, QuantizedTensor
from dsa.kernels.triton.index_logits import index_logits
from dsa.kernels.triton.launch import interpreted
from dsa.kernels.triton.sparse_attention import GROUP, LatentKV, attend, num_splits
from dsa.kernels.triton.sparse_backward import SparseAttention
from dsa.kernels.triton.top_k import top_k as radix_select

ACCEPTS_QUANTIZED_KEYS = ACCEPTS_QUANTIZED_KV = True
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_VALUE_WIDTH = 512
MAX_WIDTH = {"sparse_attention": 576, "dense_attention": 576, "index_scores": 256, "index_topk": 256}
MAX_SCORE_BYTES = 2**30  # of index scores held at once


def unsupported_reason(operation: str, *tensors: Tensor) -> str:
    """Why these tensors are not for Triton, empty if they are."""
    device, dtypes = tensors[0].device.type, {x.dtype for x in tensors if x.is_floating_point()}
    if device == "cpu" and not interpreted():
        return "it needs tensors on a GPU (or TRITON_INTERPRET=1, set before Python starts), and these are on cpu"
    if device not in ("cpu", "cuda", "meta"):
        return f"there is no Triton for device {device!r}"
    if device == "cpu" and torch.bfloat16 in dtypes:
        return "Triton's interpreter multiplies bf16 wrongly: give fp16 or fp32"
    if not dtypes <= set(DTYPES):
        return f"it takes fp16, bf16 and fp32, not {', '.join(sorted(str(dtype) for dtype in dtypes - set(DTYPES)))}"
    if operation != "select" and len({x.dtype for x in tensors[:2]}) > 1:
        return f"queries and keys must have one type, not {tensors[0].dtype} and {tensors[1].dtype}"
    if (width := tensors[0].shape[-1]) > MAX_WIDTH.get(operation, width):
        return f"vectors of {width} numbers do not fit its tiles, at most {MAX_WIDTH[operation]}"
    return _unsupported_shape_or_gradient(operation, *tensors)


def _unsupported_shape_or_gradient(operation: str, *tensors: Tensor) -> str:
    if operation == "dense_attention":
        q, k, v = tensors
        in_keys = v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and v.shape[-1] <= k.shape[-1]  # as in MLA
        if q.shape[1] > 1 or k.shape[2] > 1 or not in_keys:
            return (
                "its dense attention is for one query a sequence whose values are the first numbers of one shared key"
            )
        if v.shape[-1] > MAX_VALUE_WIDTH:
            return f"values of {v.shape[-1]} numbers do not fit its registers, at most {MAX_VALUE_WIDTH}"
    differentiable = operation in ("index_scores", "dense_attention")
    if differentiable and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return f"its {operation} has no gradient"
    return ""


def _supports_fp8(x: Tensor) -> bool:
    """Whether kernels on this device can read FP8: Nvidia's since Ada and Hopper; ROCm and the interpreter too."""
    return (
        x.device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(x.device) >= (8, 9)
    )


def _operands(q: Tensor, k: Tensor | QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Index queries, keys and the keys' scales as the tensor cores of this device take them."""
    if not isinstance(k, QuantizedTensor):
        return q, k, None
    dtype = E4M3 if q.dtype == E4M3 and _supports_fp8(q) else torch.float16  # fp16 holds every 8-bit code exactly
    return q.to(dtype), k.codes.to(dtype), k.scale


def index_scores(q: Tensor, k: Tensor | QuantizedTensor, w: Tensor) -> Tensor:
    """Score every visible key for every query (report Eq. 1); see `loops.index_scores`."""
    q, k, scale = _operands(q, k)
    return index_logits(q, k, w, scale)


def select(scores: Tensor, top_k: int) -> Tensor:
    """Choose the `top_k` best keys of each row; see `loops.select`."""
    return radix_select(scores, top_k)


def index_topk(q: Tensor, k: Tensor | QuantizedTensor, w: Tensor, top_k: int) -> Tensor:
    """Score and choose by tiles of queries, whose scores take at most a gigabyte; see `loops.index_topk`."""
    q, k, scale = _operands(q, k)
    (B, T, *_), S = q.shape, k.shape[1]
    tile = max(1, MAX_SCORE_BYTES // (4 * B * S))
    parts = []
    for begin in range(0, T, tile):
        rows = slice(begin, min(begin + tile, T))
        seen = S - T + rows.stop
        scores = index_logits(q[:, rows], k[:, :seen], w[:, rows], None if scale is None else scale[:, :seen])
        chosen = radix_select(scores, top_k, seen - (rows.stop - rows.start) + 1)
        parts.append(torch.nn.functional.pad(chosen, (0, min(top_k, S) - chosen.shape[-1]), value=-1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def sparse_attention(
    q: Tensor, kv: Tensor | QuantizedLatentKV, selected: Tensor, scale: float, value_width: int
) -> Tensor:
    """Attend to the selected tokens (report Eq. 2), with gradients; see `loops.sparse_attention`."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or (isinstance(kv, Tensor) and kv.requires_grad))
    splits = num_splits(q.shape[0] * q.shape[1], q.shape[2], selected.shape[-1])
    if isinstance(kv, QuantizedLatentKV):
        if not needs_grad and kv.codes.shape[-1] == value_width and value_width % GROUP == 0 and _supports_fp8(q):
            return attend(q, LatentKV(kv.codes, kv.rope, kv.scale), selected, scale, splits)[0]
        kv = kv.dequantize(q.dtype)
    if needs_grad:
        return SparseAttention.apply(q, kv, selected, scale, value_width)
    return attend(q, LatentKV.split(kv, value_width), selected, scale, splits)[0]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend from one query a sequence to all its latents; see `loops.dense_attention`."""
    splits = num_splits(q.shape[0], q.shape[2], k.shape[1])
    return attend(q, LatentKV.split(k[:, :, 0], v.shape[-1]), None, scale, splits)[0]
