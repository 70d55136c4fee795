"""The exercises of chapter 03: score, normalise and rotate; and the two of the bug catalogue.

The wrong answers are those of the bug catalogue wherever it has one: each was written by somebody, some were published.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from course.exercises import indexer_tests
from course.exercises.exercise import Answer, Exercise, checker, require
from dsa.kernels import loops
from dsa.model.rope import Rope


def my_index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Score every visible key: q (T, J, W), k (T, W), w (T, J) -> (T, T).

    Keys of the future get -inf.
    """
    per_head = torch.einsum("tjw,sw->tjs", q, k).relu()  # (T, J, S)
    scores = torch.einsum("tj,tjs->ts", w, per_head)  # Eq. 1
    visible = torch.ones_like(scores, dtype=torch.bool).tril()
    return scores.masked_fill(~visible, float("-inf"))


def _no_relu(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Leaves the ReLU out."""
    scores = torch.einsum("tj,tjw,sw->ts", w, q, k)
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))


def _relu_last(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Weighs first and cuts afterwards: a negative weight turns the order round."""
    scores = (w[..., None] * torch.einsum("tjw,sw->tjs", q, k)).relu().sum(1)
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))


def _positive_weights(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Makes the weights a mixture's: positive, with sum one."""
    return my_index_scores(q, k, w.softmax(-1))


def _zero_future(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Hides the future with 0, which beats every negative score."""
    return torch.einsum("tj,tjs->ts", w, torch.einsum("tjw,sw->tjs", q, k).relu()).tril()


def _check_scores(answer: Answer) -> None:
    generator = torch.Generator().manual_seed(31)
    q, k, w = (torch.randn(*shape, generator=generator) for shape in ((9, 3, 8), (9, 8), (9, 3)))
    found = answer(q.clone(), k.clone(), w.clone())
    require(getattr(found, "shape", None) == (9, 9), "9 queries and 9 keys give scores of shape (9, 9)")
    future = ~torch.ones(9, 9, dtype=torch.bool).tril()
    require((found[future] == float("-inf")).all(), "a key of the future needs -inf: a visible score may be below 0")
    right = loops.index_scores(q[None], k[None], w[None])[0]
    t, s = divmod(int((found - right).masked_fill(future, 0).abs().argmax()), 9)
    mine, wanted = float(found[t, s]), float(right[t, s])
    require(abs(mine - wanted) < 1e-4, f"I[{t}, {s}] is {wanted:.3f} by Eq. 1, yours is {mine:.3f}")


def my_index_key(raw, gain, bias, cos, sin) -> Tensor:
    """The index key of each token: raw (T, W) -> (T, W).

    LayerNorm with gain and bias (W,) and eps 1e-6, then rotate the first
    R numbers of the W by halves; cos and sin are (T, R/2).
    """
    k = F.layer_norm(raw, gain.shape, gain, bias, eps=1e-6)
    half = cos.shape[-1]
    a, b, still = k[:, :half], k[:, half : 2 * half], k[:, 2 * half :]
    turned = [a * cos - b * sin, b * cos + a * sin]
    return torch.cat([*turned, still], dim=-1)


def _neighbours(raw, gain, bias, cos, sin) -> Tensor:
    """Rotates neighbours, as MLA does and the first published code did."""
    k, half = F.layer_norm(raw, gain.shape, gain, bias, eps=1e-6), cos.shape[-1]
    a, b = k[:, 0 : 2 * half : 2], k[:, 1 : 2 * half : 2]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned, k[:, 2 * half :]], dim=-1)


def _last_part(raw, gain, bias, cos, sin) -> Tensor:
    """Rotates the last R numbers: MLA's layout."""
    half = cos.shape[-1]
    k = F.layer_norm(raw, gain.shape, gain, bias, eps=1e-6).roll(2 * half, -1)
    a, b, still = k[:, :half], k[:, half : 2 * half], k[:, 2 * half :]
    return torch.cat([still, a * cos - b * sin, b * cos + a * sin], dim=-1)


def _default_eps(raw, gain, bias, cos, sin) -> Tensor:
    """Leaves eps at 1e-5, the default of torch."""
    return my_index_key(F.layer_norm(raw, gain.shape), gain, bias, cos, sin)


def _rms(raw, gain, bias, cos, sin) -> Tensor:
    """Uses an RMSNorm: the mean is not subtracted and the bias is lost."""
    k, half = F.rms_norm(raw, gain.shape, gain, eps=1e-6), cos.shape[-1]
    a, b, still = k[:, :half], k[:, half : 2 * half], k[:, 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, still], dim=-1)


def _check_key(answer: Answer) -> None:
    generator = torch.Generator().manual_seed(32)
    raw = torch.randn(6, 12, generator=generator) + 0.5
    gain, bias = 1 + 0.3 * torch.randn(12, generator=generator), 0.3 * torch.randn(12, generator=generator)
    angles = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])  # (T, R/2), R = 8 of W = 12
    for size, hint in ((1.0, _where), (1e-3, lambda *_: "for small keys only: is eps 1e-6, not torch's default?")):
        found = answer(size * raw, gain.clone(), bias.clone(), angles.cos(), angles.sin())
        require(getattr(found, "shape", None) == (6, 12), "6 tokens with 12 numbers give keys of shape (6, 12)")
        k = F.layer_norm(size * raw, (12,), gain, bias, eps=1e-6)
        turned = Rope(angles.cos(), angles.sin()).half_split(k[None, :, None, :8])[0, :, 0]
        right = torch.cat([turned, k[:, 8:]], dim=-1)
        require(torch.allclose(found, right, atol=1e-4), f"your key differs {hint(found, right, k)}")


def _where(found: Tensor, right: Tensor, unrotated: Tensor) -> str:
    """In which step a key went wrong, as far as it can be seen."""
    if not torch.allclose(found[0], unrotated[0], atol=1e-4):
        return "at position 0 already, where nothing is turned: look at the norm, or at which part comes first"
    if not torch.allclose(found[:, 8:], right[:, 8:], atol=1e-4):
        return "in its last 4 numbers, which stay still: only the first 8 are turned"
    return "where it is turned: is each pair (i, i + R/2), and does its first number become a cos - b sin?"


EXERCISES = (
    Exercise(
        "Eq. 1 for a whole text", 1, 10,
        "Write the scores of one sequence as two `einsum`s and a mask. The order of the steps is the exercise: "
        "product, ReLU, weight, sum, mask.",
        ("The product of every query head with every key is `torch.einsum('tjw,sw->tjs', q, k)`.",
         "The ReLU belongs to the products: `.relu()` before any weight is applied. Weights may be negative.",
         "Sum over j with a second einsum, `'tj,tjs->ts'`, then fill the future with `float('-inf')`."),
        my_index_scores, (_no_relu, _relu_last, _positive_weights, _zero_future), _check_scores,
    ),
    Exercise(
        "The index key, four mistakes away", 2, 15,
        "From `wk`'s output to the finished key: LayerNorm, then rotation. The key's first R numbers are turned, R is "
        "twice the width of `cos`, and the pairs are halves: number i goes with number i + R/2. Each of the four usual "
        "mistakes gives a key of the right shape.",
        ("`F.layer_norm` subtracts the mean and adds a bias, and its eps is not the one you want by default.",
         "Split the normed key into three parts: R/2, R/2 and the remainder.",
         "A pair (a, b) turns into (a cos - b sin, b cos + a sin). Put the remainder behind, unchanged."),
        my_index_key, (_neighbours, _last_part, _default_eps, _rms), _check_key,
    ),
    *indexer_tests.EXERCISES,
)  # fmt: skip
check = checker(*EXERCISES)
