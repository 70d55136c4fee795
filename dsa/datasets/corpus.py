"""What the models read: real text that is already on every reader's machine.

The standard library's own source is some nine million bytes of English and Python; nothing is downloaded
and nothing is committed. It differs from one Python version to the next, so a corpus reports its size and
sha256, and claims are asserted on generated tasks (:mod:`dsa.datasets.recall_tasks`), which are the same everywhere.
A reader can put any folder or file of text in its place.

The library is ASCII but for a few lines. A model trained on it alone has never seen half of the 256 bytes,
and a reader's Greek would be noise to it. So one training sequence in eight comes from a second stream,
``scripts``: the library's own lines in other scripts, and invented words in alphabets of Unicode's database.

A corpus is flat tensors of ids, and a sequence is a random window of one of them: no packing, no padding, no
document boundaries. That is what nanoGPT does, and at this size nothing more is worth its code.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
import sys
import sysconfig
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dsa.datasets import byte_tokenizer

LEAST_BYTES = 1_000_000  # a standard library with less source than this counts as stripped
MOST_BYTES = 200_000_000
SCRIPTS_SHARE = 1 / 8
_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}
_ALPHABETS = (
    "LATIN SMALL LETTER", "GREEK SMALL LETTER", "CYRILLIC SMALL LETTER", "ARMENIAN SMALL LETTER",
    "HEBREW LETTER", "ARABIC LETTER", "DEVANAGARI", "BENGALI LETTER", "TAMIL LETTER", "THAI CHARACTER",
    "GEORGIAN LETTER", "HIRAGANA LETTER", "KATAKANA LETTER", "CJK UNIFIED IDEOGRAPH", "HANGUL SYLLABLE",
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Text as ids, split into what is trained on and what is held out.

    ``train``, ``held_out`` and ``scripts`` (empty for a reader's own text) are 1-D int16 tensors of ids;
    ``files``, ``size`` (raw bytes) and ``sha256`` say what was read.
    """

    source: str
    train: torch.Tensor
    held_out: torch.Tensor
    scripts: torch.Tensor
    files: int
    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.source}: {self.files:,} files, {self.size:,} bytes, sha256 {self.sha256[:12]}"

    def describe(self) -> dict[str, object]:
        """What provenance records of the corpus."""
        return {"source": self.source, "files": self.files, "bytes": self.size, "sha256": self.sha256}

    def batch(self, generator: torch.Generator, size: int, length: int, split: str = "train") -> torch.Tensor:
        """Random windows of ``train`` (one in eight of ``scripts``) or of ``held_out``: (size, length) int64.

        Raises ValueError when the split is shorter than ``length``.
        """
        stream = {"train": self.train, "held_out": self.held_out}[split]
        rows = _windows(stream, generator, size, length, f"{split} part of {self.source}")
        if split == "train" and len(self.scripts) >= length:
            chosen = torch.rand(size, generator=generator) < SCRIPTS_SHARE
            foreign = _windows(self.scripts, generator, size, length, "scripts")
            rows = torch.where(chosen[:, None], foreign, rows)
        return rows  # (size, length)

    def require_length(self, length: int) -> None:
        """Raise ValueError now, not in the middle of a training, if sequences of ``length`` cannot be cut."""
        for split, stream in (("train", self.train), ("held_out", self.held_out)):
            if len(stream) < length:
                raise ValueError(_too_short(f"{split} part of {self.source}", len(stream), length))


def _windows(stream: torch.Tensor, generator: torch.Generator, size: int, length: int, what: str) -> torch.Tensor:
    if len(stream) < length:
        raise ValueError(_too_short(what, len(stream), length))
    starts = torch.randint(len(stream) - length + 1, (size,), generator=generator)
    return torch.stack([stream[s : s + length] for s in starts.tolist()]).long()  # (size, length)


def _too_short(what: str, has: int, needs: int) -> str:
    return f"the {what} has {has:,} tokens, one sequence needs {needs:,}: give more text or a smaller length"


def load(path: str | Path | None = None) -> Corpus:
    """The corpus of a reader's folder or file, or of the standard library when ``path`` is None.

    Raises FileNotFoundError, or ValueError for text that is empty, binary or too large.
    """
    return standard_library() if path is None else user_text(Path(path))


