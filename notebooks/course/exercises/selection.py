"""The exercises of chapter 04: choose tokens, count what is kept, and attend to nothing else.

Each wrong answer is one that somebody has really written, in this project or in code that was published.
"""

import torch
from torch import Tensor

from course.exercises.exercise import Exercise, checker, require
from course.exercises.flop_counter import count_flops
from course.exercises.two_level_topk import TWO_LEVELS
from dsa.kernels import loops, reference


def sets(selected: Tensor) -> list[set[int]]:
    """The selections of one sequence as sets, empty slots left out: (T, K) -> T sets."""
    return [{int(s) for s in row if s >= 0} for row in selected]


def my_select(scores: Tensor, top_k: int) -> Tensor:
    """Scores (T, T) -> selected (T, top_k): the best visible keys, or -1.

    Row t may choose among the keys 0 ... t only. top_k is at most T.
    """
    T = len(scores)
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    masked = scores.masked_fill(~visible, float("-inf"))
    values, indices = masked.topk(top_k, dim=-1)
    return indices.masked_fill(values == float("-inf"), -1)


def _mask_after(scores: Tensor, top_k: int) -> Tensor:
    """Chooses first and masks afterwards: keys from the future take up slots."""
    indices = scores.topk(top_k, dim=-1).indices
    return indices.masked_fill(indices > torch.arange(len(scores))[:, None], -1)


def _mask_with_zero(scores: Tensor, top_k: int) -> Tensor:
    """Masks with 0: a visible key with a negative score loses against the future."""
    indices = (scores * torch.ones_like(scores).tril()).topk(top_k, dim=-1).indices
    return indices.masked_fill(indices > torch.arange(len(scores))[:, None], -1)


def _keeps_fillers(scores: Tensor, top_k: int) -> Tensor:
    """Leaves the fillers of short rows in: they are indices of the future."""
    masked = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
    return masked.topk(top_k, dim=-1).indices


def _forgets_itself(scores: Tensor, top_k: int) -> Tensor:
    """Hides the diagonal too: a token may see itself."""
    masked = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(-1), float("-inf"))
    values, indices = masked.topk(top_k, dim=-1)
    return indices.masked_fill(values == float("-inf"), -1)


def _check_select(answer) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(12, 12, generator=generator) - 1  # mostly negative, as real index scores may be
    found = answer(scores.clone(), 4)
    require(isinstance(found, Tensor), f"return a tensor, not a {type(found).__name__}")
    require(found.shape == (12, 4), f"12 queries that keep 4 give shape (12, 4), yours is {tuple(found.shape)}")
    late = [t for t, row in enumerate(sets(found)) if any(s > t for s in row)]
    require(not late, f"query {late[:1]} chose a key of its own future")
    for t, (mine, right) in enumerate(zip(sets(found), sets(loops.select(_causal(scores), 4)[0]), strict=True)):
        require(mine == right, f"query {t} chose {sorted(mine)}, and its best visible keys are {sorted(right)}")


def _causal(scores: Tensor) -> Tensor:
    visible = reference.causal_mask(len(scores), len(scores))
    return scores.masked_fill(~visible, float("-inf"))[None]


def my_attention_recall(probs: Tensor, selected: Tensor) -> Tensor:
    """What each query keeps: probs (T, T), selected (T, K) -> shares (T,).

    Rows of probs sum to 1. An empty slot (-1) keeps nothing.
    """
    found = probs.gather(-1, selected.clamp(min=0))
    return found.masked_fill(selected < 0, 0).sum(-1)


def _empty_is_first(probs: Tensor, selected: Tensor) -> Tensor:
    """Counts an empty slot as key 0."""
    return probs.gather(-1, selected.clamp(min=0)).sum(-1)


def _empty_is_last(probs: Tensor, selected: Tensor) -> Tensor:
    """Lets -1 index from the end, as Python does."""
    rows = torch.arange(len(probs))[:, None]
    return probs[rows, selected].sum(-1)


def _members(probs: Tensor, selected: Tensor) -> Tensor:
    """Marks the members in a matrix, and key 0 with them wherever a slot is empty."""
    member = torch.zeros_like(probs).scatter(-1, selected.clamp(min=0), 1.0)
    return (probs * member).sum(-1)


def _mean_over_slots(probs: Tensor, selected: Tensor) -> Tensor:
    """Averages over the slots where it should add."""
    return probs.gather(-1, selected.clamp(min=0)).masked_fill(selected < 0, 0).mean(-1)


def _check_recall(answer) -> None:
    generator = torch.Generator().manual_seed(5)
    probs = (
        torch.randn(8, 8, generator=generator)
        .tril()
        .masked_fill(~reference.causal_mask(8, 8), float("-inf"))
        .softmax(-1)
    )
    selected = reference.select(_causal(torch.randn(8, 8, generator=generator)), 3)[0]
    gaps = torch.tensor([[0, -1], [1, -1], [2, -1], [1, -1]])  # slots may be empty in late rows too
    late = torch.tensor([[1.0, 0, 0, 0], [0.4, 0.6, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.2, 0.3, 0.4]])
    found = answer(probs.clone(), selected.clone())
    require(getattr(found, "shape", None) == (8,), "8 queries give 8 shares: return a tensor of shape (8,)")
    require(
        abs(float(found[0]) - 1) < 1e-5,
        f"the first query sees itself only and keeps all, yours says {float(found[0]):.2f}",
    )
    for t, row in enumerate(selected):
        right = sum(float(probs[t, s]) for s in row if s >= 0)
        require(abs(float(found[t]) - right) < 1e-5, f"query {t} keeps {right:.3f}, yours says {float(found[t]):.3f}")
    kept = [round(float(share), 4) for share in answer(late, gaps)]
    right_late = [1.0, 0.6, 0.5, 0.2]
    require(kept == right_late, f"with one key each and an empty slot the rows keep {right_late}, yours says {kept}")


