"""The exercises of chapter 08: puzzles whose answer must be right, and must not read memory more often than it needs.

A checker gives the answer a `Memory` and looks at its counter afterwards. So a right answer can be refused: for the
traffic it made.
"""

import numpy as np

from course.exercises.exercise import Exercise, checker, require
from course.figures.traffic import Memory


def _memory(seed: int, size: int, width: int = 3, large: bool = False) -> Memory:
    random = np.random.default_rng(seed)
    logits = random.normal(size=size) * 3 + (1000 if large else 0)
    return Memory({"logits": np.sort(logits), "values": random.normal(size=(size, width))})


def _close(found, expected) -> bool:
    return np.shape(found) == np.shape(expected) and bool(np.allclose(found, expected, rtol=1e-9, atol=1e-9))


def my_attention(memory: Memory, tile: int) -> np.ndarray:
    """The softmax of "logits" (S,), times "values" (S, C): -> (C,).

    Each number is read once, at most `tile` rows at a time.
    """
    largest, total, out = -np.inf, 0.0, np.zeros(1)
    for begin in range(0, memory.size("logits"), tile):
        rows = slice(begin, begin + tile)
        logits = memory.read("logits", rows)
        values = memory.read("values", rows)
        larger = max(largest, logits.max())
        shrink = np.exp(largest - larger)
        weights = np.exp(logits - larger)
        total = total * shrink + weights.sum()
        out = out * shrink + weights @ values
        largest = larger
    return out / total


def _in_three_passes(memory: Memory, tile: int):
    """Reads the logits three times: for the largest, for the sum, for the answer."""
    starts = [slice(b, b + tile) for b in range(0, memory.size("logits"), tile)]
    largest = max(memory.read("logits", rows).max() for rows in starts)
    total = sum(np.exp(memory.read("logits", rows) - largest).sum() for rows in starts)
    parts = [np.exp(memory.read("logits", rows) - largest) @ memory.read("values", rows) for rows in starts]
    return sum(parts) / total


def _all_at_once(memory: Memory, tile: int) -> np.ndarray:
    """Fetches everything in one read: right, and too large for any chip once S is."""
    logits, values = memory.read("logits", slice(None)), memory.read("values", slice(None))
    weights = np.exp(logits - logits.max())
    return weights @ values / weights.sum()


def _keeps_every_tile(memory: Memory, tile: int) -> np.ndarray:
    """Fetches tile by tile and keeps them all until the end: as much room as one read of everything."""
    starts = [slice(b, b + tile) for b in range(0, memory.size("logits"), tile)]
    logits, values = ([memory.read(name, rows) for rows in starts] for name in ("logits", "values"))
    weights = np.exp(np.concatenate(logits) - max(one.max() for one in logits))
    return weights @ np.concatenate(values) / weights.sum()


def _without_maximum(memory: Memory, tile: int) -> np.ndarray:
    """Takes powers of the logits as they are: they overflow."""
    total, out = 0.0, np.zeros(1)
    for begin in range(0, memory.size("logits"), tile):
        rows = slice(begin, begin + tile)
        with np.errstate(over="ignore", invalid="ignore"):
            weights = np.exp(memory.read("logits", rows))
            total, out = total + weights.sum(), out + weights @ memory.read("values", rows)
    with np.errstate(invalid="ignore"):
        return out / total


def _without_shrinking(memory: Memory, tile: int) -> np.ndarray:
    """Does not rescale the earlier sums when a larger logit turns up."""
    largest, total, out = -np.inf, 0.0, np.zeros(1)
    for begin in range(0, memory.size("logits"), tile):
        rows = slice(begin, begin + tile)
        logits = memory.read("logits", rows)
        largest = max(largest, logits.max())
        weights = np.exp(logits - largest)
        total, out = total + weights.sum(), out + weights @ memory.read("values", rows)
    return out / total


def _check_attention(answer) -> None:
    for seed, size, tile, large in ((0, 12, 4, False), (1, 13, 5, False), (2, 8, 4, True)):
        memory, whole = _memory(seed, size, large=large), _memory(seed, size, large=large)
        logits, values = whole.read("logits", slice(None)), whole.read("values", slice(None))
        weights = np.exp(logits - logits.max())
        found = answer(memory, tile)
        require(
            _close(found, weights @ values / weights.sum()),
            f"wrong for {size} logits around {logits.mean():.0f} in tiles of {tile}: what becomes of the sums when a "
            "larger logit turns up?",
        )
        require(memory.traffic <= 4 * size, f"{memory.traffic} numbers moved; {4 * size} are enough: read each once")
        require(memory.most <= tile, f"{memory.most} rows were fetched at a time; the chip holds {tile}")
        require(
            memory.kept <= 2 * tile,
            f"{memory.kept} rows were kept at once: the chip has room for a tile of {tile} and the one that comes",
        )


