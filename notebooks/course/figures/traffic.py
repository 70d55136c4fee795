"""What moves between memory and the chip: a memory that counts, and a roofline over tile sizes.

Arithmetic units have been faster than memory for decades, so a kernel is judged by what it reads and writes. `Memory`
is a slow memory in miniature: arrays that can only be reached by `read` and `write`, which count every number. The
exercises of chapter 08 give one to the reader's answer and look at the count afterwards.

`tile_traffic` counts the same for the real model, and `draw_tiles` turns counts into a least time: the longer of what
the arithmetic takes and what the memory takes.
"""

from collections.abc import Mapping
from math import ceil
from weakref import ref

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from course.ui.style import provenance
from dsa.analysis import roofline

ROW = 1152  # bytes of a latent in bf16: 2 (512 + 64)
QUERY = 128 * 576 * 2  # bytes of all heads' absorbed queries of one token
PAIR = 278_528  # FLOP of a pair, all 128 heads
HEADS = (1, 16, 32, 64, 128)


class Memory:
    """Arrays behind a counter.

    Args:
        arrays: name -> array. They are copied.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = {name: np.array(array, dtype=float) for name, array in arrays.items()}
        self.reads = self.writes = 0
        self.most = 0  # rows that one read has fetched
        self.kept = 0  # rows of one array that were fetched and not yet let go, at most
        self._lent: dict[str, list[ref[np.ndarray]]] = {}

    def size(self, name: str) -> int:
        """How many rows an array has; asking costs nothing."""
        return len(self._arrays[name])

    def read(self, name: str, where: int | slice) -> np.ndarray:
        """A copy of one row or a slice of rows: each number counts as one read."""
        found = np.array(self._arrays[name][where])
        self.reads += found.size
        self.most = max(self.most, len(found) if isinstance(where, slice) else 1)
        # weak references: a tile that the answer lets go drops out of the count by itself
        lent = (*self._lent.get(name, ()), ref(found))
        alive = [held for one in lent if (held := one()) is not None]
        self._lent[name] = [ref(held) for held in alive]
        self.kept = max(self.kept, sum(held.size for held in alive) // self._arrays[name][:1].size)
        return found

    def write(self, name: str, where: int | slice, value: np.ndarray | float) -> None:
        """Overwrite one row or a slice of rows: each number counts as one write."""
        self._arrays[name][where] = value
        self.writes += int(np.size(self._arrays[name][where]))

    @property
    def traffic(self) -> int:
        """Reads and writes together."""
        return self.reads + self.writes


def tile_traffic(top_k: int, heads: int) -> tuple[int, float]:
    """Bytes that attention moves for one query at the real shape, and the FLOP it gets for each.

    Every group of `heads` heads is a program of its own and fetches the K selected latents again. The query and the
    answer move once.
    """
    if top_k < 1 or heads not in HEADS:
        raise ValueError(f"top-k {top_k} with {heads} heads a tile: give at least 1, and one of {HEADS}")
    moved = ceil(128 / heads) * top_k * ROW + QUERY + 128 * 512 * 2
    return moved, PAIR * top_k / moved


def draw_tiles(top_k: int = 2048, heads: int = 64) -> tuple[Figure, str]:
    """The least time of sparse attention for one query on an H200, over tile heights, with one of them marked."""
    rates = roofline.H200
    moved, intensity = tile_traffic(top_k, heads)
    memory, arithmetic = moved / rates.bandwidth * 1e6, PAIR * top_k / rates.sparse_prefill * 1e6
    fig, ax = plt.subplots(figsize=(6.4, 3.2))
    traffic = [tile_traffic(top_k, h)[0] / rates.bandwidth * 1e6 for h in HEADS]
    style = provenance("modelled")["linestyle"]
    ax.plot(HEADS, traffic, marker="o", label="memory", linestyle=style)
    ax.plot(HEADS, [arithmetic] * len(HEADS), marker="s", label="arithmetic", linestyle=style)
    ax.plot([heads], [max(memory, arithmetic)], "k*", markersize=13, label=f"{heads} heads: the longer one")
    ax.set(xscale="log", yscale="log", xlabel="heads that share a fetched row", ylabel="microseconds a query")
    ax.set_xticks(HEADS, [str(h) for h in HEADS])
    ax.minorticks_off()
    ax.legend()
    bound = "memory" if memory > arithmetic else "arithmetic"
    words = (
        f"with top-k {top_k} and {heads} heads a tile {moved / 1e6:.2f} MB move, {intensity:.0f} FLOP a byte: "
        f"{memory:.2f} us of memory, {arithmetic:.2f} us of arithmetic, bound by {bound}"
    )
    return fig, words
