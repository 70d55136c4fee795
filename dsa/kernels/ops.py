"""One face for all kernels: tensors in, tensors out, shapes checked, backend chosen.

`backend=None` takes the one that does least work on the tensors' device and can do what is asked; a name forces one.
`backends` has the list and says how it chooses. What each operation computes is written down in `loops`.

Index queries and keys may come in eight bits: keys as `fp8.QuantizedTensor`, queries as codes whose scale has been
folded into the head weights. A backend that multiplies codes (ACCEPTS_QUANTIZED_KEYS) gets them as they are, for any
other they are dequantized first. So it is with the latents of an FP8 cache, `fp8.QuantizedLatentKV`, and backends that
read them in place (ACCEPTS_QUANTIZED_KV).
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dsa.kernels.backends import choose_backend
from dsa.kernels.fp8 import QuantizedLatentKV, QuantizedTensor
from dsa.kernels.loops import EMPTY

__all__ = [
    "EMPTY", "attention_mass", "dense_attention", "index_scores", "index_topk", "indexer_loss", "select",
    "sparse_attention",
]  # fmt: skip


_split = cache(str.split)  # the same few shapes are asked for in every layer


def _check_shapes(**tensors: tuple[Tensor, str]) -> None:
    """Hold tensors against their shape letters: the same letter must mean the same size everywhere.

    Digits are literal sizes, `*` is any. Raises ValueError naming the tensor, its shape and what was expected.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, letters) in tensors.items():
        expected, shape = _split(letters), tensor.shape
        fits = len(shape) == len(expected)
        for letter, size in zip(expected, shape, strict=False):
            fits = fits and (letter == "*" or sizes.setdefault(letter, size) == size)
        if not fits:
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({', '.join(expected)}) with {known}")
    if sizes.get("T", 0) > sizes.get("S", sizes.get("T", 0)):
        raise ValueError(
            f"{sizes['T']} queries but only {sizes['S']} keys: the queries are the last T of the S positions"
        )


def _check_heads(q: Tensor, k: Tensor) -> None:
    """Keys are either one per head or shared by all."""
    heads, groups = q.shape[2], k.shape[2]
    if groups not in (1, heads):
        raise ValueError(f"k has {groups} heads and q {heads}: give a key per head, or one shared by all")


def _check_selected(q: Tensor, selected: Tensor | None) -> None:
    if selected is not None:
        _check_shapes(q=(q, "B T * *"), selected=(selected, "B T *"))


def _check_top_k(top_k: int) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k={top_k!r}: it must be a whole number of at least 1, the tokens that each query keeps")


def _index_backend(
    operation: str, q: Tensor, k: Tensor | QuantizedTensor, w: Tensor, forced: str | None
) -> tuple[ModuleType, Tensor, Tensor | QuantizedTensor]:
    """Check the factors of Eq. 1 and choose who multiplies them: the backend, and q and k as it takes them."""
    k_values = k.codes if isinstance(k, QuantizedTensor) else k
    _check_shapes(q=(q, "B T J W"), k=(k_values, "B S W"), w=(w, "B T J"))
    if not isinstance(k, QuantizedTensor):
        return choose_backend(operation, (q, k, w), forced), q, k
    # backends are asked about fp32 tensors of these shapes: one number, expanded, takes no memory
    placeholders = [w.new_empty(1, dtype=torch.float32).expand(codes.shape) for codes in (q, k_values)]
    module = choose_backend(operation, (*placeholders, w.float()), forced)
    return (module, q, k) if getattr(module, "ACCEPTS_QUANTIZED_KEYS", False) else (module, q.float(), k.dequantize())


def index_scores(q: Tensor, k: Tensor | QuantizedTensor, w: Tensor, *, backend: str | None = None) -> Tensor:
    """Score every visible key (report Eq. 1): q (B, T, J, W), k (B, S, W), w (B, T, J) -> I (B, T, S), -inf unseen."""
    module, q, k = _index_backend("index_scores", q, k, w, backend)
    return module.index_scores(q, k, w)


def select(scores: Tensor, top_k: int, *, backend: str | None = None) -> Tensor:
    """Choose the best keys of a score matrix: (B, T, S) -> (B, T, min(K, S)), -1 where a row has too few."""
    _check_shapes(scores=(scores, "B T S"))
    _check_top_k(top_k)
    return choose_backend("select", (scores,), backend).select(scores, top_k)


