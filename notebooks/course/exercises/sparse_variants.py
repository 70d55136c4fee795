"""The exercises of chapter 12: a block's summary, whole blocks in order, one step of the delta rule, and a fair bill.

The wrong answers run. Each is a slip that real code of these designs invites: a summary that sees the future, a block
chosen twice, a memory that adds where it should correct, a bill without the proxy.
"""

import torch
from torch import Tensor

from course.exercises.exercise import Exercise, checker, require
from course.experiments.attention_variants import blocks, delta
from dsa.kernels import ops


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _near(found: Tensor, right: Tensor, what: str) -> None:
    """Refuse a tensor of another shape, or one that is off."""
    require(isinstance(found, Tensor), f"return a tensor, not a {type(found).__name__}")
    require(found.shape == right.shape, f"{what} has shape {tuple(right.shape)}, yours {tuple(found.shape)}")
    gap = float((found.float() - right).abs().nan_to_num(float("inf")).max())
    require(gap < 1e-4, f"{what} is off by up to {gap:.2f}")


def my_bound(q: Tensor, keys: Tensor, size: int) -> Tensor:
    """The most that any key of a block could score.

    q (W,), keys (S, W) -> (S / size,). Only the least and the greatest
    value of each component in a block may be used. S is a multiple of
    size.
    """
    cut = keys.unflatten(0, (-1, size))  # (N, Z, W)
    least, greatest = cut.amin(1), cut.amax(1)
    return torch.maximum(q * least, q * greatest).sum(-1)


def _mean(q: Tensor, keys: Tensor, size: int) -> Tensor:
    """Compares with the mean key, which is no bound."""
    return keys.unflatten(0, (-1, size)).mean(1) @ q


def _greatest_only(q: Tensor, keys: Tensor, size: int) -> Tensor:
    """Forgets that a negative component of q wants the least value."""
    return keys.unflatten(0, (-1, size)).amax(1) @ q


def _best_key(q: Tensor, keys: Tensor, size: int) -> Tensor:
    """Scores every key: exact, and as dear as attention itself."""
    return (keys @ q).unflatten(0, (-1, size)).amax(1)


def _check_bound(answer) -> None:
    for size, seed in ((4, 1), (2, 2), (8, 3)):
        q, keys = _random(6, seed=seed), _random(24, 6, seed=seed + 10)
        found, best = answer(q.clone(), keys.clone(), size), _best_key(q, keys, size)
        right = my_bound(q, keys, size)
        require(isinstance(found, Tensor) and found.shape == right.shape, f"return {24 // size} numbers, one a block")
        require(bool((found >= best - 1e-5).all()), "a key of some block scores more than your number for its block")
        exact = torch.allclose(found, best, atol=1e-5)
        require(not exact, "your number is the best key's own score: it needs all keys, not two vectors a block")
        _near(found, right, "the bound")


def my_blocks(scores: Tensor, t: int, size: int, count: int) -> list[int]:
    """The blocks that the query at position t reads, in rising order.

    scores (N,), one for each block. Its own block always, and the
    count - 1 best of those that end before its own begins (fewer, if
    there are fewer).
    """
    own = t // size
    best = scores[:own].topk(min(count - 1, own)).indices.tolist()
    return sorted([*best, own])