def my_sparse_attention(q, kv, chosen, scale) -> Tensor:
    """Attention of one query over its chosen keys, and no others.

    q (H, C); kv (S, C), key and value at once; chosen (K,) -> (H, C).
    Slots of `chosen` that hold -1 are empty.
    """
    rows = kv[chosen[chosen >= 0]]  # gathered: S plays no part any more
    weights = (scale * q @ rows.T).softmax(-1)
    return weights @ rows


def _softmax_over_all(q: Tensor, kv: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Takes the softmax over all keys and then drops some: the weights no longer sum to 1."""
    weights = (scale * q @ kv.T).softmax(-1)
    real = chosen[chosen >= 0]
    return weights[:, real] @ kv[real]


def _attends_to_empty(q: Tensor, kv: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Reads an empty slot as the last key."""
    rows = kv[chosen]
    return (scale * q @ rows.T).softmax(-1) @ rows


def _without_scale(q: Tensor, kv: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Forgets the scale."""
    rows = kv[chosen[chosen >= 0]]
    return (q @ rows.T).softmax(-1) @ rows


def _masked_dense(q: Tensor, kv: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Scores every key and masks the rest away: the right numbers, and all the work."""
    mask = torch.zeros(len(kv), dtype=torch.bool)
    mask[chosen[chosen >= 0]] = True
    return (scale * q @ kv.T).masked_fill(~mask, float("-inf")).softmax(-1) @ kv


def _mended(q: Tensor, kv: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Reads every key, and sweeps the poison away."""
    return _masked_dense(q, kv.nan_to_num(), chosen, scale)


def _check_sparse(answer) -> None:
    generator = torch.Generator().manual_seed(6)
    q, kv = torch.randn(3, 16, generator=generator), torch.randn(40, 16, generator=generator)
    chosen = torch.tensor([7, 0, 31, 22, -1, -1])
    found = answer(q.clone(), kv.clone(), chosen.clone(), 0.3)
    require(getattr(found, "shape", None) == (3, 16), "3 heads of width 16 give shape (3, 16)")
    right = loops.sparse_attention(q[None, None], kv[None], chosen[None, None], 0.3, 16)[0, 0]
    gap = float((found - right).abs().max())
    require(gap < 1e-5, f"it differs from attention over the keys 7, 0, 31 and 22 by up to {gap:.2f}")
    poisoned = torch.full_like(kv, float("nan"))
    poisoned[chosen[:4]] = kv[chosen[:4]]
    again, flop = count_flops(lambda: answer(q.clone(), poisoned, chosen.clone(), 0.3))
    require(not again.isnan().any(), "the numbers are right, but it reads keys that were not chosen: gather first")
    enough = 2 * 2 * 3 * 16 * len(chosen) + 400  # scores and values, empty slots too; and what a scale may take
    require(flop <= enough, f"the numbers are right, but they take {flop:,} FLOP where {enough:,} are enough")


EXERCISES = (
    Exercise(
        "Causal top-k with empty slots", 1, 10,
        "Write the selection for one sequence. It is five lines, and each of them is easy to get wrong: *when* the "
        "future is masked, *with what*, and what a row does that sees too few keys. The scores have no ties to break.",
        ("Mask first, choose second: a masked key must not take up a slot.",
         "Scores may be negative, so what is masked needs `float('-inf')`, which loses against everything.",
         "`topk` always returns `top_k` indices, and the values too: a value tells whether its slot is filled."),
        my_select, (_mask_after, _mask_with_zero, _keeps_fillers, _forgets_itself), _check_select,
    ),
    Exercise(
        "What a selection keeps", 1, 10,
        "Given where the attention *wants* to go and what was chosen, add up what is kept. The trap is the -1.",
        ("`probs.gather(-1, index)` picks from each row the entries that `index` names.",
         "`gather` refuses negative indices: `clamp` them first and repair the damage afterwards.",
         "Set what the empty slots picked to 0, then sum over the slots."),
        my_attention_recall, (_empty_is_first, _empty_is_last, _members, _mean_over_slots), _check_recall,
    ),
    Exercise(
        "Attend to what was chosen, and to nothing else", 2, 15,
        "One query, H heads, K chosen keys out of S. The checker compares your numbers with the loops of "
        "`dsa.kernels.loops`, and then poisons every key that was *not* chosen: whoever reads those notices. "
        "Multiplications are counted as well.",
        ("Leave the empty slots out before you index: `chosen[chosen >= 0]`.",
         "Gather the chosen rows of `kv` first. All that follows is ordinary attention over these rows.",
         "The softmax runs over the gathered scores only, and the rows are keys and values at once."),
        my_sparse_attention, (_softmax_over_all, _attends_to_empty, _without_scale, _masked_dense, _mended),
        _check_sparse,
    ),
    TWO_LEVELS,
)  # fmt: skip
check = checker(*EXERCISES)
