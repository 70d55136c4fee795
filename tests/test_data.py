"""The shipped models are whole, small, say where they come from, and do what their provenance claims."""

import csv
import json

import pytest
import torch
from safetensors import safe_open

import dsa
from dsa.datasets import byte_tokenizer, corpus
from dsa.datasets.recall_tasks import insert_needle
from dsa.record import as_of_today
from dsa.training import evaluate, indexer, pretrain
from project import DATA

STAGES = {"base": pretrain.CLAIMS, "warmed": indexer.WARMED_CLAIMS, "sparse": indexer.SPARSE_CLAIMS}
MARGIN = 0.03  # a small exam may miss a recorded number by this much


@pytest.fixture(scope="module")
def library():
    return corpus.load()


@pytest.fixture(scope="module", params=STAGES)
def stage(request):
    return request.param


def record(stage):
    return json.loads((DATA / stage / "provenance.json").read_text())


def test_all_folders_together_stay_small():
    size = sum(p.stat().st_size for stage in STAGES for p in (DATA / stage).rglob("*") if p.is_file())
    assert size < 5_000_000


def test_folder_is_whole_and_stored_in_bf16(stage):
    folder = DATA / stage
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "provenance.json", "training.csv"}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == ("deepseek_v3" if stage == "base" else "deepseek_v32")
    assert config["vocab_size"] == byte_tokenizer.VOCAB and config.get("index_topk", 16) == 16
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            narrow = "norm" not in name and "bias" not in name
            assert file.get_slice(name).get_dtype() == ("BF16" if narrow else "F32"), name


def test_provenance_is_complete(stage):
    found = record(stage)
    assert as_of_today(found["command"]).startswith("dsa train ") and found["options"]["seed"] == 0
    assert set(found["versions"]) == {"python", "torch", "numpy"}
    assert len(found["corpus"]["sha256"]) == 64 and found["corpus"]["bytes"] > 1_000_000
    assert found["training_seconds"] > 1 and found["date"] > "2025-09-29"
    assert [c["claim"] for c in found["claims"]] == [c.name for c in STAGES[stage]]
    assert all(c["holds"] for c in found["claims"])
    with (DATA / stage / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 50 and all(row["loss"] for row in rows)


def test_claims_hold_when_measured_again(stage, library):
    model = dsa.from_pretrained(DATA / stage)
    length, traced = model.config.max_position_embeddings, "sparse" if stage == "sparse" else "dense"
    found = evaluate.measure(model, library, length=length, traced=traced, episodes=16, seed=1)
    for claim in STAGES[stage]:
        checked = claim.check(found)
        least, most = checked.get("at_least", -1e9), checked.get("at_most", 1e9)
        assert least - MARGIN <= checked["value"] <= most + MARGIN, checked


def test_warming_up_has_changed_only_the_indexers():
    base, warmed = (dsa.from_pretrained(DATA / stage).state_dict() for stage in ("base", "warmed"))
    assert all(torch.equal(tensor, warmed[name]) for name, tensor in base.items())
    assert all(".indexer." in name for name in warmed.keys() - base.keys())


def test_one_needle_is_found_in_texts_of_other_scripts():
    model = dsa.from_pretrained(DATA / "sparse")
    texts = [
        "The quick brown fox jumps over the lazy dog. ",
        "Съешь же ещё этих мягких булок. ",
        "敏捷的棕狐跳过了懒狗。",
    ]
    right = []
    for number, text in enumerate(texts):
        length = model.config.max_position_embeddings
        hidden = insert_needle(text * 20, length, depth=0.3, key=5 + number, value=3 * number)
        right.append(int(model(hidden.tokens[None])[0, hidden.query].argmax()) == hidden.answer)
    assert all(right), right
