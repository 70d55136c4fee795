"""Published costs are read as they are, and interpolated as the figure draws them."""

import json
import random

import pytest

from dsa.analysis.published import Benchmark, Curve, crossing, read_benchmarks, read_costs
from project import DATA

FOLDER = DATA / "published"
COSTS = read_costs(FOLDER / "costs.csv")


def test_every_file_says_where_it_comes_from():
    notes = json.loads((FOLDER / "provenance.json").read_text())
    assert set(notes) == {path.name for path in FOLDER.glob("*.csv")}
    assert all(note["source"] and note["how"] and note["kind"] == "published" for note in notes.values())


def test_four_curves_over_the_whole_context():
    assert set(COSTS) == {(p, m) for p in ("prefill", "decode") for m in ("V3.1-Terminus", "V3.2-Exp")}
    assert all(curve.positions[0] == 0 and curve.positions[-1] == 131_071 for curve in COSTS.values())
    assert COSTS["decode", "V3.1-Terminus"].at(131_071) == pytest.approx(2.1543)
    assert COSTS["prefill", "V3.2-Exp"].at(6747) == pytest.approx(0.0999)


@pytest.mark.parametrize(("phase", "place", "ratio"), [("prefill", 10_646, 3.56), ("decode", 4871, 8.65)])
def test_where_they_cross_and_how_far_apart_they_end(phase, place, ratio):
    dense, sparse = COSTS[phase, "V3.1-Terminus"], COSTS[phase, "V3.2-Exp"]
    assert crossing(dense, sparse) == pytest.approx(place, abs=15)  # corners have four digits
    assert dense.at(131_071) / sparse.at(131_071) == pytest.approx(ratio, abs=0.005)


def test_what_is_not_on_a_curve_is_refused():
    with pytest.raises(ValueError, match="position 131072 is not on the curve"):
        COSTS["decode", "V3.2-Exp"].at(131_072)
    with pytest.raises(ValueError, match="do not cross"):
        crossing(Curve((0, 10), (1.0, 2.0)), Curve((0, 10), (2.0, 3.0)))


def test_the_fourteen_benchmarks():
    table = {row.name: row for row in read_benchmarks(FOLDER / "benchmarks.csv")}
    assert len(table) == 14 and sum(row.questions is None for row in table.values()) == 2
    assert table["Codeforces-Div1"].difference == 75 and table["HMMT 2025"].difference == -2.5
    assert [name for name, row in table.items() if row.questions is None] == ["LiveCodeBench", "Codeforces-Div1"]


def test_chance_is_the_binomial_one():
    rng = random.Random(0)
    n, p = 50, 0.4
    draw = [sum(rng.random() < p for _ in range(n)) for _ in range(4000)]
    gaps = [100 * (a - b) / n for a, b in zip(draw[::2], draw[1::2], strict=True)]
    half = Benchmark("a", 100 * p, 100 * p, n).noise_margin()
    assert 0.93 < sum(abs(gap) < half for gap in gaps) / len(gaps) < 0.975
    assert Benchmark("rating", 2000, 2100, None).noise_margin() is None
