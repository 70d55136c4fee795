"""The K best of each row, exactly, without sorting: find the K-th largest number, then collect what is not below it.

Sorting 128K scores to keep 2K of them is wasteful. A *radix select* finds the K-th largest score digit by digit. Read
as whole numbers of 32 bits in the right order, scores have four digits of eight bits. One pass over the row counts how
often each first digit occurs; summing the counts from the top tells in which digit the K-th largest lies, and how
many of that digit are still wanted. The next pass looks at those only and counts their second digit, and so on.
It ends when all that share the digits found are wanted; scores being what they are, that is mostly after
three. One last pass collects, in order of position: a running count (a prefix sum) gives each chosen key its slot.

No number is moved before it is chosen, and nothing depends on which thread was first, as it would with atomic counters.
Ties obey the rule of the project: among equal scores the later key wins, so of those that tie for the last slots the
earlier ones are passed over. Memory traffic is one row per pass, about four rows in all.

A decoded token has one row, and one program would walk along all of it while the rest of the GPU waits. Few rows are
therefore cut into segments: the K best of a row are among the K best of its segments.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dsa.kernels.loops import EMPTY
from dsa.kernels.triton.launch import Kernel, Launcher, launch, length_bucket


@triton.jit
def sortable_bits(x):
    """Write fp32 as whole numbers that compare the same way: negative numbers turned over, the others above them."""
    x = tl.where(x == 0, 0.0, x)  # -0 equals 0, and a negative head weight times nothing is -0
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def top_k_kernel(scores_ptr, selected_ptr, T, S, S_bucket, K, seen_by_first, BLOCK_S: tl.constexpr):
    """One program: one row of S scores, of which query t sees the first seen_by_first + t."""
    row = tl.program_id(0).to(tl.int64)
    seen = tl.minimum(seen_by_first + tl.program_id(0) % T, S)
    scores_ptr += row * S
    digits = tl.arange(0, 256)
    prefix = tl.zeros((), tl.uint32)  # the digits of the K-th largest that are known so far
    shift, matching, wanted = (
        32,
        seen,
        K,
    )  # bits not yet known; how many scores share `prefix`; how many of these to take
    while (shift > 0) & (matching > wanted):
        shift -= 8
        counts = tl.zeros((256,), tl.int32)
        for begin in tl.range(0, seen, BLOCK_S):
            keys = begin + tl.arange(0, BLOCK_S)
            code = sortable_bits(tl.load(scores_ptr + keys, mask=keys < seen, other=0.0))
            matches = (keys < seen) & ((code >> shift) >> 8 == prefix)
            counts += tl.histogram(((code >> shift) & 255).to(tl.int32), 256, mask=matches)
        from_here_up = tl.cumsum(counts, reverse=True)  # falls from `matching` to 0
        digit = tl.sum((from_here_up >= wanted).to(tl.int32)) - 1
        matching = tl.sum(tl.where(digits == digit, counts, 0))
        wanted -= tl.sum(tl.where(digits > digit, counts, 0))
        prefix = prefix * 256 + digit.to(tl.uint32)

    passed_over, taken = 0, 0  # of those that tie; of all
    for begin in tl.range(0, seen, BLOCK_S):
        keys = begin + tl.arange(0, BLOCK_S)
        score = tl.load(scores_ptr + keys, mask=keys < seen, other=float("-inf"))
        leading = sortable_bits(score).to(tl.uint64) >> shift
        tied = ((keys < seen) & (leading == prefix)).to(tl.int32)
        late_enough = passed_over + tl.cumsum(tied) > matching - wanted
        chosen = ((leading > prefix) | ((tied != 0) & late_enough)) & (score > float("-inf"))
        slot = taken + tl.cumsum(chosen.to(tl.int32)) - 1
        tl.store(selected_ptr + row * K + slot, keys.to(tl.int64), mask=chosen)
        passed_over += tl.sum(tied)
        taken += tl.sum(chosen.to(tl.int32))


def tile_config(keys: int, warps: int, stages: int = 3) -> triton.Config:
    """One configuration for the tuner."""
    return triton.Config({"BLOCK_S": keys}, num_warps=warps, num_stages=stages)


TOP_K = Kernel(
    top_k_kernel,
    [tile_config(4096, 8), tile_config(2048, 4), tile_config(8192, 16), tile_config(2048, 8), tile_config(1024, 4)],
    key=("S_bucket", "K"),
)


def top_k(scores: Tensor, k: int, seen_by_first: int | None = None, launcher: Launcher = launch) -> Tensor:
    """Choose the k best of each row.

    Args:
        scores: (B, T, S), any floating type; -inf is never chosen.
        k: how many, K.
        seen_by_first: how many keys the first query sees, each later one sees one more; what lies beyond is not even
            read. None: all queries see all keys.

    Returns:
        Positions (B, T, min(K, S)) in rising order, then -1 in the slots left over.
    """
    B, T, S = scores.shape
    seen = S if seen_by_first is None else seen_by_first
    parts = num_segments(B * T, S, k) if seen >= S else 1
    return whole_rows(scores, k, seen, launcher) if parts == 1 else in_segments(scores, k, parts, launcher)


def whole_rows(scores: Tensor, k: int, seen_by_first: int, launcher: Launcher = launch) -> Tensor:
    """Choose with one program a row."""
    B, T, S = scores.shape
    K = min(k, S)
    selected = torch.full((B, T, K), EMPTY, device=scores.device)
    launcher(
        TOP_K, lambda tile: (B * T,), scores_ptr=scores.float().contiguous(), selected_ptr=selected,
        T=T, S=S, S_bucket=length_bucket(S), K=K, seen_by_first=seen_by_first,
    )  # fmt: skip
    return selected


def in_segments(scores: Tensor, k: int, segments: int, launcher: Launcher = launch) -> Tensor:
    """Choose the k best of each segment, and of these the k best; candidates stay in order, so ties obey the rule.

    Segments are whole multiples of 16 long, however the text grows: other lengths would be compiled anew.
    """
    T, S = scores.shape[1:]
    rows = F.pad(scores, (0, -S % (16 * segments)), value=-torch.inf)
    parts = rows.unflatten(-1, (segments, -1)).flatten(1, 2)  # (B, T * G, S / G)
    best = whole_rows(parts, k, parts.shape[-1], launcher).unflatten(1, (T, segments))  # (B, T, G, K)
    first = torch.arange(0, rows.shape[-1], parts.shape[-1], device=scores.device)
    indices = torch.where(best == EMPTY, EMPTY, best + first[:, None]).flatten(2)  # (B, T, G * K)
    candidates = rows.gather(-1, indices.clamp(min=0)).masked_fill(indices == EMPTY, -torch.inf)
    chosen = whole_rows(candidates, k, candidates.shape[-1], launcher)
    return torch.where(chosen == EMPTY, EMPTY, indices.gather(-1, chosen.clamp(min=0)))


def num_segments(rows: int, keys: int, k: int, programs: int = 264) -> int:
    """How many segments give a GPU of 132 SMs two programs each, with at least 4 k keys a segment: 2^n."""
    most = min(programs // max(1, rows), keys // (4 * k))
    return 1 << max(0, most.bit_length() - 1)
