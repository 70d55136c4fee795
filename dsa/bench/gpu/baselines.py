"""The strongest that the library has for each job, and our own plain code where it has nothing.

* Dense attention over a prompt: the fused kernels of `scaled_dot_product_attention`, flash and cuDNN. Where a block of
  queries stands at the end of its keys, only flash can mask the corner that is not seen; without a mask the corner is
  computed too, and the share of it is taken off the time: as if the mask were free. Flash wants values as wide as keys.
* Dense attention on the latents, 576 wide: no fused kernel but the memory-efficient one may take it.
* The index scores: a bare matrix product of the same codes in FP8, without ReLU, weights and sum.
* Choosing: `torch.topk`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from dsa.bench.gpu.benchmark_case import COPY, Candidate, Candidates
from dsa.bench.gpu.correctness import relative_error
from dsa.bench.gpu.inputs import Inputs, Shape
from dsa.kernels import reference

ROWS = 16384  # of codes in the bare product
HEADS = 32  # at a time, where all are too many


def fused(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float, masked: bool = False) -> Tensor:
    """Attention (B, H, T, V) by one of the library's kernels and no other; `masked`: the queries stand at the end."""
    mask = causal_lower_right(q.shape[2], k.shape[2]) if masked else None
    with sdpa_kernel([kernel]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def by_heads(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """cuDNN's kernel on HEADS at a time: all heads of a long text are more numbers than 32 bits count."""
    parts = [x.split(HEADS, dim=1) for x in (q, k, v)]
    groups = zip(parts[0], parts[1], parts[2], strict=True)
    return torch.cat([fused(SDPBackend.CUDNN_ATTENTION, a, b, c, scale) for a, b, c in groups], dim=1)


def prompt(make: Inputs, shape: Shape, T: int, S: int) -> Candidates:
    """Dense attention of the last T of S queries, heads expanded (MHA)."""
    H, D, V = shape.heads, shape.nope + shape.rotary, shape.value
    q = make.each(lambda: make.normal(1, H, T, D))
    k = make.each(lambda: make.normal(1, H, S, D))
    v = make.each(lambda: make.normal(1, H, S, V))
    wide = [F.pad(x, (0, D - V)) for x in v]

    def error(out: Tensor, rows: tuple[int, ...] = (-1,)) -> float:
        """Only the last query sees everything, masked or not."""
        found, expected = [], []
        for t in rows:
            seen = S if t == -1 else S - T + t + 1
            few = [x[0][:, :2, :seen].transpose(1, 2) for x in (k, v)]
            one = q[0][:, :2, t][:, None]  # (1, 1, 2, D)
            expected.append(reference.dense_attention(one.float(), few[0].float(), few[1].float(), shape.scale))
            found.append(out[:, :2, t, :V][:, None])
        return relative_error(torch.cat(found), torch.cat(expected))

    pairs = T * S - T * (T - 1) / 2
    whole: dict[str, Any] = {"flop": 2 * H * (D + V) * T * S, "counted": pairs / (T * S)}
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    return {
        "dense MHA, cuDNN": Candidate(lambda n: fused(cudnn, q[n], k[n], v[n], shape.scale), error, **whole),
        "dense MHA, cuDNN by heads": Candidate(lambda n: by_heads(q[n], k[n], v[n], shape.scale), error, **whole),
        "dense MHA, flash": Candidate(lambda n: fused(flash, q[n], k[n], wide[n], shape.scale), error, **whole),
        "dense MHA, flash, masked": Candidate(
            lambda n: fused(flash, q[n], k[n], wide[n], shape.scale, masked=True),
            lambda out: error(out, (0, T // 2, -1)), flop=2 * H * (D + V) * pairs,
        ),
    }  # fmt: skip


def latents(q: Tensor, kv: Tensor, scale: float, value_width: int) -> Tensor:
    """Dense attention on the latents by the memory-efficient kernel, heads as rows: (B, 1, H, C)."""
    k = kv[:, None]  # (B, 1, S, C + R)
    return fused(SDPBackend.EFFICIENT_ATTENTION, q, k, k[..., :value_width], scale)


def product(make: Inputs, q: list[Tensor], k: list[Tensor]) -> Candidate:
    """The products of ROWS query codes with all key codes in FP8: what a matrix unit needs for that alone."""
    rows = [x.flatten(0, -2)[:ROWS] for x in q]
    one = torch.ones((), device=make.device)

    def call(n: int) -> Tensor:
        return torch._scaled_mm(rows[n], k[n][0].T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    flop = 2 * len(rows[0]) * k[0][0].numel()
    return Candidate(call, lambda out: relative_error(out[:16], rows[0][:16].float() @ k[0][0].float().T), flop=flop)


def copy(make: Inputs, count: float) -> Candidate:
    """Read half of so many bytes and write them elsewhere: the bandwidth that this machine reaches."""
    x = make.each(lambda: make.normal(max(1, int(count) // 8), dtype=torch.float32))
    y = torch.empty_like(x[0])
    return Candidate(
        lambda n: y.copy_(x[n]), lambda out: relative_error(out, x[0]), 0, bytes=2 * y.nbytes, cuda_graph=True
    )


def machine(make: Inputs, shape: Shape) -> Candidates:
    """What the machine itself does: products in bf16 and FP8 of square matrices, and a copy of 4 GB in all."""
    n, fp32 = shape.square, torch.float32
    a, b = make.each(lambda: make.normal(n, n)), make.each(lambda: make.normal(n, n))
    codes = [(make.codes(n, n)[None], make.codes(n, n)[None]) for _ in range(make.sets)]
    return {
        f"matrix product, {str(make.dtype).removeprefix('torch.')}": Candidate(
            lambda i: a[i] @ b[i].T,
            lambda out: relative_error(out[:4], a[0][:4].to(fp32) @ b[0].T.to(fp32)),
            flop=2 * n**3,
        ),
        "matrix product, FP8": product(make, [x for x, _ in codes], [y for _, y in codes]),
        COPY: copy(make, 64 * n * n),
    }
