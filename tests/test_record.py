"""A record says where it comes from, and is neither half written nor written over."""

import argparse
import json

import pytest
import torch

from dsa import record


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
