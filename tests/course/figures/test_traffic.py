"""The memory that counts, counts; and the tiles' figure says what an independent count says."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from course.figures.traffic import HEADS, Memory, draw_tiles, tile_traffic
from course.ui.panel import Choice, Panel, Slider


def test_every_number_read_or_written_is_counted():
    memory = Memory({"a": np.zeros((5, 3))})
    row = memory.read("a", 1)
    row += 1  # a copy: the memory does not change
    assert memory.read("a", slice(0, 9)).sum() == 0
    memory.write("a", slice(0, 2), 7.0)
    assert (memory.size("a"), memory.reads, memory.writes, memory.traffic) == (5, 18, 6, 24)


def test_what_was_fetched_is_kept_until_it_is_let_go():
    memory = Memory({"a": np.zeros((6, 3)), "b": np.zeros(6)})
    for begin in range(0, 6, 2):
        memory.read("a", slice(begin, begin + 2))
    assert memory.kept == 2
    several = [memory.read("b", slice(begin, begin + 2)) for begin in range(0, 6, 2)]
    assert memory.kept == sum(map(len, several)) == 6


def test_every_group_of_heads_fetches_the_tokens_again():
    for heads in HEADS:
        moved, intensity = tile_traffic(2048, heads)
        assert moved == 128 // heads * 2048 * 576 * 2 + 128 * 576 * 2 + 128 * 512 * 2
        assert intensity == pytest.approx(2 * 128 * 2048 * 1088 / moved)


def test_the_panel_draws_everywhere_and_refuses_what_does_not_exist():
    panel = Panel(draw_tiles, top_k=Slider("top-k", 64, 2048, 2048, step=64), heads=Choice("heads", list(HEADS), 64))
    for values in panel.grid():
        fig, words = draw_tiles(**values)
        assert f"top-k {values['top_k']} and {values['heads']} heads" in words
        plt.close(fig)
    with pytest.raises(ValueError, match="3 heads"):
        draw_tiles(2048, 3)
