"""Texts for a model with a vocabulary of its own.

The course's models read bytes; a model from elsewhere was taught other tokens, and bytes would be noise to it that
merely happens to be in range. So its text comes in one of two ways: as ids made beforehand (arrays of whole numbers in
`.npy` or `.safetensors` files), or as plain text through the `tokenizer.json` that lies beside the model's weights,
which needs the `tokenizers` package (the extra `chat`: `pip install 'dsa[chat]'`).
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from dsa.datasets import byte_tokenizer
from dsa.datasets.corpus import Corpus

SUFFIXES = (".npy", ".safetensors")
_LINES = 500  # of text that the tokenizer gets at once


def token_files(path: str | Path | None) -> list[Path]:
    """The files of ids at ``path`` (one file, or those of a folder, by name); empty if anything else is there, too."""
    if path is None:
        return []
    path = Path(path)
    inside = sorted(file for file in path.glob("*") if not file.name.startswith("."))
    files = [path] if path.is_file() else inside
    return files if all(file.suffix in SUFFIXES and file.is_file() for file in files) else []


def load_token_ids(path: str | Path) -> Corpus:
    """The ids in the files at ``path`` one after the other; the last tenth is held out.

    Raises ValueError for a file that is no array of whole numbers from 0 up, or is damaged, or for no ids at all.
    """
    parts = [_read(file) for file in token_files(path)]
    if not any(map(len, parts)):
        raise ValueError(f"{path} holds no token ids: give .npy or .safetensors files with whole numbers in them")
    ids = np.concatenate(parts)
    stream, cut = torch.from_numpy(ids), len(ids) * 9 // 10
    sha256 = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
    return Corpus(str(path), stream[:cut], stream[cut:], stream[:0], len(parts), ids.nbytes, sha256)


def _read(file: Path) -> np.ndarray:
    """One file's ids in a row, int32; the arrays of a safetensors file by name."""
    try:
        arrays = load_file(file) if file.suffix == ".safetensors" else {"": np.load(file, allow_pickle=False)}
    except (SafetensorError, ValueError, EOFError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not an array of token ids that can be read ({error}): save it anew") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise ValueError(f"{file} {name} holds {array.dtype}, token ids are whole numbers: save it as int32")
        if array.size and not (array.min() >= 0 and array.max() < 2**31):
            raise ValueError(f"{file} {name} runs from {array.min()} to {array.max()}, token ids from 0 to 2**31 - 1")
    rows = [arrays[name].astype(np.int32).ravel() for name in sorted(arrays)]
    return np.concatenate(rows) if rows else np.empty(0, np.int32)


def read_tokenizer_json(path: str | Path) -> Any:
    """The ``tokenizers.Tokenizer`` in a ``tokenizer.json``; ValueError if it or the package cannot be had."""
    try:
        from tokenizers import Tokenizer  # optional: models that read bytes need no such file

        return Tokenizer.from_file(str(path))
    except ImportError as error:
        raise ValueError(
            f"{path} needs the tokenizers package: pip install 'dsa[chat]', or train on --corpus token ids (.npy)"
        ) from error
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer that can be read ({error})") from error


def encoder(path: str | Path) -> Callable[[bytes], Tensor]:
    """The tokenizer in a ``tokenizer.json``: UTF-8 bytes -> ids (n,) int32, without special tokens.

    Raises ValueError if the file cannot be read or the ``tokenizers`` package is missing.
    """
    tokenizer = read_tokenizer_json(path)

    def encode(data: bytes) -> Tensor:
        lines = data.decode("utf-8", "ignore").splitlines(keepends=True)  # a split may have cut a character
        pieces = ["".join(lines[first : first + _LINES]) for first in range(0, len(lines), _LINES)]
        encodings = tokenizer.encode_batch(pieces, add_special_tokens=False)
        return torch.tensor([token for encoding in encodings for token in encoding.ids], dtype=torch.int32)

    return encode


def retokenize(corpus: Corpus, encode: Callable[[bytes], Tensor]) -> Corpus:
    """The same text in the ids of another tokenizer."""
    streams = (corpus.train, corpus.held_out, corpus.scripts)
    train, held_out, scripts = (encode(raw_bytes(stream)) for stream in streams)
    return replace(corpus, train=train, held_out=held_out, scripts=scripts)


def raw_bytes(ids: Tensor) -> bytes:
    """The bytes that ids of our tokenizer (n,) stand for: the inverse of `byte_tokenizer.fold_indents`."""
    return (
        ids.masked_fill(ids == byte_tokenizer.INDENT, 255).to(torch.uint8).numpy().tobytes().replace(b"\xff", b"    ")
    )
