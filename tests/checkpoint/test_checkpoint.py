"""A checkpoint is loaded whole or refused whole, and written whole or not at all.

Every way in which a folder can be damaged gives one error that names the file, the tensor, what was expected and what
was found, before any weight is read. What is written reads back bit for bit, in one file or in shards, and a write that
dies half-way leaves the old file as it was. Nothing is ever unpickled.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dsa
import small
from dsa.checkpoint import save
from dsa.checkpoint.index import CheckpointError
from dsa.io import files
from dsa.model.transformer import Transformer

SINGLE, INDEX = save.SINGLE, save.INDEX
NAME = "model.layers.1.self_attn.indexer.wk.weight"


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def model():
    return small.model()


@pytest.fixture
def folder(model, tmp_path):
    """A whole checkpoint in one file."""
    dsa.save_pretrained(model, tmp_path)
    return tmp_path


@pytest.fixture
def sharded(model, tmp_path, monkeypatch):
    """A whole checkpoint in many files."""
    monkeypatch.setattr(save, "SHARD_BYTES", 100_000)
    dsa.save_pretrained(model, tmp_path)
    return tmp_path


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# ---- what is written reads back


def test_one_file_reads_back_bit_for_bit(model, folder):
    back = dsa.from_pretrained(folder)
    assert same(model, back) and back.config == model.config and not back.training
    assert torch.equal(back(small.tokens(1, 20)), model(small.tokens(1, 20)))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", SINGLE]
    assert oct((folder / SINGLE).stat().st_mode)[-3:] == "644"


def test_shards_read_back_bit_for_bit(model, sharded):
    shards = sorted(p.name for p in sharded.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((sharded / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for s in shards for t in load_file(sharded / s).values())
    assert same(model, dsa.from_pretrained(str(sharded)))  # a path may be a string


def test_a_newer_checkpoint_replaces_an_older_one_of_another_kind(model, sharded, monkeypatch):
    (sharded / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(save, "SHARD_BYTES", 10**9)
    other = small.model(5)
    dsa.save_pretrained(other, sharded)
    assert sorted(p.name for p in sharded.iterdir()) == ["config.json", SINGLE, "tokenizer.json"]
    assert same(other, dsa.from_pretrained(sharded))


def test_old_style_configs_load(model, folder):
    def old_style(config):
        rope = config.pop("rope_parameters")
        config["rope_theta"], config["torch_dtype"] = rope.pop("rope_theta"), config.pop("dtype")
        config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}

    edit_json(folder / "config.json", old_style)
    assert dsa.from_pretrained(folder).config == model.config


def test_half_precision_is_stored_and_loaded_as_such(model, tmp_path):
    dsa.save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert all(kind == ("F32" if "norm" in n or "correction" in n else "BF16") for n, kind in kinds.items())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    wide, half = dsa.from_pretrained(tmp_path), dsa.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert wide.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert torch.equal(wide.lm_head.weight, half.lm_head.weight.float())
    assert torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16())
    dsa.save_pretrained(half, tmp_path / "again")
    assert same(half, dsa.from_pretrained(tmp_path / "again", dtype=torch.bfloat16))


def test_a_model_is_saved_as_it_is_set(tmp_path):
    model, tokens = small.model(), small.tokens(1, 40)
    model.top_k = 3
    dsa.save_pretrained(model, tmp_path)
    assert dsa.from_pretrained(tmp_path).top_k == 3
    model.attention = "dense"
    dsa.save_pretrained(model, tmp_path)
    back = dsa.from_pretrained(tmp_path)
    assert back.top_k == 128 and back.attention == "sparse" and model.config.index_topk == 6
    assert (back(tokens) - model(tokens)).abs().max() < 5e-5
    for stand_in in ("window", "random", "oracle"):
        model.attention = stand_in
        with pytest.raises(ValueError, match=f"attention='{stand_in}' cannot be written .* set model.attention to"):
            dsa.save_pretrained(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_a_dense_model_makes_a_v3_folder(tmp_path):
    model = small.model(sizes=small.config(**small.DENSE))
    dsa.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and "index_topk" not in config
    back = dsa.from_pretrained(tmp_path)
    assert same(model, back) and back.attention == "dense"


def test_a_multi_token_prediction_layer_is_passed_over(model, folder):
    extra = {
        "model.layers.3.eh_proj.weight": torch.ones(48, 96),
        "model.layers.3.embed_tokens.weight": torch.ones(61, 48),
    }
    edit_tensors(folder / SINGLE, lambda tensors: tensors.update(extra))
    assert same(model, dsa.from_pretrained(folder))


# ---- damage


def shrink(path, by=1000):
    path.write_bytes(path.read_bytes()[:-by])


def move(content, name, file):
    content["weight_map"][name] = file


def replace_tensor(tensor):
    return lambda folder: edit_tensors(folder / SINGLE, lambda tensors: tensors.update({NAME: tensor}))


DAMAGE_OF_ONE_FILE = {
    "wrong shape": (replace_tensor(torch.ones(3, 5)), [SINGLE, NAME, r"\(3, 5\)", r"expected \(16, 48\)"]),
    "FP8": (replace_tensor(torch.ones(16, 48).to(torch.float8_e4m3fn)), [SINGLE, NAME, "F8_E4M3", "found nowhere"]),
    "FP8 scale": (
        lambda f: edit_tensors(f / SINGLE, lambda t: t.update({NAME + "_scale_inv": torch.ones(1, 1)})),
        [SINGLE, NAME + "_scale_inv", "needs none: expected F8_E4M3"],
    ),
    "whole numbers": (replace_tensor(torch.ones(16, 48).int()), [SINGLE, NAME, "stored as I32, expected one of F64"]),
    "unknown tensor": (
        lambda f: edit_tensors(f / SINGLE, lambda t: t.update({"model.extra": torch.ones(2)})),
        [SINGLE, r"unknown tensor model\.extra of shape \(2,\)"],
    ),
    "missing tensor": (
        lambda f: edit_tensors(f / SINGLE, lambda t: t.pop(NAME)),
        [SINGLE, "1 tensors are missing", NAME, r"expected with shape \(16, 48\)"],
    ),
    "cut off": (lambda f: shrink(f / SINGLE), [SINGLE, r"\d+ bytes\) is not a whole safetensors", "fetch it again"]),
    "nearly empty": (lambda f: (f / SINGLE).write_bytes(b"abc"), [SINGLE, r"\(3 bytes\) is not a whole"]),
    "no weights": (lambda f: (f / SINGLE).unlink(), [SINGLE, "one of which must say", "no safetensors at all"]),
    "another name": (lambda f: (f / SINGLE).rename(f / "a.safetensors"), [SINGLE, r"a\.safetensors"]),
    "no config": (lambda f: (f / "config.json").unlink(), [r"config\.json is missing: it says the sizes of the model"]),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), [r"config\.json is not JSON"]),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), [r"config\.json holds list, expected"]),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), [r"config\.json is not JSON"]),
    "config refused": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(n_group=3)), ["multiple of n_group=3"],
    ),
    "config incomplete": (
        lambda f: edit_json(f / "config.json", lambda c: c.pop("v_head_dim")), [r"config\.json", "lacks v_head_dim"],
    ),
    "more layers": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_hidden_layers=4)),
        [SINGLE, r"model\.layers\.3\.", "found nowhere"],
    ),
    "broken index": (lambda f: (f / INDEX).write_text("{}"), ["index.json has no weight_map from tensor names"]),
}  # fmt: skip

DAMAGE_OF_SHARDS = {
    "missing shard": (
        lambda f: (f / shard(f, 2)).unlink(), [r"model-00002-of-\d+\.safetensors is missing: the index puts"],
    ),
    "cut off": (lambda f: shrink(f / shard(f, 2)), ["model-00002-of", "is not a whole safetensors file"]),
    "index elsewhere": (
        lambda f: edit_json(f / INDEX, lambda c: move(c, NAME, shard(f, 1))), ["model-00001-of", f"lacks {NAME}"],
    ),
    "index outside": (
        lambda f: edit_json(f / INDEX, lambda c: move(c, NAME, "../x.safetensors")),
        [INDEX, NAME, r"'\.\./x\.safetensors', expected a safetensors"],
    ),
    "index absolute": (
        lambda f: edit_json(f / INDEX, lambda c: move(c, NAME, "/etc/passwd")), [NAME, "'/etc/passwd', expected"],
    ),
    "index names nothing": (lambda f: edit_json(f / INDEX, lambda c: move(c, NAME, "")), [INDEX, NAME]),
    "index names the folder": (lambda f: edit_json(f / INDEX, lambda c: move(c, NAME, "..")), [INDEX, NAME]),
    "index incomplete": (
        lambda f: edit_json(f / INDEX, lambda c: c["weight_map"].pop(NAME)), ["1 tensors are missing", NAME],
    ),
    "index with unknown": (
        lambda f: edit_json(f / INDEX, lambda c: move(c, "model.extra", shard(f, 1))), [r"model\.extra"],
    ),
    "index empty": (
        lambda f: edit_json(f / INDEX, lambda c: c.update(weight_map={})), [INDEX, "are missing", "nowhere"],
    ),
    "no index": (lambda f: (f / INDEX).unlink(), [SINGLE, INDEX, "model-00001-of"]),
    "index no JSON": (lambda f: (f / INDEX).write_text("nonsense"), ["index.json is not JSON"]),
}  # fmt: skip


def shard(folder, number):
    return sorted(p.name for p in folder.glob("model-*.safetensors"))[number - 1]


def refused(folder, words, monkeypatch):
    """One CheckpointError with all the words, and no weight was read before it."""
    monkeypatch.setattr(Transformer, "to_empty", lambda *_, **__: pytest.fail("weights were allocated"))
    with pytest.raises(CheckpointError) as error:
        dsa.from_pretrained(folder)
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} is not said by: {error.value}"
    assert str(folder) in str(error.value) or words[0] in str(error.value)


@pytest.mark.parametrize("damage", DAMAGE_OF_ONE_FILE)
def test_a_damaged_file_is_refused(damage, folder, monkeypatch):
    harm, words = DAMAGE_OF_ONE_FILE[damage]
    harm(folder)
    refused(folder, words, monkeypatch)


@pytest.mark.parametrize("damage", DAMAGE_OF_SHARDS)
def test_damaged_shards_are_refused(damage, sharded, monkeypatch):
    harm, words = DAMAGE_OF_SHARDS[damage]
    harm(sharded)
    refused(sharded, words, monkeypatch)


def test_what_is_no_folder_is_refused(folder, monkeypatch):
    refused(folder / "nothing", ["nothing is not a folder"], monkeypatch)
    refused(folder / SINGLE, ["model.safetensors is not a folder"], monkeypatch)


# ---- writing


def fail_half_way(path):
    path.write_text("half")
    raise OSError("disk full")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail_half_way)
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    assert files.read_json(path, "something") == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


KILLED = """
import os, signal, sys
from pathlib import Path
from dsa.io.files import write_atomically
def write(partial):
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), write)
"""


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    done = subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert files.read_json(path, "something") == {"old": 1}


def disk_full_after(survivors, monkeypatch):
    """Let so many files be written, and fail at the next one."""
    written, right = [], files.write_atomically

    def write_atomically(path, write):
        if len(written) == survivors:
            raise OSError("disk full")
        written.append(path)
        right(path, write)

    for module in (save, files):  # the weights, the JSON
        monkeypatch.setattr(module, "write_atomically", write_atomically)


@pytest.mark.parametrize("survivors", [0, 1, 3, -2, -1])
@pytest.mark.parametrize("size", [100_000, 10**9], ids=["shards", "one file"])
def test_a_failed_save_never_leaves_a_mixture(survivors, size, sharded, monkeypatch):
    """Whatever file the disk fails at, the folder is then refused rather than half old, half new."""
    monkeypatch.setattr(save, "SHARD_BYTES", size)
    count = 2 if size == 10**9 else len(list(sharded.iterdir()))
    disk_full_after(survivors % count if survivors < 0 else min(survivors, count - 1), monkeypatch)
    with pytest.raises(OSError, match="disk full"):
        dsa.save_pretrained(small.model(7), sharded)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        dsa.from_pretrained(sharded)


def test_a_failed_save_over_one_file_of_the_same_config_leaves_the_old_model(model, folder, monkeypatch):
    disk_full_after(0, monkeypatch)
    with pytest.raises(OSError, match="disk full"):
        dsa.save_pretrained(small.model(7), folder)
    assert same(model, dsa.from_pretrained(folder))


def test_nothing_is_unpickled_anywhere():
    package = Path(dsa.__file__).parent
    for path in package.rglob("*.py"):
        found = re.search(
            r"torch\.(load|save)\(|import (pickle|shelve|marshal|joblib)|allow_pickle=True", path.read_text()
        )
        assert not found, f"{path.relative_to(package.parent)} uses {found.group()}"
