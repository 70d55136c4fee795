"""The hardest exercise of chapter 04: an exact top-k that never searches all the scores.

Its checker watches how the answer is found, because the forbidden way, one search over everything, gives the right
numbers too.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from course.exercises.exercise import Exercise, require


def my_two_level_topk(scores: Tensor, top_k: int, groups: int) -> Tensor:
    """Where the best of S scores are, exactly: (S,) -> (top_k,).

    No top-k over all S is allowed. Group g holds the scores g,
    g + groups, g + 2 * groups ...; top_k <= groups, which divides S.
    """
    table = scores.view(-1, groups)  # (S / groups, groups)
    best = table.amax(0).topk(top_k).indices  # groups of largest maxima
    candidates = table[:, best].flatten()  # hold all top_k best scores
    rows = torch.arange(len(table))[:, None]
    places = (rows * groups + best).flatten()
    return places[candidates.topk(top_k).indices]


def _one_a_group(scores: Tensor, top_k: int, groups: int) -> Tensor:
    """Takes the best of each group only: two of the best may share one."""
    table = scores.view(-1, groups)
    best = table.amax(0).topk(top_k).indices
    return table.argmax(0)[best] * groups + best


def _too_few_groups(scores: Tensor, top_k: int, groups: int) -> Tensor:
    """Keeps half as many groups: enough on most days."""
    table = scores.view(-1, groups)
    best = table.amax(0).topk((top_k + 1) // 2).indices
    places = (torch.arange(len(table))[:, None] * groups + best).flatten()
    return places[table[:, best].flatten().topk(min(top_k, len(places))).indices]


def _by_sum(scores: Tensor, top_k: int, groups: int) -> Tensor:
    """Ranks groups by their sum: one great score among poor ones is lost."""
    table = scores.view(-1, groups)
    best = table.sum(0).topk(top_k).indices
    places = (torch.arange(len(table))[:, None] * groups + best).flatten()
    return places[table[:, best].flatten().topk(top_k).indices]


def _forgets_the_group(scores: Tensor, top_k: int, groups: int) -> Tensor:
    """Returns places among the candidates instead of places among the scores."""
    table = scores.view(-1, groups)
    return table[:, table.amax(0).topk(top_k).indices].flatten().topk(top_k).indices


def _searches_all(scores: Tensor, top_k: int, groups: int) -> Tensor:
    """Searches all scores at once: exact, and what was to be avoided."""
    return scores.topk(top_k).indices


def _sorts_all(scores: Tensor, top_k: int, groups: int) -> Tensor:
    """Sorts all scores, which is dearer still."""
    return scores.argsort(descending=True)[:top_k]


class _Widths(TorchDispatchMode):
    """Notes how many scores each search or sort of a call looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.widest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, and note its width if it is a search."""
        if func.overloadpacket.__name__ in ("topk", "sort", "argsort", "kthvalue"):
            self.widest = max(self.widest, args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def _check_two_level(answer) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(96, generator=generator)
        if seed % 2:
            scores[5::12] += 4  # many of the best in one group
        with _Widths() as searched:
            found = answer(scores.clone(), 6, 12)
        require(getattr(found, "shape", None) == (6,), "return 6 indices: a tensor of shape (6,)")
        mine, right = {*found.tolist()}, {*scores.topk(6).indices.tolist()}
        require(mine == right, f"of the best 6 of 96 you found {len(mine & right)} (seed {seed})")
        require(searched.widest < 96, "right, but it searches or sorts all 96 scores at once: search the groups first")


TWO_LEVELS = Exercise(
    "An exact top-k in two levels", 3, 30,
    "At 128K tokens the top-k itself begins to cost. Cut the scores into groups. If a score is among the K best, "
    "fewer than K scores beat it, so fewer than K groups have a larger maximum: **its group is among the K with "
    "the largest maxima**. Use that to search K groups only, and stay exact (any grouping is accepted). At "
    "S = 131,072 with K = 2,048 and 16,384 groups, two searches over 16,384 take the place of one over 131,072.",
    ("`scores.view(-1, groups)` puts group g into column g.",
     "The K columns with the largest maxima hold all of the K best scores, perhaps several in one column.",
     "Remember where the candidates came from: entry (r, c) of the table is score number r * groups + c."),
    my_two_level_topk, (_one_a_group, _too_few_groups, _by_sum, _forgets_the_group, _searches_all, _sorts_all),
    _check_two_level,
)  # fmt: skip