def standard_library() -> Corpus:
    """The source of the running standard library; of the imported modules where it has been stripped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files, foreign = _library_files(root) if root.is_dir() else ({}, [])
    source = f"standard library of Python {platform.python_version()}"
    if sum(map(len, files.values())) < LEAST_BYTES:
        files, source = _imported_modules(), f"modules imported by Python {platform.python_version()}"
    return _corpus(source, files, "\n".join([*foreign, *invented_words()]))


def _library_files(root: Path) -> tuple[dict[str, bytes], list[str]]:
    """ASCII sources by name, and the non-ASCII lines of all else (tests and their UTF-8 samples too)."""
    files: dict[str, bytes] = {}
    foreign: list[str] = []
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".txt", ".html") and p.is_file()):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "dist-packages/")):
            continue
        data = path.read_bytes()
        if not data.isascii():
            foreign += [line for line in _decode_utf8(data).splitlines() if not line.isascii()]
        elif path.suffix == ".py" and not _EXCLUDED & set(name.split("/")) and "_sysconfigdata" not in name:
            files[name] = data
    return files, foreign


def _decode_utf8(data: bytes) -> str:
    """The text of UTF-8 bytes, or the empty text for any other bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def _imported_modules() -> dict[str, bytes]:
    files = {}
    for name, module in sorted(sys.modules.items()):
        try:
            files[name] = inspect.getsource(module).encode("utf-8", "replace")
        except (OSError, TypeError, ImportError):  # built in, frozen without source, or a namespace
            continue
    return files


def invented_words(lines: int = 24, seed: int = 0) -> list[str]:
    """``lines`` of invented words for each of 15 alphabets, from Unicode 3.2 (the same everywhere)."""
    names = [(chr(i), unicodedata.ucd_3_2_0.name(chr(i), "")) for i in range(0xA0, 0xFB00)]
    generator = np.random.default_rng(seed)
    invented = []
    for alphabet in _ALPHABETS:
        letters = [letter for letter, name in names if name.startswith(alphabet)]
        letters = letters[:: 1 + len(letters) // 800]
        for _ in range(lines):
            words = [generator.choice(letters, size=generator.integers(1, 9)) for _ in range(8)]
            invented.append(" ".join("".join(word) for word in words))
    return invented


def user_text(path: Path) -> Corpus:
    """A reader's own file, or all the UTF-8 files below a folder (hidden and binary ones are passed over)."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder or a file of UTF-8 text")
    if path.is_file():
        files = {path.name: path.read_bytes()}
    else:
        relative = {p.relative_to(path): p for p in sorted(path.rglob("*")) if p.is_file()}
        visible = {name: p for name, p in relative.items() if not any(part.startswith(".") for part in name.parts)}
        size = sum(p.stat().st_size for p in visible.values())
        if size > MOST_BYTES:
            raise ValueError(f"{path} holds {size:,} bytes, more than {MOST_BYTES:,}; give a part of it")
        files = {name.as_posix(): p.read_bytes() for name, p in visible.items()}
    texts = {name: data for name, data in files.items() if b"\0" not in data and _decode_utf8(data)}
    if not texts:
        what = "is empty" if not any(files.values()) else "holds no UTF-8 text, only binary or other encodings"
        raise ValueError(f"{path} {what}; give UTF-8 text (iconv -f latin1 -t utf-8 turns one into the other)")
    return _corpus(str(path), texts, "")


def _corpus(source: str, files: dict[str, bytes], scripts: str) -> Corpus:
    train, held_out = _split(files)
    whole = b"".join(files[name] for name in sorted(files))
    return Corpus(
        source=source,
        train=_ids(train),
        held_out=_ids(held_out),
        scripts=_ids(scripts.encode("utf-8")),
        files=len(files),
        size=len(whole),
        sha256=hashlib.sha256(whole).hexdigest(),
    )


def _split(files: dict[str, bytes]) -> tuple[bytes, bytes]:
    """One file in twenty is held out, by the hash of its name; of fewer than 20 files the last tenth is."""
    if len(files) < 20:
        whole = b"\n".join(files[name] for name in sorted(files))
        cut = len(whole) * 9 // 10
        return whole[:cut], whole[cut:]
    held_out = {name for name in files if hashlib.sha256(name.encode()).digest()[0] < 13}
    parts = [[files[n] for n in sorted(files) if (n in held_out) == side] for side in (False, True)]
    return b"\n".join(parts[0]), b"\n".join(parts[1])


def _ids(data: bytes) -> torch.Tensor:
    folded = np.frombuffer(byte_tokenizer.fold_indents(data), dtype=np.uint8).astype(np.int16)
    return torch.from_numpy(np.where(folded == 255, np.int16(byte_tokenizer.INDENT), folded))
