"""The modelled cost curves: from sizes and rates by another route, against the published ones at every position."""

import math
from dataclasses import replace

import numpy as np
import pytest

from dsa.analysis import roofline
from dsa.analysis.published import Curve, crossing, read_costs
from dsa.analysis.roofline import DENSE, H200, H800, NO_MTP, PEAK_SHARES, SPARSE, Rates
from dsa.model.config import Config
from project import DATA

REAL = Config.v32_exp()
PUBLISHED = read_costs(DATA / "published" / "costs.csv")
STARTS = roofline.base_costs(PUBLISHED)
EVERY = np.arange(131_072)


def interpolated(curve):
    return np.interp(EVERY, curve.positions, curve.dollars)


def by_hand(key):
    """The curve at every position from numbers alone: sizes of the real model, rates as the docstring states them."""
    p, layers, usd = EVERY, 61, 1e6 * 2 / 3600
    few, again = np.minimum(p, 2048), 2 / 1.85  # two queries a pass yield 1.85 tokens
    logits = 12 * p / 3.35e12
    mha, scoring = 81_920 * p / 600e12, 16_384 * p / 1100e12
    seconds = {
        ("prefill", DENSE): mha,
        ("prefill", SPARSE): np.minimum(mha, 2048 * 278_528 / 640e12) + scoring + logits,
        ("decode", DENSE): np.maximum(278_528 * p / 660e12 * again, 1152 * p / 3.35e12 / 1.85),
        ("decode", SPARSE): 278_528 * few / 410e12 * again
        + np.maximum(scoring * again, 132 * p / 3.35e12 / 1.85)
        + logits * again,
    }
    return STARTS[key] + usd * layers * seconds[key]


@pytest.mark.parametrize("key", sorted(PUBLISHED))
def test_the_model_is_what_sizes_and_rates_give(key):
    assert interpolated(roofline.modelled_curves(REAL, STARTS)[key]) == pytest.approx(by_hand(key), rel=1e-4)


@pytest.mark.parametrize(("rates", "margin"), [(H800, 0.08), (PEAK_SHARES, 0.03)])
def test_all_four_curves_at_every_position(rates, margin):
    ours = roofline.modelled_curves(REAL, STARTS, rates)
    off = {key: np.abs(interpolated(ours[key]) / interpolated(PUBLISHED[key]) - 1).max() for key in ours}
    assert max(off.values()) < margin
    at_corners = roofline.max_relative_error(REAL, PUBLISHED, rates)
    assert at_corners == pytest.approx(max(off.values()), rel=1e-3)  # corners are enough


def test_where_the_model_crosses():
    ours = roofline.modelled_curves(REAL, STARTS)
    for phase in ("prefill", "decode"):
        theirs = crossing(PUBLISHED[phase, DENSE], PUBLISHED[phase, SPARSE])
        assert crossing(ours[phase, DENSE], ours[phase, SPARSE]) == pytest.approx(theirs, rel=0.10)


def test_one_token_a_pass_does_not_fit_at_these_rates():
    ours = roofline.modelled_curves(REAL, STARTS, NO_MTP)
    assert roofline.relative_error(ours["decode", SPARSE], PUBLISHED["decode", SPARSE]) > 0.3
    needed = 61 * 132 / roofline.seconds_per_position(PUBLISHED["decode", SPARSE])
    assert needed / H800.bandwidth == pytest.approx(1.67, abs=0.01)


def test_the_figure_is_round_shares_of_the_peak_but_for_one():
    shares = roofline.implied_utilization(REAL, PUBLISHED)
    odd = shares.pop("selected keys, prefill")
    assert len(shares) == 5 and all(abs(100 * share / 5 - round(100 * share / 5)) < 0.01 for share in shares.values())
    assert abs(odd - 0.573) < 0.001


def test_a_range_ends_where_a_curve_leaves_its_margin():
    low, high = roofline.acceptable_range(REAL, PUBLISHED, "mha")
    assert low < H800.mha < high < 1.2 * low * 1.2
    for edge, outside in ((low, low * 0.999), (high, high * 1.001)):
        assert roofline.max_relative_error(REAL, PUBLISHED, replace(H800, mha=edge)) <= 0.1 + 1e-9
        assert roofline.max_relative_error(REAL, PUBLISHED, replace(H800, mha=outside)) > 0.1
    free = roofline.acceptable_range(REAL, PUBLISHED, "peak")  # plays no part in any slope
    assert free == (H800.peak / 8, H800.peak * 8)
    with pytest.raises(ValueError, match="34% off"):
        roofline.acceptable_range(REAL, PUBLISHED, "mha", rates=NO_MTP)


def test_no_batch_is_ruled_out_but_small_ones():
    start = STARTS["decode", DENSE]
    shares = [roofline.required_utilization(REAL, start, n) for n in (500, 1000, 2000, 8000, 1_000_000)]
    assert shares[0] == math.inf and shares[1] > 1 > shares[2] > shares[3] > shares[4]
    limit = 2 * 36.62e9 * 2 / 1.85 / (2 * 989.5e12) / (start / 1e6 / 2 * 3600)  # reading is free in the end
    assert shares[4] == pytest.approx(limit, rel=0.01)


def test_a_floor_of_one_gpu_is_flop_or_bytes_whichever_is_longer():
    micro = 1e6 / 61
    for keys, dense, decode in ((32_768, 3.40, 11.6), (131_072, 13.6, 46.2)):
        assert roofline.dense_seconds(REAL, "prefill", H200) * keys * micro == pytest.approx(dense, abs=0.05)
        assert roofline.dense_seconds(REAL, "decode", H200) * keys * micro == pytest.approx(decode, abs=0.05)
    assert roofline.sparse_seconds(REAL, "prefill", H200) * 2048 * micro == pytest.approx(0.72, abs=0.005)
    slow = replace(H200, bandwidth=1e12)  # bytes take over
    assert roofline.dense_seconds(REAL, "decode", slow) * micro * 1e-6 == pytest.approx(1152e-12)


def test_a_cache_is_read_once_for_all_drafts_and_selected_rows_for_each():
    slow = Rates(bandwidth=1e9, drafted=2, accepted=2)  # so slow that only bytes count
    assert roofline.dense_seconds(REAL, "decode", slow) == pytest.approx(61 * 1152 / 1e9 / 2)
    assert roofline.sparse_seconds(REAL, "decode", slow) == pytest.approx(61 * 656 / 1e9)
    assert roofline.scoring_seconds(REAL, "decode", slow) == pytest.approx(61 * (132 / 2 + 12) / 1e9)


def test_a_top_k_beyond_the_context_leaves_no_knee():
    huge = roofline.modelled_curves(REAL.replace(index_topk=131_072), STARTS)["decode", SPARSE]
    assert huge.positions == (0, 131_070, 131_071)


def test_a_curve_adds_up_to_its_area():
    curve = PUBLISHED["decode", SPARSE]
    assert curve.total(0, 131_071) == pytest.approx(interpolated(curve)[:-1].sum() / 1e6, rel=1e-4)
    assert curve.total(1000, 5000) + curve.total(5000, 9000) == pytest.approx(curve.total(1000, 9000))
    assert curve.total(7, 7) == 0
    assert Curve((0, 10), (1.0, 3.0)).total(0, 10) == pytest.approx(20e-6)
    with pytest.raises(ValueError, match="backwards"):
        curve.total(5, 4)
    with pytest.raises(ValueError, match="not on the curve"):
        curve.total(0, 200_000)
