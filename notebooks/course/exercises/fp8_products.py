"""Two exercises of chapter 07 about products of codes: a matrix product in blocks, and index scores.

They are about what is multiplied, not about the result alone: whoever turns codes back into fp32 first gets the same
numbers, but no FP8 unit could have helped. So the checkers look into each matrix product (`_CodesOnly`), and hand out
scales that are no powers of two, because codes times a power of two may be codes again.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from course.exercises.exercise import Exercise, require
from dsa.kernels import fp8, loops

SCALED = "right, but a matrix product was given numbers that are no codes: multiply codes first, scale afterwards"


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class _CodesOnly(TorchDispatchMode):
    """Notes whether all matrix products over `least` numbers or more have numbers of e4m3 as factors."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.kept = least, True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation, and look at the two factors of a product."""
        if function.overloadpacket.__name__ in ("mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm"):
            left, right = args[-2:]
            if left.shape[-1] >= self.least:
                self.kept &= all(torch.equal(x.float(), fp8.round_to(x.float())) for x in (left, right))
        return function(*args, **(kwargs or {}))


def my_block_matmul(x, x_scale, w, w_scale) -> Tensor:
    """Multiply quantised matrices: x (M, N), w (O, N) -> x w^T (M, O).

    x (M, N) holds codes with x_scale (M, N / 128), one for each run of 128;
    w (O, N) with w_scale (O / 128, N / 128), one for each square.
    Codes arrive as fp32. Multiply codes first, scales afterwards.
    """
    total = torch.zeros(len(x), len(w))
    for n in range(x_scale.shape[1]):
        columns = slice(128 * n, 128 * (n + 1))
        part = x[:, columns] @ w[:, columns].T  # (M, O), codes only
        per_output = w_scale[:, n].repeat_interleave(128)  # (O,)
        total += part * x_scale[:, n, None] * per_output
    return total


