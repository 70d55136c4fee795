"""Published costs are read as they are, and interpolated as the figure draws them."""

import json
from pathlib import Path

import pytest

from dsa.cost.published import Curve, crossing, read_costs

FOLDER = Path(__file__).parent.parent / "data" / "published"
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
