"""The tokenizer: a text is its UTF-8 bytes, and nothing has to be learned, shipped or versioned.

Ids 0-255 are the raw bytes, so every text in every script has an encoding and every encoding has one text.
Id 256 stands for four spaces: source code is full of them, and folding them lets a window of 256 tokens
see a third more program. After these come the symbols of the needle task (:mod:`dsa.datasets.recall_tasks`): 32 keys
and 16 values. They have ids of their own, so no text of a reader can produce one.

The usual choice, byte pairs merged by frequency, gives shorter sequences, but its tokens straddle the things
a page wants to point at. Here a token is a byte and a *word* is a span of tokens (:func:`words`); both are
exact.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

BYTES = 256
INDENT = 256  # four spaces in one symbol
KEYS, VALUES = 32, 16
FIRST_KEY = INDENT + 1
FIRST_VALUE = FIRST_KEY + KEYS
VOCAB = FIRST_VALUE + VALUES

_NEVER_IN_UTF8 = b"\xff"
_NAMES = {32: "␣", 9: "⇥", 10: "↵", 13: "␍", INDENT: "␣␣␣␣"}

Ids = Iterable[int] | torch.Tensor


class Word(NamedTuple):
    """Tokens ``start`` to ``stop`` (exclusive) of a sequence, and the text they spell."""

    start: int
    stop: int
    text: str


def encode(text: str) -> list[int]:
    """The ids of a text: its UTF-8 bytes, each four spaces (from the left of a run) folded into one id.

    Raises TypeError for anything but a str, ValueError for a str that has no UTF-8 form (a lone surrogate).
    """
    if not isinstance(text, str):
        raise TypeError(f"encode takes a str, not {type(text).__name__}; decode bytes first: data.decode('utf-8')")
    return [INDENT if byte == 255 else byte for byte in fold_indents(utf8_bytes(text))]


def utf8_bytes(text: str) -> bytes:
    """The UTF-8 bytes of a text; ValueError names the place of a lone surrogate, which has none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is the lone surrogate {text[error.start]!a}, which UTF-8 "
            "cannot write; remove it, e.g. text.encode('utf-8', 'replace').decode('utf-8')"
        ) from None


def fold_indents(data: bytes) -> bytes:
    """UTF-8 bytes with each four spaces written as 255, a byte that UTF-8 never uses; 255 means id 256."""
    return data.replace(b"    ", _NEVER_IN_UTF8)


def decode(ids: Ids) -> str:
    """The text of the ids; ``decode(encode(text)) == text`` for every text.

    Keys and values read ``⟨K7⟩`` and ``⟨V3⟩``; bytes that form no character (cut or sampled) read
    ``\\ufffd``. Raises ValueError for an id outside 0 to 304.
    """
    return "".join(text for _, _, text in characters(check_ids(ids)))


def check_ids(ids: Ids) -> list[int]:
    """The ids as a list of int; TypeError or ValueError names the first that is not in the vocabulary."""
    if isinstance(ids, torch.Tensor):
        if ids.dim() != 1 or ids.is_floating_point():
            raise TypeError(
                f"ids must be a 1-D tensor of integers, not {ids.dtype} of shape {tuple(ids.shape)}; "
                "take one sequence of a batch: tokens[0]"
            )
        ids = ids.tolist()
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"ids must be integers, not a {type(ids).__name__}; encode a text first: encode(text)")
    checked = list(ids)
    for place, token in enumerate(checked):
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"id {place} is {token!r} of type {type(token).__name__}; ids must be integers")
        if not 0 <= token < VOCAB:
            raise ValueError(f"id {place} is {token}; ids of this tokenizer lie in 0 to {VOCAB - 1}")
    return checked


def key(number: int) -> int:
    """The id of needle key ``number`` (0 to 31)."""
    return FIRST_KEY + _in_range("key", number, KEYS)


def value(number: int) -> int:
    """The id of needle value ``number`` (0 to 15)."""
    return FIRST_VALUE + _in_range("value", number, VALUES)


def _in_range(what: str, number: int, count: int) -> int:
    if not 0 <= number < count:
        raise ValueError(f"{what} {number} does not exist; there are {count}, numbered 0 to {count - 1}")
    return number


