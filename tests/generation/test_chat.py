"""Any folder can be talked to: the course's bytes, and a real small tokenizer with its template and special tokens.

The tokenizer is trained here on the course's own text. What the template makes of a conversation is held against
`transformers`, token by token.
"""

import json

import pytest
from transformers import AutoTokenizer

import dsa
import small
from dsa.datasets import byte_tokenizer, tokenizers
from dsa.generation import chat, cli
from project import DATA

TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\n"
    "{{ bos_token }}{% for message in messages %}\n"
    "    {%- if message.role == 'system' %}{{ message.content }}\n"
    "    {%- elif message.role == 'user' %}<|User|>{{ message.content }}\n"
    "    {%- elif message.role == 'assistant' %}<|Assistant|>{{ message.content }}{{ eos_token }}\n"
    "    {%- else %}{{ raise_exception('no role ' ~ message.role) }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"]
TALK = [
    {"role": "system", "content": "You keep a lighthouse."},
    {"role": "user", "content": "Wie hoch? 高さは？"},
    {"role": "assistant", "content": "Forty metres."},
    {"role": "user", "content": "And the café? 🙂"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of its own vocabulary, as a reader would have one from elsewhere."""
    folder = tmp_path_factory.mktemp("model")
    library = pytest.importorskip("tokenizers")  # comes with transformers
    bytewise = library.pre_tokenizers.ByteLevel
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer, made.decoder = bytewise(add_prefix_space=False), library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=bytewise.alphabet(), show_progress=False
    )
    made.train([str(DATA / "texts/lighthouse.txt")], trainer)
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"__type": "AddedToken", "content": "<|begin|>"},
        "eos_token": "<|end|>", "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    dsa.save_pretrained(small.model(2, small.config(vocab_size=made.get_vocab_size(), yarn=None)), folder)
    return folder


@pytest.fixture
def words(folder):
    return tokenizers.load_tokenizer(folder, dsa.from_pretrained(folder).config.vocab_size)


def test_a_conversation_is_written_as_transformers_writes_it(folder, words):
    theirs = AutoTokenizer.from_pretrained(folder)
    for turns in (TALK, TALK[:2], TALK[1:2]):
        wanted = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert words.conversation(turns) == wanted
    assert words.encode("A lamp") == theirs.encode("A lamp", add_special_tokens=False)
    assert words.stops == (theirs.eos_token_id,) and words.prompt("A")[0] == theirs.bos_token_id


def test_text_streams_without_broken_characters_and_sums_to_the_whole(words):
    text = "Der Turm: 高さ 40 m, café 🙂!"
    ids = words.encode(text)
    assert len(ids) > len(text)  # some characters take several tokens
    stream = tokenizers.Detokenizer(words)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.rest() == text and "" in pieces
    assert not any(tokenizers.BROKEN in piece for piece in pieces)
    cut = tokenizers.Detokenizer(words)
    assert "".join(map(cut.add, ids[:-2])) + cut.rest() == words.decode(ids[:-2])  # an unfinished 🙂 at the end


def test_an_answer_is_what_generate_writes_up_to_the_stop_token(folder):
    told = chat.open_chat(folder, max_new_tokens=12)
    answer = "".join(told.say("Is the lamp lit?"))
    ids = told.words.conversation([{"role": "user", "content": "Is the lamp lit?"}])
    [whole] = dsa.generate(told.model, [ids], 12)
    new = whole[len(ids) :].tolist()
    assert answer == told.words.decode(new) and told.messages[-1] == {"role": "assistant", "content": answer}
    stopping = chat.open_chat(folder, max_new_tokens=12)
    stopping.words = tokenizers.Tokenizer(**(vars(stopping.words) | {"stops": (new[3],)}))
    assert "".join(stopping.say("Is the lamp lit?")) == told.words.decode(new[: new.index(new[3])])


def test_each_turn_sees_what_was_said_and_old_turns_are_forgotten_when_room_ends(folder):
    told = chat.open_chat(folder, max_new_tokens=6, system="Be short.")
    seen = []
    told._tokens = lambda prompt: seen.append(prompt) or iter([])
    for turn in ("one", "two", "three " * 20, "four " * 9, "five " * 9):
        assert "".join(told.say(turn)) == ""
    contents = ["".join(told.words.decode(ids)) for ids in seen]
    assert "one" in contents[1] and "two" in contents[1] and contents[1].startswith("Be short.")
    assert "one" not in contents[-1] and "five" in contents[-1] and contents[-1].startswith("Be short.")
    assert all(len(ids) + 6 <= 128 for ids in seen)
    told.forget()
    list(told.say("six"))
    assert "five" not in told.words.decode(seen[-1])


def test_what_does_not_fit_is_refused_and_not_remembered(folder):
    told = chat.open_chat(folder, max_new_tokens=100)
    with pytest.raises(ValueError, match="exceed the model's context of 128: say it shorter"):
        list(told.say("long " * 40))
    assert told.messages == []


def test_what_memory_refuses_is_not_remembered_either(folder, monkeypatch):
    told = chat.open_chat(folder, max_new_tokens=4)
    monkeypatch.setattr("dsa.generation.memory.free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="What would fit"):
        list(told.say("Is it lit?"))
    assert told.messages == []


def test_the_courses_own_models_go_on_with_bytes():
    told = chat.open_chat(DATA / "sparse", max_new_tokens=8)
    answer = "".join(told.say("def main():"))
    [whole] = dsa.generate(told.model, [byte_tokenizer.encode("def main():\n")], 8)
    assert answer == byte_tokenizer.decode(whole[len(byte_tokenizer.encode("def main():\n")) :])


def test_the_command_reads_lines_until_it_is_told_to_quit(folder, monkeypatch, capsys):
    lines = iter(["Is it lit?", "/new", "Is it lit?", "/quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.main([str(folder), "--max-new-tokens", "5", "--device", "cpu"])
    first, second, rest = capsys.readouterr().out.split("\n")
    assert first == second != "" and rest == "" and next(lines) == "never read"


def test_an_answer_can_be_stopped(folder, monkeypatch):
    told = chat.open_chat(folder, max_new_tokens=50)

    def stopped(prompt):
        yield from told.words.encode("Yes, but")
        raise KeyboardInterrupt

    told._tokens, lines, written = stopped, iter(["Is it lit?"]), []
    chat.talk(told, lambda: next(lines, None), written.append)
    assert "".join(written) == "Yes, but …\n" and told.messages[-1]["content"] == "Yes, but"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer that can be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("chat_template.jinja", "{% if %}", "chat template cannot be filled in"),
        ("chat_template.jinja", "{{ messages.__class__.__mro__ }}", "chat template cannot be filled in"),
        ("chat_template.jinja", "{{ raise_exception('no') }}", "chat template refuses this conversation: no"),
    ],
)
def test_broken_files_are_refused(folder, tmp_path, name, content, words):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text((folder / file).read_text())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        tokenizers.load_tokenizer(tmp_path, 400).conversation(TALK[1:2])


def test_a_tokenizer_of_another_model_and_none_at_all_are_refused(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"ids up to 399, but the model's vocab_size=61: not its own"):
        tokenizers.load_tokenizer(folder, 61)
    dsa.save_pretrained(small.model(), tmp_path)
    with pytest.raises(SystemExit, match=r"error: .* has no tokenizer\.json, and vocab_size=61 is not"):
        cli.main([str(tmp_path), "--prompt", "a", "--device", "cpu"])
    with pytest.raises(SystemExit, match="the prompt is empty"):
        cli.main([str(DATA / "sparse"), "--prompt", "", "--device", "cpu"])


def test_drawn_answers_follow_the_seed_and_top_p(folder):
    drawn = [{"temperature": 1.0, "seed": seed} for seed in (1, 1, 2)]
    settings = [*drawn, {"temperature": 1.0, "top_p": 1e-6}, {}]
    answers = ["".join(chat.open_chat(folder, max_new_tokens=9, **each).say("lit?")) for each in settings]
    assert answers[0] == answers[1] != answers[2]
    assert answers[3] == answers[4]  # the likeliest token only, and greedy
