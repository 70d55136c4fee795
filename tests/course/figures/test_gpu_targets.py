"""A record from a GPU is drawn as it is: reached, missed, failed; without one the figure says how to make it."""

import matplotlib.pyplot as plt
import pytest

from course.figures import gpu_targets


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def case(unit, target, minimum, figure, verdict, candidates, **more):
    return {"unit": unit, "target": target, "minimum": minimum, "figure": figure, "verdict": verdict,
            "candidates": candidates, **more}  # fmt: skip


RECORD = {
    "machine": "NVIDIA H200", "date": "2026-12-01", "versions": {"torch": "2.13.0", "triton": "3.7.1"},
    "cases": {
        "machine": {"candidates": {"copy": {"milliseconds": [1.0, 1.0]}}},
        "index logits, 32768 keys": case(
            "TFLOP/s", 700, 500, 610.0, "minimum",
            {"ours": {"milliseconds": [2.0, 2.02], "tflops": 610.0},
             "bare": {"milliseconds": [1.0, 1.0], "tflops": 1200.0}},
            tiles={"index_logits_kernel": {"BLOCK_S 128, 4 warps, 3 stages": 2.0, "BLOCK_S 512, 8 warps": None,
                                           "BLOCK_S 256, 8 warps, 3 stages": 1.9}},
        ),
        "top-k": case("ms", 3, 6, 12.0, "missed", {"ours": {"milliseconds": [12.0, 12.0], "tflops": 0.0},
                                                   "torch.topk": {"milliseconds": [40.0, 42.0], "tflops": 0.0}}),
        "backward": case("TFLOP/s", 60, 30, None, "not measured", {"ours": {"failed": "PTXASError: no"}}),
        "layer, decode, broken off": {"candidates": {}, "failed": "stopped after 150 seconds"},
    },
}  # fmt: skip


def test_without_a_record_there_is_a_sentence_with_the_command():
    assert gpu_targets.draw_targets(None) == gpu_targets.NONE
    assert "dsa bench gpu --out" in gpu_targets.NONE


def test_bars_are_shares_of_goals_and_what_failed_has_none():
    fig, words = gpu_targets.draw_targets(RECORD)
    ax = fig.axes[0]
    bars = [bar.get_width() for bar in ax.patches]
    assert bars == pytest.approx([610 / 700, 3 / 12])  # a time is better when it is less
    assert [bar.get_hatch() for bar in ax.patches] == [None, "//"]
    assert [line.get_xdata()[0] for line in ax.lines[:-1]] == pytest.approx([500 / 700, 0.5, 0.5])
    assert words.splitlines() == [
        "Recorded on NVIDIA H200, 2026-12-01, torch 2.13.0, Triton 3.7.1.",
        "index logits, 32768 keys: 610 TFLOP/s (target 700, minimum 500: minimum), the same again 1.0% apart; "
        "beside it bare 1200 TFLOP/s.",
        "top-k: 12 ms (target 3, minimum 6: missed), the same again 0.0% apart; beside it torch.topk 41.00 ms.",
        "backward: not measured (target 60, minimum 30).",
        "backward, ours: PTXASError: no",
        "layer, decode, broken off: stopped after 150 seconds",
    ]


def test_tiles_stand_in_order_of_time():
    table = gpu_targets.tiles(RECORD).splitlines()[2:]
    assert [line.split(" | ")[-1] for line in table] == ["1.900 |", "2.000 |", "does not fit |"]
    assert table[0].startswith("| index logits, 32768 keys | `index_logits_kernel` | BLOCK_S 256")
