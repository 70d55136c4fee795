"""The K largest of a long row, exactly, while looking closely at few of its numbers.

Cut a row into groups of 8. The K groups whose largest members are largest contain the K largest numbers: if one of
those stood in another group, K members of the chosen groups would be at least as large, and it could be left out. So
one pass finds the groups' maxima, `topk` runs on an eighth of the row, and again on the 8 K candidates; groups are
grouped again while that pays. Groups are strided, so that the pass runs over whole cache lines.

Equal numbers need care, for among equals the later key has to win (`loops.select`). Where one equal to the least
chosen was left out is known afterwards without another pass, and such rows, which are rare, are chosen again by rule.
"""

import torch
from torch import Tensor

from dsa.kernels.loops import EMPTY
from dsa.kernels.reference import most_recent_of_equals

GROUP = 8
LONG = 4  # a row with so many groups for each of the K is worth grouping,
LARGE = 2**15  # if there are so many numbers in all


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k largest of each row: x (n, S), k <= S.

    Returns:
        places (n, k) in any order, the least of the values there (n, 1), and whether an equal of it was left out (n,).
    """
    if x.shape[1] < LONG * GROUP * k or x.numel() < LARGE:
        values, places = x.topk(k, dim=-1, sorted=False)
        least = values.amin(-1, keepdim=True)
        return places, least, (x >= least).sum(-1) > k
    candidates, group_least, group_left_out = _candidates(x, k)
    found, least, left_out = largest(x.gather(1, candidates), k)
    return candidates.gather(1, found), least, left_out | (group_left_out & (group_least == least)[:, 0])


def _candidates(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """All members of the k best groups, and the few columns that fill no group: places (n, GROUP * k + rest)."""
    n, S = x.shape
    groups = S // GROUP
    rest = torch.arange(groups * GROUP, S, device=x.device)
    members = x[:, : groups * GROUP].unflatten(1, (GROUP, groups))  # group g holds g, g + groups, ...
    best, least, left_out = largest(members.amax(1), k)  # (n, k)
    places = best[:, None] + groups * torch.arange(GROUP, device=x.device)[:, None]  # (n, GROUP, k)
    return torch.cat([places.flatten(1), rest.expand(n, -1)], dim=1), least, left_out


def select_one(scores: Tensor, top_k: int) -> Tensor:
    """Choose for one query a sequence, all of whose keys are visible: (B, S) -> (B, 1, min(K, S))."""
    k = min(top_k, scores.shape[1])
    values, places = scores.topk(k, dim=-1, sorted=False)
    if (scores >= values.amin(-1, keepdim=True)).sum().item() > values.numel():  # a tie is cut through
        places = most_recent_of_equals(scores, k)
    return places[:, None]


def select_rows(scores: Tensor, top_k: int) -> Tensor:
    """Choose the `top_k` best visible keys of each row: (n, S) -> (n, min(K, S)); see `loops.select`."""
    k = min(top_k, scores.shape[1])
    places, least, left_out = largest(scores, k)
    full = least[:, 0] > float("-inf")  # rows with at least k visible keys
    if (cut_tie := left_out & full).any():
        places[cut_tie] = most_recent_of_equals(scores[cut_tie], k)
    if full.all():
        return places
    return places.masked_fill(scores.gather(1, places) == float("-inf"), EMPTY)
