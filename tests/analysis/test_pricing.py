"""Bills: token by token, the slow way, against the package's."""

import re
from dataclasses import replace

import pytest

from dsa.analysis import pricing, roofline
from dsa.analysis.pricing import CHAT, DOCUMENT, REPOSITORY, Conversation, Prices, Scenario
from dsa.analysis.published import Curve, read_costs
from dsa.analysis.roofline import DENSE, SPARSE
from dsa.model.config import Config
from project import DATA

REAL = Config.v32_exp()
PUBLISHED = read_costs(DATA / "published" / "costs.csv")
STARTS = roofline.base_costs(PUBLISHED)
SMALL = Conversation(opening=20, question=3, answer=4, turns=5)


def replayed(work):
    """Every token of a conversation, one by one: [(kind, position)]."""
    text, found = work.opening, []
    for turn in range(work.turns):
        reusable = 0 if turn == 0 else text
        text += work.question
        kept = round(work.hit_rate * reusable)
        found += [("cached" if p < kept else "fresh", p) for p in range(text)]
        found += [("written", p) for p in range(text, text + work.answer)]
        text += work.answer
    return found


@pytest.mark.parametrize("hit", [0.0, 0.5, 1.0])
def test_the_list_asks_for_every_token_that_is_sent(hit):
    work = replace(SMALL, hit_rate=hit)
    kinds = [kind for kind, _ in replayed(work)]
    bill = pricing.list_price_bill(work, Prices(fresh=1e6, cached=1e6, written=1e6))  # a dollar a token
    assert (bill.fresh, bill.cached, bill.written) == tuple(kinds.count(k) for k in ("fresh", "cached", "written"))


@pytest.mark.parametrize("hit", [0.0, 0.5, 1.0])
def test_the_gpu_bill_adds_up_positions(hit):
    work = replace(SMALL, hit_rate=hit)
    prefill, decode = Curve((0, 100), (0.0, 1e8)), Curve((0, 100), (7e6, 2.07e8))  # p, 7 + 2p dollars
    bill = pricing.gpu_time_bill(work, prefill, decode)
    tokens = replayed(work)
    assert bill.fresh == pytest.approx(sum(p + 0.5 for kind, p in tokens if kind == "fresh"))
    assert bill.written == pytest.approx(sum(7 + 2 * (p + 0.5) for kind, p in tokens if kind == "written"))


def test_known_bills():
    assert pricing.list_price_bill(DOCUMENT).total == pytest.approx(
        (60_100 + 4 * 100) * 0.28e-6 + (61_000 * 4 + 6 * 1000) * 0.028e-6 + 4500 * 0.42e-6
    )
    chat = pricing.list_price_bill(CHAT)
    assert chat.cached / chat.total > 0.9 and chat.fresh == pytest.approx(25_500 * 0.28e-6)
    cold = pricing.list_price_bill(replace(CHAT, hit_rate=0))
    assert cold.total / chat.total > 9


def test_half_a_hit_saves_the_cheap_half():
    curve = PUBLISHED["prefill", DENSE]
    work = Conversation(opening=100_000, question=0, answer=0, turns=2, hit_rate=0.5)
    second = pricing.gpu_time_bill(work, curve, curve).fresh - curve.total(0, 100_000)
    assert second / curve.total(0, 100_000) > 0.69  # not a half


def test_the_model_prices_like_the_figure_does():
    for work in (DOCUMENT, CHAT, REPOSITORY):
        for model, bill in pricing.published_gpu_bills(PUBLISHED, work).items():
            ours = pricing.modelled_gpu_bill(REAL, STARTS, Scenario(work, model))
            assert ours.total == pytest.approx(bill.total, rel=0.10)


def test_each_thing_moves_the_bill_the_right_way():
    def total(**changes):
        return pricing.modelled_gpu_bill(REAL, STARTS, Scenario(DOCUMENT).varied(**changes)).total

    middle = total()
    assert total(dollars_per_hour=4.0) == pytest.approx(2 * middle)
    assert total(top_k=1024) < middle < total(top_k=4096)
    assert total(index_heads=32) < middle < total(index_heads=128)
    assert total(hit_rate=1.0) == middle < total(hit_rate=0.5)
    assert total(opening=30_000) < middle < total(model=DENSE)


def test_a_tornado_begins_with_what_matters_most():
    case = Scenario(REPOSITORY)
    bars = pricing.tornado(
        lambda c: pricing.modelled_gpu_bill(REAL, STARTS, c).total,
        case,
        {"answer": (150, 450), "hit_rate": (0.5, 1.0), "top_k": (1024, 4096), "model": (DENSE, SPARSE)},
    )
    assert [bar.name for bar in bars][:2] == ["hit_rate", "model"]
    assert [bar.spread for bar in bars] == sorted((bar.spread for bar in bars), reverse=True)
    assert bars[0].costs[1] == pricing.modelled_gpu_bill(REAL, STARTS, case).total
    assert case == Scenario(REPOSITORY)  # nothing was changed for good


def test_where_a_token_costs_more_than_it_brings():
    place = pricing.break_even(PUBLISHED["decode", DENSE], 0.42)
    assert place == pytest.approx((0.42 - 0.0705) / (2.1543 - 0.0705) * 131_071)
    assert pricing.break_even(PUBLISHED["decode", SPARSE], 0.42) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"turns": 0}, "turns 1 or more"),
        ({"answer": -1}, "lengths are 0 or more"),
        ({"hit_rate": 1.5}, "hit_rate=1.5 is a share"),
        ({"turns": 600}, "grows to 150,500 tokens and the context has 131,071"),
    ],
)
def test_what_cannot_be_is_refused(change, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        replace(CHAT, **change)


def test_a_case_can_move_only_what_there_is():
    with pytest.raises(TypeError, match="colour"):
        Scenario(CHAT, SPARSE).varied(colour="blue")