def _sees_the_future(scores: Tensor, t: int, size: int, count: int) -> list[int]:
    """Lets blocks compete that have not begun."""
    best = [n for n in scores.argsort(descending=True).tolist() if n != t // size]
    return sorted([*best[: count - 1], t // size])


def _own_may_lose(scores: Tensor, t: int, size: int, count: int) -> list[int]:
    """Lets the own block compete, with a summary that contains tokens after t."""
    own = t // size
    return sorted(scores[: own + 1].topk(min(count, own + 1)).indices.tolist())


def _one_too_many(scores: Tensor, t: int, size: int, count: int) -> list[int]:
    """Takes count blocks and its own besides."""
    own = t // size
    return sorted([*scores[:own].topk(min(count, own)).indices.tolist(), own])


def _counts_from_one(scores: Tensor, t: int, size: int, count: int) -> list[int]:
    """Takes the last token of a block for the first of the next."""
    own = (t + 1) // size
    return sorted([*scores[:own].topk(min(count - 1, own)).indices.tolist(), own])


def _check_blocks(answer) -> None:
    scores = _random(6, seed=4)
    for t in (0, 3, 4, 11, 17, 23):
        found = answer(scores.clone(), t, 4, 3)
        require(isinstance(found, list), f"return a list of block numbers, not a {type(found).__name__}")
        require(t // 4 in found, f"the query at {t} is in block {t // 4}, which it must read; yours reads {found}")
        require(max(found) <= t // 4, f"block {max(found)} begins after position {t}")
        require(len(found) <= 3, f"with count = 3 it reads at most 3 blocks, its own included; yours {len(found)}")
        places = blocks.best(scores.expand(1, 24, -1), 3, 24, 4)[0, t]
        right = sorted(n for n in places.tolist() if n != ops.EMPTY)
        require(found == right, f"at position {t} it should read {right}, yours reads {found}")


def my_step(M: Tensor, k: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """One step of the gated delta rule: gives the new memory.

    M (W, V), k (W,) of length one, v (V,). First a multiplies what is
    there; then a share b of the difference between v and what M now
    holds for k is written.
    """
    M = a * M
    held = k @ M
    return M + b * torch.outer(k, v - held)


def _adds(M: Tensor, k: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """Adds v without looking: plain linear attention, which mixes old and new values of a key."""
    return a * M + b * torch.outer(k, v)


def _asks_before_fading(M: Tensor, k: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """Corrects what the memory held before it faded."""
    return a * M + b * torch.outer(k, v - k @ M)


def _fades_the_new(M: Tensor, k: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """Fades at the end, and the new value with the rest."""
    return a * (M + b * torch.outer(k, v - k @ M))


def _transposed(M: Tensor, k: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """Writes the outer product the wrong way round."""
    M = a * M
    return M + b * torch.outer(v - k @ M, k)


def _check_step(answer) -> None:
    W, V, T = 5, 5, 6
    q, k, v = (_random(1, T, 1, width, seed=seed) for seed, width in enumerate((W, W, V)))
    k = torch.nn.functional.normalize(k, dim=-1)
    fade, write = torch.linspace(0.4, 1, T), torch.linspace(1, 0.3, T)
    right = delta.recurrent(q, k, v, fade.log()[None, :, None], write[None, :, None])
    memory = torch.zeros(W, V)
    for t in range(T):
        memory = answer(memory, k[0, t, 0], v[0, t, 0], float(fade[t]), float(write[t]))
        require(isinstance(memory, Tensor) and memory.shape == (W, V), "the new memory has the shape of the old")
        _near(q[0, t, 0] @ memory, right[0, t, 0], f"what the memory gives after step {t + 1}")


def my_meeting(key: int, block: int, size: int, fixed: int) -> float:
    """From how many visible keys on do blocks cost less than tokens?

    Both attend alike. Scoring tokens costs `key` for each; scoring
    blocks costs `block` for each `size` keys, and `fixed` besides.
    Do not round. Return infinity if blocks never cost less.
    """
    saved = key - block / size
    return fixed / saved if saved > 0 else float("inf")


def _per_key(key: int, block: int, size: int, fixed: int) -> float:
    """Forgets that there are fewer blocks than keys."""
    saved = key - block
    return fixed / saved if saved > 0 else float("inf")


def _free_proxy(key: int, block: int, size: int, fixed: int) -> float:
    """Takes the blocks' scores for free."""
    return fixed / key


def _negative(key: int, block: int, size: int, fixed: int) -> float:
    """Gives a negative number of keys where blocks never win."""
    return fixed / (key - block / size)


def _check_meeting(answer) -> None:
    for index_pair, block_pair, size, fixed in ((100, 400, 8, 5000), (16384, 147456, 128, 10**6), (10, 800, 8, 90)):
        found = answer(index_pair, block_pair, size, fixed)
        right = my_meeting(index_pair, block_pair, size, fixed)
        given = f"with {index_pair} a key, {block_pair} a block of {size} and {fixed} besides"
        require(isinstance(found, int | float), f"return a number, not a {type(found).__name__}")
        same = found == right or abs(found - right) < 1e-6 * abs(right)
        require(same, f"{given} they meet at {right:.1f} keys; yours says {found:.1f}")


EXERCISES = (
    Exercise(
        title="A bound that holds",
        difficulty=1,
        minutes=8,
        task=(
            "Quest keeps two vectors of each block: the least and the greatest value of every component. Write the"
            " score it gives a block: the largest product that any key between the two could have with the query."
        ),
        hints=(
            "Each component of the key may be chosen on its own, anywhere between least and greatest.",
            "Where q is positive the greatest value is best, where it is negative the least.",
            "`torch.maximum(q * least, q * greatest)` does both; then add up the components.",
        ),
        solution=my_bound,
        wrong=(_mean, _greatest_only, _best_key),
        check=_check_bound,
    ),
    Exercise(
        title="Whole blocks, no future",
        difficulty=2,
        minutes=10,
        task=(
            "Choose the blocks of one query. The block it is in cannot compete, because a summary of it would contain"
            " tokens that come after the query; so it is always read, and the others compete for the rest."
        ),
        hints=(
            "Which block is position t in? Which blocks end before that one begins?",
            "`scores[:own]` are those that may compete; there may be fewer than count - 1 of them.",
            "`topk(min(count - 1, own))`, add `own`, sort.",
        ),
        solution=my_blocks,
        wrong=(_sees_the_future, _own_may_lose, _one_too_many, _counts_from_one),
        check=_check_blocks,
    ),
    Exercise(
        title="One step of the delta rule",
        difficulty=2,
        minutes=10,
        task="Write what one token does to the memory of a Gated DeltaNet head: fade, ask, correct.",
        hints=(
            "Three lines, in this order: fade the memory, read what it holds for k, add the correction.",
            "What the memory holds for k is `k @ M`, a vector of V numbers.",
            "The correction is `b * torch.outer(k, v - held)`.",
        ),
        solution=my_step,
        wrong=(_adds, _asks_before_fading, _fades_the_new, _transposed),
        check=_check_step,
    ),
    Exercise(
        title="A fair bill",
        difficulty=2,
        minutes=8,
        task=(
            "Someone proposes blocks with an expensive summary: a fixed cost for each new token, and a dear comparison"
            " with each block. From how many visible keys on is it cheaper than scoring every token?"
        ),
        hints=(
            "Write both bills for S keys: key * S, and fixed + block * S / size.",
            "Set them equal and solve for S.",
            "If a block costs more than the keys in it, there is no such S: return infinity.",
        ),
        solution=my_meeting,
        wrong=(_per_key, _free_proxy, _negative),
        check=_check_meeting,
    ),
)
check = checker(*EXERCISES)
