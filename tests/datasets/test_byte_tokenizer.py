"""A text is its bytes: the round trip is exact in every script, and every token has a readable name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa.datasets import byte_tokenizer as tok

TEXTS = [
    "",
    "    if x:\n\treturn",
    "     five",
    "naïve café",
    "Ελληνικά",
    "привет мир",
    "深度求索は",
    "עברית",
    "नमस्ते",
    "👩‍🔬 e\u0301",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_of_known_texts(text):
    assert tok.decode(tok.encode(text)) == text


@settings(deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from(" \n\ta"), st.characters(codec="utf-8"))))
def test_round_trip_pieces_and_words_of_any_text(text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(0 <= i <= tok.INDENT for i in ids)  # a text never holds a key or a value
    assert int(tok.byte_count(torch.tensor(ids, dtype=torch.long)).sum()) == len(text.encode())
    names = tok.token_labels(ids)
    assert len(names) == len(ids) and all(name.strip() for name in names)
    spans = tok.words(ids)
    assert [w.start for w in spans] == [0, *[w.stop for w in spans]][: len(spans)]
    assert "".join(w.text for w in spans) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, tok.VOCAB - 1)))
def test_any_ids_have_a_text_and_names(ids):
    assert isinstance(tok.decode(ids), str)
    assert len(tok.token_labels(ids)) == len(ids)
    assert tok.decode(torch.tensor(ids, dtype=torch.long)) == tok.decode(ids)


def test_vocabulary_is_bytes_indent_keys_and_values():
    assert tok.VOCAB == 256 + 1 + 32 + 16
    assert tok.encode("    ") == [256] and tok.encode("é") == [0xC3, 0xA9]
    assert (tok.key(0), tok.key(31), tok.value(0), tok.value(15)) == (257, 288, 289, 304)


def test_pieces_name_what_cannot_be_seen():
    ids = [*tok.encode("é \n    \t\x07"), tok.key(7), tok.value(3), 0xE9]
    assert tok.token_labels(ids) == [
        "é 1/2", "é 2/2", "␣", "↵", "␣␣␣␣", "⇥", "0x07", "key 7", "value 3", "0xE9",
    ]  # fmt: skip
    assert tok.decode([tok.key(7), tok.value(3), 0xE9]) == "⟨K7⟩⟨V3⟩\ufffd"


def test_words_group_what_a_reader_calls_a_word():
    assert [w.text for w in tok.words(tok.encode("x_1 = café(नमस्ते)"))] == [
        "x_1", " ", "=", " ", "café", "(", "नमस्ते", ")",
    ]  # fmt: skip
    assert [w.text for w in tok.words(tok.encode("深度 e\u0301a"))] == ["深", "度", " ", "e\u0301a"]
    assert [w.text for w in tok.words([tok.key(1), tok.value(2), 97])] == ["⟨K1⟩", "⟨V2⟩", "a"]


def test_last_tokens_never_cut_a_character():
    ids = tok.encode("aé深")
    assert [tok.decode(tok.last_tokens(ids, n)) for n in range(1, 8)] == [
        "",
        "",
        "深",
        "深",
        "é深",
        "aé深",
        "aé深",
    ]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: tok.encode(b"raw"), TypeError, "decode bytes first"),
        (lambda: tok.encode("ab\ud800"), ValueError, "character 2"),
        (lambda: tok.decode([1, 305]), ValueError, "id 1 is 305.*0 to 304"),
        (lambda: tok.decode([-1]), ValueError, "id 0 is -1"),
        (lambda: tok.decode("text"), TypeError, "encode a text first"),
        (lambda: tok.decode([1.5]), TypeError, "1.5"),
        (lambda: tok.decode(torch.zeros(2, 3, dtype=torch.long)), TypeError, r"tokens\[0\]"),
        (lambda: tok.key(32), ValueError, "0 to 31"),
        (lambda: tok.value(-1), ValueError, "0 to 15"),
        (lambda: tok.last_tokens([1], 0), ValueError, "1 or more"),
    ],
)
def test_bad_input_is_named_with_its_remedy(call, error, words):
    with pytest.raises(error, match=words):
        call()