def _scales_at_the_end(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Sums over all columns and applies the first block's scales: blocks differ."""
    return x @ w.T * x_scale[:, :1] * w_scale[:, 0].repeat_interleave(128)


def _rows_and_columns_swapped(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Repeats a block's scale in the wrong order, 0 1 0 1 ... instead of 0 0 ... 1 1."""
    wide = w_scale.repeat(128, 1)
    parts = [
        x[:, 128 * n : 128 * n + 128] @ w[:, 128 * n : 128 * n + 128].T * x_scale[:, n, None] * wide[:, n]
        for n in range(x_scale.shape[1])
    ]
    return torch.stack(parts).sum(0)


def _scales_first(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Multiplies codes with scales and then matrices: the same result, but the unit would have to multiply fp32."""
    return fp8.dequantize(x, x_scale) @ fp8.dequantize(w, w_scale, fp8.BLOCK).T


def _forgets_the_weights(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Applies the activations' scales and forgets the weights'."""
    return (x * x_scale.repeat_interleave(128, 1)) @ w.T


def _divides(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Divides by the scales. (The files call them weight_scale_inv, and they are multiplied with.)"""
    wide = fp8.expand_scale(w_scale, w.shape, fp8.BLOCK)
    return (x / x_scale.repeat_interleave(128, 1)) @ (w / wide).T


def _check_matmul(answer) -> None:
    x = _normal(5, 384, seed=0) * torch.tensor([1.0, 30.0, 0.1]).repeat_interleave(128)
    w = _normal(256, 384, seed=1) * torch.tensor([1.0, 0.01, 8.0]).repeat_interleave(128)
    w[128:] *= 50
    (x8, x_scale), (w8, w_scale) = fp8.quantize(x, ue8m0=False), fp8.quantize(w, fp8.BLOCK, ue8m0=False)
    with _CodesOnly(least=128) as codes:
        found = answer(x8.float(), x_scale.clone(), w8.float(), w_scale.clone())
    require(getattr(found, "shape", None) == (5, 256), "5 rows and 256 outputs give shape (5, 256)")
    right = fp8.matmul(x8, x_scale, w8, w_scale)
    error = float((found - right).norm() / right.norm())
    require(error < 1e-5, f"it is off by {error:.0%}: each block of 128 columns has scales of its own")
    require(codes.kept, SCALED)


def my_index_scores(q, q_scale, k, k_scale, w) -> Tensor:
    """Index scores of one query from codes alone: -> (S,).

    q (J, W) and k (S, W) hold codes; q_scale (J,), k_scale (S,), w (J,).
    The only product of vectors is one of codes, as an FP8 unit would do it.
    """
    products = (q @ k.T).relu()  # (J, S), codes only
    return k_scale * ((w * q_scale) @ products)


def _scale_squared(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, w: Tensor) -> Tensor:
    """Applies the query's scale to the codes and to the head weight."""
    return k_scale * ((w * q_scale) @ ((q * q_scale[:, None]) @ k.T).relu())


def _one_query_scale(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, w: Tensor) -> Tensor:
    """Pulls the query's scale out of the sum over heads, as if all heads shared one."""
    return k_scale * q_scale.mean() * (w @ (q @ k.T).relu())


def _weights_before_relu(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, w: Tensor) -> Tensor:
    """Moves the head weight in front of the ReLU too: it may be negative, and then it must not."""
    return k_scale * ((w * q_scale)[:, None] * (q @ k.T)).relu().sum(0)


def _scales_inside(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, w: Tensor) -> Tensor:
    """Leaves both scales inside the ReLU: the same scores, from a product of numbers that are not codes."""
    return w @ ((q * q_scale[:, None]) @ (k * k_scale[:, None]).T).relu()


def _forgets_the_key(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, w: Tensor) -> Tensor:
    """Forgets the key's scale: it is the same for all heads, but not for all keys."""
    return (w * q_scale) @ (q @ k.T).relu()


def _check_index(answer) -> None:
    sizes = torch.tensor([1.0, 20.0, 0.2, 3.0])
    q, k, w = _normal(1, 1, 4, 32, seed=2) * sizes[:, None], _normal(1, 40, 32, seed=3), _normal(1, 1, 4, seed=4)
    k = k * torch.logspace(-1, 1, 40)[:, None]
    (q8, q_scale), (k8, k_scale) = fp8.quantize(q, ue8m0=False), fp8.quantize(k, ue8m0=False)
    given = q8[0, 0].float(), q_scale[0, 0, :, 0], k8[0].float(), k_scale[0, :, 0], w[0, 0]
    with _CodesOnly(least=32) as codes:
        found = answer(*(x.clone() for x in given))
    require(getattr(found, "shape", None) == (40,), "40 keys give 40 scores: return a tensor of shape (40,)")
    right = loops.index_scores(fp8.dequantize(q8, q_scale), fp8.dequantize(k8, k_scale), w)[0, 0]
    error = float((found - right).norm() / right.norm())
    require(error < 1e-5, f"it is off by {error:.0%} from Eq. 1 with codes and scales multiplied first")
    require(codes.kept, SCALED)


BLOCK_MATMUL = Exercise(
    "A product in blocks", 2, 20,
    "This is how an FP8 matrix product works: the unit multiplies codes, and every 128 columns the partial sum is "
    "taken out, scaled and added up in fp32. Sizes here are multiples of 128. The checker looks into your matrix "
    "products: only codes may be multiplied there.",
    ("Loop over the column blocks n; `slice(128 * n, 128 * (n + 1))` cuts both matrices.",
     "The partial product (M, O) is multiplied by x's scale of each row and by w's scale of each output.",
     "`w_scale[:, n].repeat_interleave(128)` gives every one of the O outputs its scale."),
    my_block_matmul,
    (_scales_at_the_end, _rows_and_columns_swapped, _scales_first, _forgets_the_weights, _divides), _check_matmul,
)  # fmt: skip

INDEX_SCORES = Exercise(
    "Scores that never leave eight bits", 2, 15,
    "Eq. 1 from codes: multiply codes with codes, and put each scale where it may stand. Which of q_scale, k_scale "
    "and w may pass the ReLU, and why? The checker looks into the product of queries and keys.",
    ("ReLU(a x) = a ReLU(x) for a > 0. Scales are positive; a head weight need not be.",
     "`(q @ k.T).relu()` needs codes only; its shape is (J, S).",
     "The query's scale belongs to a head: multiply it with w, before the sum over heads. The key's comes last."),
    my_index_scores,
    (_scale_squared, _one_query_scale, _weights_before_relu, _scales_inside, _forgets_the_key), _check_index,
)  # fmt: skip
