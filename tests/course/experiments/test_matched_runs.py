"""Twins differ in what attention may see and in nothing else, and the record of them is whole."""

import json

import pytest
import torch

import dsa
from course.experiments import benchmark_suite, matched_runs
from dsa.checkpoint.save import save_pretrained
from dsa.datasets import corpus
from dsa.datasets.recall_tasks import Needles
from dsa.record import as_of_today
from dsa.training.indexer import train_sparse
from dsa.training.pretrain import MixedNeedles
from project import DATA
from tiny_training import tiny

RECORD = DATA / "measurements" / "sparse_training.json"


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_sparse_way_is_the_sparse_stage(text):
    one, two = tiny(), tiny()
    two.top_k = 4
    found = matched_runs.continue_training(one, Needles(text, 64, 4, 4), "sparse", 4, steps=3, size=2)
    wanted = train_sparse(two, Needles(text, 64, 4, 4), steps=3, size=2, show=False)
    assert found.rows == wanted.rows
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in weights(two).items())


@pytest.mark.parametrize("kind", ["dense", "window"])
def test_another_way_leaves_the_indexers_and_moves_the_rest(text, kind):
    model = tiny()
    before = weights(model)
    run = matched_runs.continue_training(model, Needles(text, 64, 4, 4), kind, 4, steps=2, size=2)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and not any(".indexer." in name for name in moved)
    assert (model.attention, model.top_k, model.training) == (kind, 4, False) and len(run.rows) == 2


def test_all_ways_read_the_same_batches(text):
    seen = {}

    class Spy(MixedNeedles):
        def generate(self, generator, size):
            episodes = super().generate(generator, size)
            seen.setdefault(kind, []).append(episodes.tokens)
            return episodes

    for kind in ("sparse", "dense", "window"):
        matched_runs.continue_training(tiny(), Spy(text, 64), kind, 4, steps=2, size=2, seed=5)
    for kind in ("dense", "window"):
        assert all(torch.equal(a, b) for a, b in zip(seen["sparse"], seen[kind], strict=True))


def test_what_is_there_is_kept_and_what_is_missing_is_made(tmp_path, text, monkeypatch):
    monkeypatch.setattr(matched_runs.seed_study, "make", lambda work, seed: None)
    plan = matched_runs.Plan(steps=1, size=2, length=64)
    there = plan.folder(tmp_path, 0, "window")
    assert there.parts[-2:] == ("matched runs of 1 x 2 x 64", "window")
    for folder in (plan.folder(tmp_path, 0, "warmed"), there):
        save_pretrained(tiny(), folder)
    stamp = (there / "model.safetensors").stat().st_mtime_ns
    matched_runs.make(tmp_path, 0, text, plan)
    assert {path.name for path in there.parent.iterdir()} == set(matched_runs.TRAINED_WITH)
    assert (there / "model.safetensors").stat().st_mtime_ns == stamp
    few = dsa.from_pretrained(plan.folder(tmp_path, 0, "sparse 2"))
    assert (few.attention, few.top_k) == ("sparse", 2)


def test_a_sweep_names_every_chooser_and_k(text):
    rows = list(matched_runs.sweep(dsa.from_pretrained(DATA / "warmed"), text, ("sparse", "window"), swept=(1, 4)))
    assert [(row["attention"], row["top_k"]) for row in rows] == [
        ("dense", 256), ("sparse", 1), ("sparse", 4), ("window", 1), ("window", 4)
    ]  # fmt: skip
    assert rows[0]["recall"] > 0.9 > rows[3]["recall"]


def test_the_record_is_whole():
    record = json.loads(RECORD.read_text())
    assert as_of_today(record["command"]).startswith("python -m course.experiments.matched_runs --work runs/seeds")
    assert record["date"] and record["versions"]["torch"] and len(record["corpus"]["sha256"]) == 64
    seeds = record["options"]["seeds"]
    assert len(seeds) >= 3
    cells = {(row["seed"], row["model"], row["attention"], row["top_k"]) for row in record["sweep"]}
    assert (
        len(cells)
        == len(record["sweep"])
        == len(seeds)
        * sum(1 + len(choosers) * len(matched_runs.SWEPT_TOP_K) for choosers in matched_runs.SWEPT_ATTENTION.values())
    )
    for model in ("dense", "sparse", "window"):
        assert [row["seed"] for row in record["text"] if row["model"] == model] == seeds
    for model in ("sparse", "window"):
        assert len(benchmark_suite.differences(record["suite"], model)) == 14


@pytest.mark.slow
def test_a_cell_of_the_record_is_seen_again():
    record, library = json.loads(RECORD.read_text()), corpus.load()
    if library.sha256 != record["corpus"]["sha256"]:
        pytest.skip("another Python's library")
    found = list(matched_runs.sweep(dsa.from_pretrained(DATA / "warmed"), library, ("sparse",), swept=(2,)))[1]
    (same,) = [
        row
        for row in record["sweep"]
        if (row["seed"], row["model"], row["attention"], row["top_k"]) == (0, "warmed", "sparse", 2)
    ]
    assert found["bits"] == pytest.approx(same["bits"], abs=0.01)
    assert found["recall"] == pytest.approx(same["recall"], abs=0.03)
