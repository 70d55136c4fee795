"""The alphabet of the verifiable domains: 48 symbols, each its own token.

Ten digits, sixteen names, three pairs of brackets, and marks: padding and end, the mode (`T` to think, `D` to answer
directly), the five domains, and what the model says to a tool and the tool to the model.
"""

from collections.abc import Sequence

Ids = tuple[int, ...]

SYMBOLS = (
    "·", ".", "=", "T", "D", "Σ", "↓", "§", "✎", "⌕", "+", "?", "▸", "✓", "✗", ":",
    *"0123456789", *"abcdefghijklmnop", *"()[]{}",
)  # fmt: skip
VOCAB = len(SYMBOLS)
ID = {symbol: number for number, symbol in enumerate(SYMBOLS)}
PAD, END, ANSWER, THINK, DIRECT, ASK, RUN, PASSED, FAILED, COLON = (ID[symbol] for symbol in "·.=TD?▸✓✗:")
DIGITS, NAMES, BRACKETS = (tuple(ID[s] for s in group) for group in ("0123456789", "abcdefghijklmnop", "()[]{}"))
CLOSES = {ID[a]: ID[b] for a, b in ("()", "[]", "{}")}


def read(ids: Sequence[int]) -> str:
    """Ids as a line of symbols, padding left out."""
    return " ".join(SYMBOLS[i] for i in ids if i != PAD)


def write(text: str) -> Ids:
    """A line of symbols as ids; ValueError names one that does not exist."""
    unknown = [symbol for symbol in text.split() if symbol not in ID]
    if unknown:
        raise ValueError(f"symbol {unknown[0]!r} is not among the {VOCAB}: use {' '.join(SYMBOLS)}")
    return tuple(ID[symbol] for symbol in text.split())
