"""The benchmarks ask what they say they ask, count per sequence, and their intervals are Student's."""

from dataclasses import replace

import pytest
import torch

from course.experiments import benchmark_suite
from course.experiments.benchmark_suite import EvalSet
from dsa.datasets import byte_tokenizer
from tiny_training import tiny


@pytest.fixture(scope="module")
def eval_sets(text):
    return {
        name: (eval_set, mask)
        for eval_set in benchmark_suite.eval_sets(text, 256, 4)
        for name, mask in eval_set.asked.items()
    }


def test_there_are_fourteen_and_each_asks_something(eval_sets):
    assert len(eval_sets) == 14
    for name, (eval_set, mask) in eval_sets.items():
        assert mask.shape == eval_set.tokens.shape and not mask[:, 0].any(), name
        assert mask.any() == (name != "needle over 256 back"), name  # 256 tokens have no such distance


def test_needles_are_asked_at_their_distance(eval_sets):
    for name, (least, most) in benchmark_suite.DISTANCES.items():
        eval_set, mask = eval_sets[f"needle {name} back"]
        for row, place in mask.nonzero().tolist():
            before = eval_set.tokens[row, : place - 1]
            (first,) = (before == eval_set.tokens[row, place - 1]).nonzero()
            assert least <= place - 1 - (int(first) + 1) <= most  # from the question back to the value
            assert eval_set.tokens[row, first + 1] == eval_set.tokens[row, place]
    asked = sum(eval_sets[f"needle {name} back"][1] for name in benchmark_suite.DISTANCES)
    assert asked.sum(1).tolist() == [8] * 8


def test_every_distance_is_asked_once(text, monkeypatch):
    """Also those at the edge of two ranges."""
    found = benchmark_suite.Needles(text, 256, 8, 8, "held_out").generate(torch.Generator().manual_seed(0), 4)
    edges = torch.tensor([1, 64, 65, 128, 129, 256, 257, 300])
    edge = replace(found, source=found.query - edges)
    monkeypatch.setattr(benchmark_suite.Needles, "generate", lambda *_: edge)
    (eval_set,) = benchmark_suite._distances(text, 256, 4, torch.Generator())
    assert [int(mask.sum()) for mask in eval_set.asked.values()] == [8, 8, 8, 8]


def test_loads_ask_for_every_pair(eval_sets):
    for pairs in benchmark_suite.LOADS:
        eval_set, mask = eval_sets[f"{pairs} needles"]
        assert mask.sum(1).tolist() == [pairs] * 4
        assert (eval_set.tokens[mask] >= byte_tokenizer.FIRST_VALUE).all()


def test_what_is_repeated_has_stood_there(eval_sets):
    for name in ("text, again at once", "text, again far on", "random bytes, again"):
        eval_set, mask = eval_sets[name]
        back = eval_set.tokens.shape[1] - 32  # a passage is an eighth of 256
        assert mask.sum(1).tolist() == [32 - 8] * 4
        assert torch.equal(eval_set.tokens[:, back:], eval_set.tokens[:, :32])
        assert not mask[:, : back + 8].any()
        between = {"text, again far on": 128}.get(name, 0)
        assert eval_set.tokens.shape[1] == 2 * 32 + between


def test_shares_are_counted_by_sequence():
    model = tiny()
    tokens = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(1))
    asked = torch.zeros(3, 40, dtype=torch.bool)
    asked[0, 5:9] = asked[1, 39] = True
    found = benchmark_suite.evaluate_suite(model, [EvalSet(tokens, {"some": asked})], "dense", 8)["some"]
    model.attention = "dense"
    with torch.no_grad():
        says = model(tokens).argmax(-1)
    assert found[0] == (says[0, 4:8] == tokens[0, 5:9]).float().mean()
    assert found[1] == float(says[1, 38] == tokens[1, 39]) and found[2].isnan()


def test_the_attention_that_is_asked_for_is_used():
    model = tiny()
    tokens = torch.randint(256, (8, 60), generator=torch.Generator().manual_seed(1))
    asked = torch.ones(8, 60, dtype=torch.bool)
    for name, kind in (("dense", "dense"), ("window", "window")):
        model.attention, model.top_k = kind, 1
        with torch.no_grad():
            right = model(tokens)[:, :-1].argmax(-1)
        own = EvalSet(torch.cat([tokens[:, :1], right], 1), {"all": asked})  # what it says to another text, as an exam
        model.attention = "dense"
        found = benchmark_suite.evaluate_suite(model, [own], kind, 1)["all"]
        with torch.no_grad():
            model.attention = kind
            wanted = (model(own.tokens)[:, :-1].argmax(-1) == own.tokens[:, 1:]).float().sum(1) / 59
        assert torch.allclose(found, wanted), name


def test_rows_pair_the_sequences():
    own, dense = torch.tensor([0.5, 0.75, float("nan")]), torch.tensor([0.25, 0.25, float("nan")])
    (row,) = benchmark_suite.rows({"a": own}, {"a": dense})
    assert row["right"] == 0.625 and row["over_dense"] == 0.375
    assert row["error"] == pytest.approx(torch.tensor([0.25, 0.5]).std().item() / 2**0.5, abs=1e-5)


def test_intervals_run_over_seeds():
    gaps = (0.01, 0.02, 0.06)
    rows = [{"benchmark": "a", "model": "dense", "right": 0.5, "over_dense": 0.0}] * 3
    rows += [{"benchmark": "a", "model": "x", "right": 0.5 + gap, "over_dense": gap} for gap in gaps]
    (line,) = benchmark_suite.differences(rows, "x")
    assert line["difference"] == pytest.approx(0.03) and line["model"] == pytest.approx(0.53)
    assert line["half"] == pytest.approx(4.30 * 0.026458 / 3**0.5, rel=1e-3) and line["noise"]
    worse = [row | {"over_dense": -0.05 - row["over_dense"]} for row in rows]
    assert not benchmark_suite.differences(worse, "x")[0]["noise"], "a loss is as certain as a gain"
    with pytest.raises(ValueError, match="1 seeds of 'x': an interval needs one of"):
        benchmark_suite.differences([rows[0], rows[3]], "x")


def test_a_length_without_room_is_refused(text):
    with pytest.raises(ValueError, match="length=128: the needles of the suite need 256"):
        benchmark_suite.eval_sets(text, 128)