def index_topk(q: Tensor, k: Tensor | QuantizedTensor, w: Tensor, top_k: int, *, backend: str | None = None) -> Tensor:
    """Score and choose, no score kept: the arguments of `index_scores` -> selected (B, T, min(K, S)), -1 for empty."""
    _check_top_k(top_k)
    module, q, k = _index_backend("index_topk", q, k, w, backend)
    return module.index_topk(q, k, w, top_k)


def sparse_attention(
    q: Tensor,
    kv: Tensor | QuantizedLatentKV,
    selected: Tensor,
    scale: float,
    value_width: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attend to the selected tokens (report Eq. 2).

    q (B, T, H, C + R), kv (B, S, C + R), selected (B, T, K) with -1 for empty -> (B, T, H, C) for value_width = C.
    """
    if isinstance(kv, QuantizedLatentKV):
        _check_shapes(codes=(kv.codes, "B S C"), scale=(kv.scale, "B S *"), rope=(kv.rope, "B S R"))
        width = kv.codes.shape[-1] + kv.rope.shape[-1]
        kv_values = q.new_empty(1).expand(*kv.codes.shape[:2], width)  # a placeholder that takes no memory
    else:
        kv_values = kv
    _check_shapes(q=(q, "B T H D"), kv=(kv_values, "B S D"), selected=(selected, "B T K"))
    if not 0 < value_width <= kv_values.shape[-1]:
        raise ValueError(f"value_width={value_width}: it must lie in 1 ... {kv_values.shape[-1]}, the width of kv")
    module = choose_backend("sparse_attention", (q, kv_values, selected), backend)
    if isinstance(kv, QuantizedLatentKV) and not getattr(module, "ACCEPTS_QUANTIZED_KV", False):
        kv, selected = dequantize_selected(kv, selected, q.dtype)
    return module.sparse_attention(q, kv, selected, scale, value_width)


def dequantize_selected(kv: QuantizedLatentKV, selected: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers for a backend that reads no codes, and the selection (B, T, K) among them.

    One query a sequence, as in decoding, wants K tokens of the S, and only these are expanded: a step costs the same
    however much the cache holds. The queries of a prompt want nearly all of it together.
    """
    if selected.shape[1] > 1:
        return kv.dequantize(dtype), selected
    row = torch.arange(len(selected), device=selected.device)[:, None]
    gathered = QuantizedLatentKV(*(part[row, selected[:, 0].clamp(min=0)] for part in kv))  # (B, K, ...)
    slots = torch.arange(selected.shape[2], device=selected.device).expand_as(selected)
    return gathered.dequantize(dtype), slots.where(selected != EMPTY, selected)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, backend: str | None = None) -> Tensor:
    """Attend to every visible token: q (B, T, H, D), k (B, S, G, D), v (B, S, G, V), G = H or 1 -> (B, T, H, V)."""
    _check_shapes(q=(q, "B T H D"), k=(k, "B S G D"), v=(v, "B S G V"))
    _check_heads(q, k)
    return choose_backend("dense_attention", (q, k, v), backend).dense_attention(q, k, v, scale)


def attention_mass(
    q: Tensor, k: Tensor, scale: float, selected: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Attention each key gets, averaged over heads (report Eq. 3 and 4).

    q (B, T, H, D), k (B, S, G, D) -> (B, T, S); with selected (B, T, K) -> (B, T, K), each head's softmax over these.
    """
    _check_shapes(q=(q, "B T H D"), k=(k, "B S G D"))
    _check_heads(q, k)
    _check_selected(q, selected)
    return choose_backend("attention_mass", (q, k), backend).attention_mass(q, k, scale, selected)


def indexer_loss(
    index_q: Tensor, index_k: Tensor, index_w: Tensor, q: Tensor, k: Tensor, scale: float,
    selected: Tensor | None = None, *, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """KL(attention || softmax(I)), a scalar, the mean over queries (report Eq. 3; Eq. 4 with `selected`).

    Arguments as in `index_scores` and `attention_mass`. Gradients reach the index tensors only.
    """
    _check_shapes(index_q=(index_q, "B T J W"), index_k=(index_k, "B S W"), index_w=(index_w, "B T J"),
                  q=(q, "B T H D"), k=(k, "B S G D"))  # fmt: skip
    _check_heads(q, k)
    _check_selected(q, selected)
    return choose_backend("indexer_loss", (index_q, index_k, index_w, q, k), backend).indexer_loss(
        index_q, index_k, index_w, q, k, scale, selected
    )
