"""A record says where it comes from, and is neither half written nor written over."""

import argparse
import json
from importlib.util import find_spec

import pytest
import torch

from dsa import cli, record


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m some.benchmark")
    record.add_options(parser)
    return parser.parse_args(words)


def test_what_exists_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "new" / "record.json"
    record.check_free(parsed("--out", str(out)))
    record.write(out, {"rows": [1]})
    with pytest.raises(FileExistsError, match="exists: choose another --out, or --replace it"):
        record.check_free(parsed("--out", str(out)))
    record.check_free(parsed("--out", str(out), "--replace"))
    assert json.loads(out.read_text()) == {"rows": [1]}


def test_half_a_record_is_none(tmp_path):
    out = tmp_path / "record.json"
    record.write(out, {"rows": [1]})
    with pytest.raises(TypeError):
        record.write(out, {"rows": [1, 2], "cannot be written": object()})
    assert json.loads(out.read_text()) == {"rows": [1]} and list(tmp_path.iterdir()) == [out]


def test_the_origin_is_told():
    line = record.command("python -m some.benchmark", ["--out", "a.json", "--replace", "--keys", "8"])
    found = record.origin(line, "a processor", cuda=None)
    assert found["command"] == "python -m some.benchmark --out a.json --keys 8"
    assert found["versions"]["torch"] == torch.__version__ and {"python", "cuda"} < set(found["versions"])
    assert found["machine"] == "a processor" and len(found["date"]) == len("2025-09-29")


def test_a_command_is_told_before_it_works_that_its_file_exists(tmp_path, capsys):
    parser = argparse.ArgumentParser("python -m some.benchmark")
    record.add_options(parser, required=False)
    out = tmp_path / "record.json"
    options, line = record.parse(parser, ["--out", str(out)])
    assert options.out == out and line == f"python -m some.benchmark --out {out}"
    assert record.parse(parser, [])[0].out is None
    out.write_text("{}")
    with pytest.raises(SystemExit):
        record.parse(parser, ["--out", str(out)])
    assert "exists: choose another --out, or --replace it" in capsys.readouterr().err


def test_a_recorded_command_is_given_with_today_s_names_and_each_of_them_can_be_run():
    old = "python -m dsa.training.twins --work runs/seeds --out data/measurements/sparse_training.json"
    assert record.as_of_today(old) == old.replace("dsa.training.twins", "course.experiments.matched_runs")
    assert record.as_of_today("python -m dsa.cost.gpu --out a.json") == "dsa bench gpu --out a.json"
    assert record.as_of_today("python -m dsa.record x") == "python -m dsa.record x"
    for today in record.MOVED.values():
        name = today.removeprefix("python -m ")
        assert cli.find(name.split()[1:]) if name.startswith("dsa ") else find_spec(name), today
