"""The K largest of a long row, exactly, while looking closely at few of its elements.

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
from dsa.kernels.reference import topk_latest_on_ties

GROUP = 8
GROUPS_PER_K = 4  # a row with so many groups for each of the K is worth grouping,
MIN_ELEMENTS = 2**15  # if there are so many elements in all


def grouped_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k largest of each row: x (n, S), k <= S.

    Returns:
        indices (n, k) in any order, the threshold, which is the least of the values there (n, 1), and whether an equal
        of it was left out (n,).
    """
    n, S = x.shape
    if GROUPS_PER_K * GROUP * k > S or x.numel() < MIN_ELEMENTS:
        values, indices = x.topk(k, dim=-1, sorted=False)
        threshold = values.amin(-1, keepdim=True)
        return indices, threshold, (x >= threshold).sum(-1) > k
    groups = S // GROUP
    members = x[:, : groups * GROUP].unflatten(1, (GROUP, groups))  # group g holds g, g + groups, ...
    best_groups, group_threshold, group_tie_cut = grouped_topk(members.amax(1), k)  # (n, k)
    candidates = best_groups[:, None] + groups * torch.arange(GROUP, device=x.device)[:, None]  # (n, GROUP, k)
    rest = torch.arange(groups * GROUP, S, device=x.device).expand(n, -1)  # the few columns that fill no group
    candidates = torch.cat([candidates.flatten(1), rest], dim=1)
    best, threshold, tie_cut = grouped_topk(x.gather(1, candidates), k)
    # a group that was left out for a tie matters only if its maximum ties with the last key chosen, too
    return candidates.gather(1, best), threshold, tie_cut | (group_tie_cut & (group_threshold == threshold)[:, 0])


def select_one(scores: Tensor, top_k: int) -> Tensor:
    """Choose for one query a sequence, all of whose keys are visible: (B, S) -> (B, 1, min(K, S))."""
    k = min(top_k, scores.shape[1])
    values, places = scores.topk(k, dim=-1, sorted=False)
    if (scores >= values.amin(-1, keepdim=True)).sum().item() > values.numel():  # a tie is cut through
        places = topk_latest_on_ties(scores, k)
    return places[:, None]


def select_rows(scores: Tensor, top_k: int) -> Tensor:
    """Choose the `top_k` best visible keys of each row: (n, S) -> (n, min(K, S)); see `loops.select`."""
    k = min(top_k, scores.shape[1])
    indices, threshold, tie_cut = grouped_topk(scores, k)
    full = threshold[:, 0] > float("-inf")  # rows with at least k visible keys
    if (redo := tie_cut & full).any():
        indices[redo] = topk_latest_on_ties(scores[redo], k)
    if full.all():
        return indices
    return indices.masked_fill(scores.gather(1, indices) == float("-inf"), EMPTY)