def byte_count(tokens: torch.Tensor) -> torch.Tensor:
    """Raw bytes of each token, in the shape of ``tokens``: 4 for an indent, 0 for keys and values, else 1."""
    return (tokens <= INDENT).long() + 3 * (tokens == INDENT)


def token_labels(ids: Ids) -> list[str]:
    """One readable name per token, for labels: no empty, invisible or broken ones.

    ``a`` · ``␣`` · ``↵`` · ``␣␣␣␣`` · ``key 7`` · ``value 3`` · ``é 1/2`` and ``é 2/2`` for the two bytes
    of é · ``0x07`` for a control character · ``0xE9`` for a byte that is no part of a character.
    """
    ids = check_ids(ids)
    names: list[str] = []
    for start, stop, text in characters(ids):
        if stop - start > 1:
            names += [f"{_visible(text)} {n}/{stop - start}" for n in range(1, stop - start + 1)]
        else:
            names.append(_token_label(ids[start], text))
    return names


def _token_label(token: int, text: str) -> str:
    if token in _NAMES:
        return _NAMES[token]
    if token >= FIRST_VALUE:
        return f"value {token - FIRST_VALUE}"
    if token >= FIRST_KEY:
        return f"key {token - FIRST_KEY}"
    return text if 32 < token < 127 else f"0x{token:02X}"


def _visible(text: str) -> str:
    category = unicodedata.category(text)
    if category.startswith("M"):
        return "◌" + text  # a combining mark needs something to sit on
    return f"U+{ord(text):04X}" if category[0] in "CZ" else text


def characters(ids: list[int]) -> Iterator[tuple[int, int, str]]:
    """Each character, folded indent, needle symbol or stray byte in order: (first token, token after it, text)."""
    place = 0
    while place < len(ids):
        width, text = _character(ids, place)
        yield place, place + width, text
        place += width


def _character(ids: list[int], place: int) -> tuple[int, str]:
    token = ids[place]
    if token < 128:
        return 1, chr(token)
    if token == INDENT:
        return 1, "    "
    if token >= FIRST_KEY:
        return 1, f"⟨K{token - FIRST_KEY}⟩" if token < FIRST_VALUE else f"⟨V{token - FIRST_VALUE}⟩"
    width = 2 if token < 0xE0 else 3 if token < 0xF0 else 4  # by UTF-8's first byte
    if max(ids[place : place + width]) < BYTES:
        try:
            return width, bytes(ids[place : place + width]).decode("utf-8")
        except UnicodeDecodeError:
            pass
    return 1, "\ufffd"


def words(ids: Ids) -> list[Word]:
    """The words of a sequence, as spans that cover every token exactly once and in order.

    A run of letters and digits is a word, and so is a run of white space; every sign, every ideograph or
    kana (scripts that set no spaces), every key and every value is a word of its own. A combining mark
    stays with what it marks.
    """
    spans: list[Word] = []
    previous = ""
    for start, stop, text in characters(check_ids(ids)):
        kind = _character_class(text)
        mark = kind == "mark" and previous != "symbol"
        if spans and (mark or (kind == previous and kind in ("letters", "space"))):
            spans[-1] = Word(spans[-1].start, stop, spans[-1].text + text)
        else:
            spans.append(Word(start, stop, text))
        previous = previous if mark else kind  # a mark leaves its word open
    return spans


def _character_class(text: str) -> str:
    if text.isspace():
        return "space"
    if len(text) > 1:
        return "symbol"
    category = unicodedata.category(text)
    if category.startswith("M") or category == "Cf":
        return "mark"
    if "\u3040" <= text <= "\u30ff" or "\u3400" <= text <= "\u9fff" or "\U00020000" <= text <= "\U0003ffff":
        return "alone"
    return "letters" if text == "_" or category[0] in "LN" else "alone"


def last_tokens(ids: Ids, length: int) -> list[int]:
    """The last ``length`` tokens or a few less: cut between characters, never inside one."""
    if length < 1:
        raise ValueError(f"length must be 1 or more, not {length}")
    checked = check_ids(ids)
    start = max(0, len(checked) - length)
    while 0 < start < len(checked) and 0x80 <= checked[start] < 0xC0:
        start += 1
    return checked[start:]
