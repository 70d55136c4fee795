"""The sweep moves one thing at a time, its record is whole, and what it says can be seen again in a short run."""

import json

import pytest
import torch

import dsa
import small
from course.experiments import activation, indexer_sweep
from course.experiments.indexer_sweep import AXES, DEFAULT, SweptVariant, VariantConfig
from dsa.record import as_of_today
from project import DATA
from tiny_training import tiny

RECORD = DATA / "measurements" / "indexer_sweep.json"


def test_each_recipe_differs_from_the_middle_in_one_thing_at_most():
    plan = indexer_sweep.variant_configs()
    assert plan[0] == DEFAULT and len(plan) == len(set(plan)) == 1 + sum(len(values) - 1 for values in AXES.values())
    for config in plan[1:]:
        assert sum(getattr(config, axis) != getattr(DEFAULT, axis) for axis in AXES) == 1


def test_the_middle_scores_as_the_model_does_and_a_narrower_rotation_does_not():
    model = tiny(dense=True)
    teacher = activation.teacher_batches(model, torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1)))
    plain = activation.IndexerVariant(model, "relu", DEFAULT.heads, DEFAULT.width, seed=3)(teacher)
    R = model.config.qk_rope_head_dim
    same, narrow = (SweptVariant(model, VariantConfig(rotary=rotary), 3)(teacher) for rotary in (R, 2))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, same, strict=True))
    assert not torch.allclose(plain[0], narrow[0], atol=1e-2)


def test_first_weights_are_larger_by_the_factor():
    model = tiny(dense=True)
    once, thrice = (SweptVariant(model, VariantConfig(rotary=8, first=first), 0) for first in (1, 3))
    for a, b in zip(once.parameters(), thrice.parameters(), strict=True):
        assert torch.allclose(a * (3 if a.ndim == 2 else 1), b)


@pytest.mark.parametrize("rotary", [0, 3, 64])
def test_an_impossible_rotation_is_refused(rotary):
    with pytest.raises(ValueError, match=f"rotary={rotary}: it must be even and lie in 2 ... 32"):
        SweptVariant(tiny(dense=True), VariantConfig(rotary=rotary), 0)


def test_variants_learn_at_their_own_rate(text):
    model = tiny(dense=True)
    variants = [SweptVariant(model, VariantConfig(rotary=8, rate=rate), 0) for rate in (1e-9, 1e-2)]
    before = [[p.detach().clone() for p in variant.parameters()] for variant in variants]
    activation.warm_up(model, variants, indexer_sweep.MixedNeedles(text, 64), steps=2, size=1)
    moved = [
        max(float((p.detach() - was).abs().max()) for p, was in zip(variant.parameters(), old, strict=True))
        for variant, old in zip(variants, before, strict=True)
    ]
    assert moved[0] < 1e-7 and moved[1] > 1e-3


def test_one_axis_of_a_record():
    runs = [
        {"heads": J, "width": 32, "rotary": R, "rate": 0.01, "first": 1, "seed": s, "kl": 10 * J + R + s / 10}
        for J, R in ((2, 16), (1, 16), (2, 2))
        for s in (0, 1)
    ]
    assert indexer_sweep.along_axis(runs, "heads", "kl") == {1: [26, 26.1], 2: [36, 36.1]}
    assert indexer_sweep.along_axis(runs, "rotary", "kl") == {2: [22, 22.1], 16: [36, 36.1]}
    with pytest.raises(ValueError, match="axis 'colour' was not swept: use one of heads"):
        indexer_sweep.along_axis(runs, "colour", "kl")


def test_the_command_writes_a_whole_record(tmp_path, text, monkeypatch):
    whole = indexer_sweep.sweep
    monkeypatch.setattr(indexer_sweep, "variant_configs", lambda: [DEFAULT])
    monkeypatch.setattr(indexer_sweep, "sweep", lambda *a, **k: whole(*a, **k, length=128, episodes=2))
    source, out = tmp_path / "a.txt", tmp_path / "record.json"
    source.write_text(small.LINES)
    command = [str(DATA / "base"), "--out", str(out), "--corpus", str(source), "--seeds", "5", "--steps", "2"]
    indexer_sweep.main(command)
    record = json.loads(out.read_text())
    assert record["options"]["seeds"] == [5] and [run["seed"] for run in record["runs"]] == [5]
    with pytest.raises(SystemExit, match="exists: choose another --out"):
        indexer_sweep.main(command)
    indexer_sweep.main([*command, "--replace"])


def test_the_record_says_where_it_comes_from_and_holds_every_run():
    record = json.loads(RECORD.read_text())
    assert as_of_today(record["command"]).startswith("python -m course.experiments.indexer_sweep data/base")
    assert record["date"] and record["versions"]["torch"] and len(record["corpus"]["sha256"]) == 64
    seeds = record["options"]["seeds"]
    for axis, values in AXES.items():
        assert {
            value: len(found) for value, found in indexer_sweep.along_axis(record["runs"], axis, "kl").items()
        } == dict.fromkeys(values, len(seeds))
    assert len(record["runs"]) == len(indexer_sweep.variant_configs()) * len(seeds)


@pytest.mark.slow
def test_a_short_run_sees_the_fatal_one_again(text):
    model = dsa.from_pretrained(DATA / "base")
    plan = [DEFAULT, VariantConfig(rotary=2), VariantConfig(first=16)]
    middle, fatal, large = indexer_sweep.sweep(model, text, plan, seeds=[0], steps=40, length=128, episodes=8)
    assert fatal["kl"] > 3 * middle["kl"] and large["kl_worst"] > 3 * middle["kl_worst"]
