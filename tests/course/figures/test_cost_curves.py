"""Chapter 09's pictures and its calculator, against computations of their own."""

import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

from course.figures import cost_curves, own_machine, serving_cost
from course.ui.panel import Panel, Slider
from dsa.analysis import pricing, roofline
from dsa.analysis.published import read_costs
from dsa.analysis.roofline import DENSE, SPARSE
from dsa.model.config import Config
from project import DATA

REAL = Config.v32_exp()
PUBLISHED = read_costs(DATA / "published" / "costs.csv")
STARTS = roofline.base_costs(PUBLISHED)
MEASURED = DATA / "measurements"
START = {"length": 64, "top_k": 2048, "price": 200, "cached": 0}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def draw():
    return serving_cost.draw_calculator(REAL, PUBLISHED)


def numbers(sentence):
    """Every number of a sentence, in order."""
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*\.?\d*", sentence.replace("top-k", ""))]


def by_hand(length, top_k, price, cached):
    """Cents of the calculator's request, from numbers alone: list, dense, sparse."""
    prompt = 1024 * length
    kept, end = prompt * cached // 100, prompt + 1000
    p, usd = np.arange(131_072) + 0.5, 61 * 1e6 * price / 100 / 3600
    index, logits, again = 16_384 / 1100e12, 12 / 3.35e12, 2 / 1.85
    mha, mqa = 81_920 / 600e12, 278_528 / 660e12 * again
    prefill = {DENSE: mha * p, SPARSE: np.minimum(mha * p, top_k * 278_528 / 640e12) + (index + logits) * p}
    scoring = max(index * again, 132 / 3.35e12 / 1.85) + logits * again
    decode = {DENSE: mqa * p, SPARSE: np.minimum(p, top_k) * 278_528 / 410e12 * again + scoring * p}
    found = [100 * (0.28 * (prompt - kept) + 0.028 * kept + 0.42 * 1000) / 1e6]
    for m in (DENSE, SPARSE):
        read = usd * prefill[m] + STARTS["prefill", m] * price / 200
        write = usd * decode[m] + STARTS["decode", m] * price / 200
        found.append(100 * (read[kept:prompt].sum() + write[prompt:end].sum()) / 1e6)
    return found