def my_tile_reads(T, S, W, tile_t, tile_s) -> int:
    """Numbers read for all products of T queries with S keys of width W.

    A tile of queries stays while all tiles of keys pass by. Tiles at the
    edges may be smaller.
    """
    return T * W + -(-T // tile_t) * S * W


def _each_pair(T: int, S: int, W: int, tile_t: int, tile_s: int) -> int:
    """Counts two vectors for each pair, as if nothing were kept."""
    return 2 * T * S * W


def _queries_again(T: int, S: int, W: int, tile_t: int, tile_s: int) -> int:
    """Reads the queries again for each tile of keys, though they stay."""
    return -(-S // tile_s) * T * W + -(-T // tile_t) * S * W


def _cuts_the_edge(T: int, S: int, W: int, tile_t: int, tile_s: int) -> int:
    """Forgets the last, smaller tile of queries."""
    return T * W + T // tile_t * S * W


def _check_tile_reads(answer) -> None:
    for T, S, W, tile_t, tile_s in ((8, 8, 2, 4, 4), (7, 9, 3, 2, 4), (5, 20, 1, 8, 8), (64, 64, 128, 1, 16)):
        found, expected, begin = answer(T, S, W, tile_t, tile_s), 0, 0
        while begin < T:
            expected += min(tile_t, T - begin) * W + S * W
            begin += tile_t
        require(found == expected, f"{T} queries and {S} keys in tiles of {tile_t} x {tile_s}: {expected}, not {found}")


def my_gather(memory: Memory, heads: int, selected: list) -> np.ndarray:
    """For each head h the sum of "q"[h] . "kv"[s] over the selected s.

    -> (heads,). "q" has a row for each head, "kv" one for each token,
    shared by all heads. A slot of -1 is empty.
    """
    q = memory.read("q", slice(0, heads))
    total = np.zeros(heads)
    for s in selected:
        if s >= 0:
            total += q @ memory.read("kv", s)
    return total


def _head_by_head(memory: Memory, heads: int, selected: list[int]) -> np.ndarray:
    """Fetches the tokens anew for each head."""
    rows = [memory.read("q", h) for h in range(heads)]
    return np.array([sum(q @ memory.read("kv", s) for s in selected if s >= 0) for q in rows])


def _masked(memory: Memory, heads: int, selected: list[int]) -> np.ndarray:
    """Reads all tokens and leaves most of them out afterwards."""
    kv = memory.read("kv", slice(None))
    return memory.read("q", slice(0, heads)) @ kv[[s for s in selected if s >= 0]].sum(0)


def _takes_the_last(memory: Memory, heads: int, selected: list[int]) -> np.ndarray:
    """Takes -1 for a token: Python then fetches the last one."""
    q = memory.read("q", slice(0, heads))
    return sum(q @ memory.read("kv", s) for s in selected)


def _check_gather(answer) -> None:
    for seed, heads, selected in ((0, 4, [3, 17, 8]), (1, 2, [5, -1, 0, -1])):
        random = np.random.default_rng(seed)
        q, kv = random.normal(size=(heads, 4)), random.normal(size=(20, 4))
        memory, real = Memory({"q": q, "kv": kv}), [s for s in selected if s >= 0]
        found = answer(memory, heads, list(selected))
        require(_close(found, q @ kv[real].sum(0)), f"wrong for {heads} heads and the list {selected}")
        enough = 4 * (heads + len(real))
        require(memory.traffic <= enough, f"{memory.traffic} numbers moved where {enough} are enough")


EXERCISES = (
    Exercise(
        title="A softmax in one pass",
        difficulty=2,
        minutes=20,
        task="Attention for one query whose logits are known: the softmax of `logits` times `values`. All of it lies "
        "in slow memory: `memory.read(name, slice(a, b))` fetches rows and counts every number, `memory.size(name)` "
        "is free. Fetch at most `tile` rows at a time and **each number once**, and let a tile go when the next one "
        "has come: a chip has no room for all of them. The logits may be 1,000.",
        hints=(
            "Keep three things: the largest logit so far, the sum of powers, and the weighted sum of values.",
            "Powers are taken of the distance to the largest so far.",
            "If the largest grows from a to b, everything summed before is too large by the factor exp(b - a).",
        ),
        solution=my_attention,
        wrong=(_in_three_passes, _all_at_once, _keeps_every_tile, _without_maximum, _without_shrinking),
        check=_check_attention,
    ),
    Exercise(
        title="What a tile saves",
        difficulty=1,
        minutes=10,
        task="Count, do not compute. All products of T queries with S keys of width W: a tile of `tile_t` queries is "
        "fetched and stays on the chip while all keys pass by, in tiles of `tile_s`. How many numbers are read?",
        hints=(
            "Each query is fetched once.",
            "How often do all keys pass by?",
            "Once for each tile of queries, also for a last one that is not full.",
        ),
        solution=my_tile_reads,
        wrong=(_each_pair, _queries_again, _cuts_the_edge),
        check=_check_tile_reads,
    ),
    Exercise(
        title="Fetch once for all heads",
        difficulty=2,
        minutes=15,
        task="The kernel's innermost act: sum `q[h] . kv[s]` over the selected tokens, for all heads. They lie "
        "in slow memory: `memory.read(name, row)` fetches a row, or several for a slice, and every number counts. Read "
        "only what is selected, and **once for all heads**; -1 is an empty slot.",
        hints=(
            "All queries fit on the chip: fetch them first.",
            "Then one row at a time, and all heads use it before the next one comes.",
            "`q @ row` is one number for each head.",
        ),
        solution=my_gather,
        wrong=(_head_by_head, _masked, _takes_the_last),
        check=_check_gather,
    ),
)
check = checker(*EXERCISES)
