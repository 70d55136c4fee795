"""One face for all kernels: tensors in, tensors out, shapes checked, backend chosen.

`backend=None` takes the one that does least work on the tensors' device and can do what is asked; a name forces one.
`backends` has the list and says how it chooses. What each operation computes is written down in `loops`.

Index queries and keys may come in eight bits: keys as `fp8.Codes`, queries as codes whose scale is in the head weights
already. A backend that multiplies codes gets them as they are, any other gets the numbers they stand for. So it is with
the latents of an FP8 cache, `fp8.LatentCodes`, and backends that read it.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dsa.kernels.backends import choose
from dsa.kernels.fp8 import Codes, LatentCodes
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
    operation: str, q: Tensor, k: Tensor | Codes, w: Tensor, forced: str | None
) -> tuple[ModuleType, Tensor, Tensor | Codes]:
    """Check the factors of Eq. 1 and choose who multiplies them: the backend, and q and k as it takes them."""
    vectors = k.numbers if isinstance(k, Codes) else k
    _check_shapes(q=(q, "B T J W"), k=(vectors, "B S W"), w=(w, "B T J"))
    if not isinstance(k, Codes):
        return choose(operation, (q, k, w), forced), q, k
    as_numbers = [w.new_empty(1, dtype=torch.float32).expand(codes.shape) for codes in (q, vectors)]  # takes no memory
    module = choose(operation, (*as_numbers, w.float()), forced)
    return (module, q, k) if getattr(module, "MULTIPLIES_CODES", False) else (module, q.float(), k.expand())


def index_scores(q: Tensor, k: Tensor | Codes, w: Tensor, *, backend: str | None = None) -> Tensor:
    """Score every visible key (report Eq. 1): q (B, T, J, W), k (B, S, W), w (B, T, J) -> I (B, T, S), -inf unseen."""
    module, q, k = _index_backend("index_scores", q, k, w, backend)
    return module.index_scores(q, k, w)


def select(scores: Tensor, top_k: int, *, backend: str | None = None) -> Tensor:
    """Choose the best keys of a score matrix: (B, T, S) -> (B, T, min(K, S)), -1 where a row has too few."""
    _check_shapes(scores=(scores, "B T S"))
    _check_top_k(top_k)
    return choose("select", (scores,), backend).select(scores, top_k)


def index_topk(q: Tensor, k: Tensor | Codes, w: Tensor, top_k: int, *, backend: str | None = None) -> Tensor:
    """Score and choose, no score kept: the arguments of `index_scores` -> selected (B, T, min(K, S)), -1 for empty."""
    _check_top_k(top_k)
    module, q, k = _index_backend("index_topk", q, k, w, backend)
    return module.index_topk(q, k, w, top_k)


def sparse_attention(
    q: Tensor, kv: Tensor | LatentCodes, selected: Tensor, scale: float, value_width: int, *, backend: str | None = None
) -> Tensor:
    """Attend to the selected tokens (report Eq. 2).

    q (B, T, H, C + R), kv (B, S, C + R), selected (B, T, K) with -1 for empty -> (B, T, H, C) for value_width = C.
    """
    as_numbers = _stand_in(q, kv) if isinstance(kv, LatentCodes) else kv
    _check_shapes(q=(q, "B T H D"), kv=(as_numbers, "B S D"), selected=(selected, "B T K"))
    if not 0 < value_width <= as_numbers.shape[-1]:
        raise ValueError(f"value_width={value_width}: it must lie in 1 ... {as_numbers.shape[-1]}, the width of kv")
    module = choose("sparse_attention", (q, as_numbers, selected), backend)
    if isinstance(kv, LatentCodes) and not getattr(module, "READS_LATENT_CODES", False):
        kv, selected = _expand_selected(kv, selected, q.dtype)
    return module.sparse_attention(q, kv, selected, scale, value_width)


def _expand_selected(kv: LatentCodes, selected: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers for a backend that reads no codes, and the selection among them.

    One query a sequence, as in decoding, wants K tokens of the S, and only these are expanded: a step costs the same
    however much the cache holds. The queries of a prompt want nearly all of it together.
    """
    if selected.shape[1] > 1:
        return kv.expand(dtype), selected
    row = torch.arange(len(selected), device=selected.device)[:, None]
    chosen = LatentCodes(*(part[row, selected[:, 0].clamp(min=EMPTY + 1)] for part in kv))  # (B, K, ...)
    slots = torch.arange(selected.shape[2], device=selected.device).expand_as(selected)
    return chosen.expand(dtype), slots.where(selected != EMPTY, selected)


def _stand_in(q: Tensor, kv: LatentCodes) -> Tensor:
    """A tensor of the shape that an FP8 cache stands for and of the queries' type; it takes no memory."""
    _check_shapes(numbers=(kv.numbers, "B S C"), scale=(kv.scale, "B S *"), rotary=(kv.rotary, "B S R"))
    B, S, C = kv.numbers.shape
    return q.new_empty(1).expand(B, S, C + kv.rotary.shape[-1])


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, backend: str | None = None) -> Tensor:
    """Attend to every visible token: q (B, T, H, D), k (B, S, G, D), v (B, S, G, V), G = H or 1 -> (B, T, H, V)."""
    _check_shapes(q=(q, "B T H D"), k=(k, "B S G D"), v=(v, "B S G V"))
    _check_heads(q, k)
    return choose("dense_attention", (q, k, v), backend).dense_attention(q, k, v, scale)


def attention_mass(
    q: Tensor, k: Tensor, scale: float, selected: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Attention each key gets, averaged over heads (report Eq. 3 and 4).

    q (B, T, H, D), k (B, S, G, D) -> (B, T, S); with selected (B, T, K) -> (B, T, K), each head's softmax over these.
    """
    _check_shapes(q=(q, "B T H D"), k=(k, "B S G D"))
    _check_heads(q, k)
    _check_selected(q, selected)
    return choose("attention_mass", (q, k), backend).attention_mass(q, k, scale, selected)


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
    return choose("indexer_loss", (index_q, index_k, index_w, q, k), backend).indexer_loss(
        index_q, index_k, index_w, q, k, scale, selected
    )