def test_the_calculator_at_every_position(draw):
    panel = Panel(
        draw,
        length=Slider("length", 1, 127, 64),
        top_k=Slider("top-k", 256, 8192, 2048, step=256),
        price=Slider("price", 50, 500, 200, step=50),
        cached=Slider("cached", 0, 100, 0),
    )
    positions = list(panel.grid(100))
    assert len(positions) > 40
    for position in positions:
        fig, sentence = draw(**position)
        said = numbers(sentence)
        assert said[0] == 1024 * position["length"] and said[1] == said[0] * position["cached"] // 100
        assert said[3:6] == pytest.approx(by_hand(**position), abs=0.006, rel=2e-3), position
        bars = [100 * 0.0, *(bar.get_height() for bar in fig.axes[1].patches)]
        assert sum(bars) == pytest.approx(sum(by_hand(**position)), rel=2e-3, abs=1e-3)
        plt.close(fig)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"length": 0}, "length = 0 lies outside 1 to 127"),
        ({"length": 128}, "the answer needs 1,000"),
        ({"top_k": 0}, "top-k = 0"),
        ({"price": 0}, "price = 0"),
        ({"cached": 101}, "cached = 101 lies outside 0 to 100"),
        ({"cached": 0.5}, "not a whole number"),
    ],
)
def test_what_the_calculator_cannot_price_is_refused(draw, change, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        draw(**START | change)


def test_a_top_k_as_long_as_the_context_never_pays(draw):
    assert "nowhere up to 128 Ki in decode" in draw(**START | {"top_k": 131_071})[1]


def test_where_a_ratio_is_reached():
    dense, sparse = PUBLISHED["decode", DENSE], PUBLISHED["decode", SPARSE]
    place = cost_curves.at_least(dense, sparse, 6)
    assert dense.at(place) == pytest.approx(6 * sparse.at(place)) and 71_000 < place < 72_000
    assert cost_curves.at_least(PUBLISHED["prefill", DENSE], PUBLISHED["prefill", SPARSE], 6) == math.inf


def test_a_power_is_two_for_what_grows_with_the_square():
    line = roofline.Curve((0, 1000), (0.0, 5.0))
    assert cost_curves.power(line, 1000) == pytest.approx(2)
    assert cost_curves.power(roofline.Curve((0, 1000), (5.0, 5.0)), 1000) == pytest.approx(1)


def test_the_figure_of_what_was_said_draws_and_says_the_published_numbers():
    fig, words = cost_curves.draw_quoted(PUBLISHED)
    assert "prefill 0.87 at the start, 3.56 at the end, 1 from 10.6 thousand, 2 times from 42" in words
    assert "decode 0.74 at the start, 8.65 at the end, 1 from 4.9 thousand, 2 times from 15" in words
    ratio = fig.axes[2].lines[1].get_ydata()
    assert ratio[0] == pytest.approx(0.0705 / 0.0952) and ratio[-1] == pytest.approx(8.65, abs=0.005)


def test_the_fit_shows_the_gaps():
    models = {"a": roofline.modelled_curves(REAL, STARTS), "b": PUBLISHED}
    fig, words = cost_curves.draw_fit(PUBLISHED, models)
    assert "a: prefill of V3.1-Terminus -1.0%, prefill of V3.2-Exp -7.3%" in words
    gaps = [np.abs(line.get_ydata()).max() for line in fig.axes[0].lines[:4]]
    assert gaps == pytest.approx([0.97, 7.34, 0, 0], abs=0.01)


def test_ranges_are_drawn_as_computed():
    fig, words = cost_curves.draw_ranges({"x": (1.0, 2.0, 8.0), "y": (3.0, 3.0, 3.0)})
    assert words.endswith("x 0.50 to 4.00, y 1.00 to 1.00.")
    assert list(fig.axes[0].lines[1].get_xdata()) == [0.5, 4.0]  # from below: y, x


def test_bills_and_tornado_are_drawn_as_computed():
    fig, words = serving_cost.draw_serving_costs(PUBLISHED, {"a chat": pricing.CHAT})
    heights = [bar.get_height() for bar in fig.axes[0].patches]
    gpu = pricing.published_gpu_bills(PUBLISHED, pricing.CHAT)
    right = 100 * (pricing.list_price_bill(pricing.CHAT).total + gpu[DENSE].total + gpu[SPARSE].total)
    assert sum(heights) == pytest.approx(right) and "a chat list 93, V3.1-Terminus 12, V3.2-Exp 2.3" in words
    bars = [pricing.Bar("hit_rate", (0.5, 1.0), (0.04, 0.01)), pricing.Bar("model", (DENSE, SPARSE), (0.01, 0.02))]
    fig, words = serving_cost.draw_tornado({"t": (0.01, bars)})
    drawn = [(bar.get_x(), bar.get_width()) for bar in fig.axes[0].patches]
    assert drawn == [pytest.approx((1, 1)), pytest.approx((1, 3))]  # the most important on top
    assert "hit rate 0.5 … 1.0 4 to 1, model V3.1 … V3.2 1 to 2" in words


def test_a_machine_that_is_a_slow_copy_lies_on_the_figure():
    dense, sparse = PUBLISHED["decode", DENSE], PUBLISHED["decode", SPARSE]
    seconds = {n: (3 * (dense.at(n) - dense.at(0)), 3 * (sparse.at(n) - sparse.at(0))) for n in (1024, 4096, 16_384)}
    fig, words = own_machine.draw_machine(PUBLISHED, {"decode": seconds})
    drawn = {line.get_label(): line.get_ydata() for line in fig.axes[0].lines}
    assert drawn["dense, measured"] == pytest.approx([dense.at(n) for n in seconds])
    assert drawn["sparse, measured"] == pytest.approx([sparse.at(n) for n in seconds])
    assert f"{seconds[16_384][0] / seconds[16_384][1]:.1f} times as long" in words


def test_where_measured_lines_meet():
    assert own_machine.meeting({10: (1.0, 2.0), 20: (3.0, 2.0)}) == pytest.approx(15)
    assert own_machine.meeting({10: (3.0, 2.0), 20: (3.0, 2.0)}) is None


def test_floors_are_work_over_rate():
    found = own_machine.floors(REAL, "decode", 131_072)
    assert found["dense"] == pytest.approx(131_072 * 278_528 / 790e12 * 1e6)
    assert found["scoring"] == pytest.approx(131_072 * (132 + 12) / 4.3e12 * 1e6)
    assert found["selected"] == pytest.approx(2048 * 278_528 / 790e12 * 1e6)
    _, words = own_machine.draw_floors(REAL, (131_072,))
    assert "decode 9.0 at 131,072" in words


def test_records_are_those_that_are_there(tmp_path):
    assert own_machine.records(tmp_path, "gpu") == []
    (tmp_path / "gpu_h200.json").write_text(json.dumps({"machine": "H200", "rows": []}))
    (tmp_path / "cpu_one.json").write_text("{}")
    assert [record["machine"] for record in own_machine.records(tmp_path, "gpu")] == ["H200"]


def test_rows_of_a_record_become_pairs():
    rows = [
        {"phase": "decode", "attention": kind, "keys": keys, "seconds": s}
        for kind, keys, s in (("sparse", 8, 2.0), ("dense", 8, 3.0), ("dense", 4, 1.0))
    ]
    assert own_machine.layer_seconds({"rows": rows}) == {"decode": {8: (3.0, 2.0)}}
    assert own_machine.layer_seconds({"rows": rows[:1]}) == own_machine.layer_seconds({"rows": [{"kernel": "x"}]}) == {}


def test_the_recorded_layer_says_what_the_chapter_tells():
    [record] = [r for r in own_machine.records(MEASURED, "cpu") if "--shape real" in r["command"]]
    long = own_machine.layer_seconds(record)
    assert record["machine"] and record["date"] and record["versions"]
    for phase, most in (("prefill", 2.5), ("decode", 6)):
        assert sorted(long[phase])[-1] == 131_072 and long[phase][131_072][0] > most * long[phase][131_072][1]
        assert 1024 < own_machine.meeting(long[phase]) < 16_384
