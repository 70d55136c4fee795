"""The corpus is the reader's own library or own text, says what it read, and refuses what is no text."""

import hashlib
import sys
import types

import pytest
import torch

from dsa.datasets import byte_tokenizer, corpus


@pytest.fixture(scope="module")
def library():
    return corpus.load()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_library_says_what_was_read(library):
    assert library.size > corpus.LEAST_BYTES and len(library.sha256) == 64
    assert 0.01 < len(library.held_out) / len(library.train) < 0.2
    assert f"{library.size:,} bytes" in str(library) and library.sha256[:12] in str(library)
    assert f"{sys.version_info.major}.{sys.version_info.minor}." in library.source
    assert int(library.train.max()) == byte_tokenizer.INDENT and "def " in byte_tokenizer.decode(library.train[:5000])


def test_every_script_byte_is_seen_in_training(library):
    seen = set(library.scripts.tolist())
    assert set(range(0x80, 0xC0)) <= seen  # every continuation byte
    assert "深" not in byte_tokenizer.decode(library.train[:1000]) and len(library.scripts) > 50_000


def test_batches_follow_from_the_generator_alone(library):
    a, b = (library.batch(seeded(3), 4, 64) for _ in range(2))
    assert a.shape == (4, 64) and a.dtype == torch.long and torch.equal(a, b)
    assert not torch.equal(a, library.batch(seeded(4), 4, 64))
    assert library.batch(seeded(), 2, 32, "held_out").shape == (2, 32)


def test_own_folder_passes_over_binary_and_hidden_files(tmp_path):
    (tmp_path / "a.txt").write_text("privé\n" * 400)
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    own = corpus.load(tmp_path)
    raw = ("privé\n" * 400).encode()
    assert (own.files, own.size, own.sha256) == (1, len(raw), hashlib.sha256(raw).hexdigest())
    assert len(own.train) + len(own.held_out) == len(raw) and len(own.scripts) == 0
    assert corpus.load(tmp_path / "a.txt").sha256 == own.sha256


def test_many_files_are_split_by_name(tmp_path):
    for n in range(60):
        (tmp_path / f"{n}.md").write_text(f"<{n}>" * 20)
    own = corpus.load(tmp_path)
    train, held_out = byte_tokenizer.decode(own.train), byte_tokenizer.decode(own.held_out)
    sides = [(f"<{n}>" in train, f"<{n}>" in held_out) for n in range(60)]
    assert all(a != b for a, b in sides) and 0 < sum(b for _, b in sides) < 15


@pytest.mark.parametrize(
    ("name", "data", "error", "words"),
    [
        ("missing", None, FileNotFoundError, "missing does not exist"),
        ("empty.txt", b"", ValueError, "is empty"),
        ("image.png", b"\x89PNG\r\n\x1a\n\0\0", ValueError, "no UTF-8 text"),
        ("latin.txt", "é".encode("latin-1"), ValueError, "iconv"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, data, error, words):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=words):
        corpus.load(tmp_path / name)


def test_an_empty_folder_and_a_short_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        corpus.load(tmp_path)
    (tmp_path / "short.txt").write_text("twenty bytes of text")
    own = corpus.load(tmp_path)
    with pytest.raises(ValueError, match="18 tokens, one sequence needs 64"):
        own.batch(seeded(), 1, 64)
    with pytest.raises(ValueError, match="give more text"):
        own.require_length(64)


def test_too_large_a_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text" * 10)
    monkeypatch.setattr(corpus, "MOST_BYTES", 30)
    with pytest.raises(ValueError, match="40 bytes, more than 30"):
        corpus.load(tmp_path)


def test_a_stripped_library_falls_back_to_imported_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    modules = {
        "inspect": sys.modules["inspect"],
        "builtins": sys.modules["builtins"],
        "no": types.ModuleType("no"),
    }
    monkeypatch.setattr(corpus.sys, "modules", {**modules})
    stripped = corpus.load()
    assert stripped.files == 1 and stripped.source.startswith("modules imported") and stripped.size > 50_000
