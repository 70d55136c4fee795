"""The table of several seeds holds what the runs' own provenance says, and the shipped models are its first row."""

import json
import shutil

import pytest

from course.experiments import seed_study
from dsa.io.files import UnreadableFile
from project import DATA

STAGES = ("base", "warmed", "sparse")


@pytest.fixture
def work(tmp_path):
    for stage in STAGES:
        shutil.copytree(DATA / stage, tmp_path / "0" / stage)
        shutil.copytree(DATA / stage, tmp_path / "1" / stage)
    path = tmp_path / "1" / "warmed" / "provenance.json"
    record = json.loads(path.read_text())
    record["measures"]["indexer"]["hit_rate_in_induction_layer"]["indexer"] = 0.5
    path.write_text(json.dumps(record))
    return tmp_path


def test_models_that_are_there_are_taken_and_the_extremes_are_found(work):
    out = work / "new" / "table.json"
    seed_study.main(["--work", str(work), "--out", str(out), "--seeds", "0", "1"])
    table = json.loads(out.read_text())
    assert [row["seed"] for row in table["rows"]] == [0, 1]
    assert table["least"]["hit_indexer"] == 0.5 and table["most"]["hit_indexer"] > 0.95
    assert set(table["rows"][0]) == {"seed", *seed_study.COLUMNS}


def test_a_missing_stage_is_trained_with_its_seed(work, monkeypatch):
    shutil.rmtree(work / "1" / "warmed")
    shutil.rmtree(work / "1" / "sparse")
    calls = []
    monkeypatch.setattr(seed_study.indexer, "main", calls.append)
    seed_study.make(work, 1)
    assert [call[-2:] for call in calls] == [["--seed", "1"], ["--seed", "1"]]
    assert calls[0][0] == str(work / "1" / "base") and "--sparse" in calls[1]


def test_a_folder_without_provenance_is_named(work):
    (work / "0" / "sparse" / "provenance.json").unlink()
    with pytest.raises(UnreadableFile, match=r"sparse/provenance\.json is missing"):
        seed_study.row(work, 0)


def test_the_recorded_table_begins_with_the_shipped_models():
    table = json.loads((DATA / "measurements" / "seeds.json").read_text())
    assert len(table["rows"]) >= 3
    shipped = json.loads((DATA / "sparse" / "provenance.json").read_text())
    assert table["rows"][0]["recall_indexer"] == shipped["measures"]["recall"]["sparse"]["all"]
    assert table["corpus"] == shipped["corpus"] and table["versions"] == shipped["versions"]
