"""The words of a model folder: text to ids and back, whatever tokenizer it was taught with.

Three kinds of folder are met. The course's own models read bytes (`byte_tokenizer`) and need no file. Any
other model brings its `tokenizer.json`, which the `tokenizers` package reads. One that was taught to converse also
brings a chat template, a Jinja text in `tokenizer_config.json` or `chat_template.jinja` that says how turns are
written; it is rendered in a sandbox, because it is a program that came with the weights. Both packages
are optional: `pip install 'dsa[chat]'`.

Ids are turned into text as they come (:class:`Detokenizer`): a character may be spread over several tokens, so the last
ones are held back until they spell something.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsa.datasets import byte_tokenizer
from dsa.datasets.token_ids import read_tokenizer_json

FILE, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
BROKEN = "\ufffd"  # what an unfinished character decodes to

Messages = Sequence[Mapping[str, str]]  # of "role" and "content"


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    Attributes:
        encode: text -> ids, without special tokens.
        decode: ids -> text, special tokens left out.
        special: "bos_token" and "eos_token" as text, where the folder names them.
        stops: ids that end an answer.
        begin: ids before a text that is no conversation.
        template: how a conversation is written; None for a model that only continues texts.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    special: Mapping[str, str]
    stops: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()
    template: str | None = None

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to be continued. Raises ValueError for an empty one."""
        ids = [*self.begin, *self.encode(text)]
        if not ids:
            raise ValueError("the prompt is empty: give at least one character to go on from")
        return ids

    def conversation(self, messages: Messages) -> list[int]:
        """The ids of a conversation whose next turn is the model's; without a template, its contents one by one."""
        if self.template is None:
            return self.prompt("\n".join(message["content"] for message in messages) + "\n")
        return self.encode(_render(self.template, messages, self.special))


class Detokenizer:
    """Text that grows as ids come in: `add(id)` returns what can be shown now, `rest()` what is left at the end.

    Only the ids since the piece before the last are decoded: some tokenizers write a token differently at the start.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.decode = tokenizer.decode
        self.ids: list[int] = []
        self.before, self.shown = 0, 0  # ids: what has been shown ends at `shown`, its last piece began at `before`

    def add(self, token: int) -> str:
        """Take one id; nothing is returned while a character is unfinished."""
        self.ids.append(token)
        new = self._new()
        if new.endswith(BROKEN):
            return ""
        self.before, self.shown = self.shown, len(self.ids)
        return new

    def rest(self) -> str:
        """What was held back."""
        new, self.shown = self._new(), len(self.ids)
        return new

    def _new(self) -> str:
        known = self.decode(self.ids[self.before : self.shown])
        return self.decode(self.ids[self.before :])[len(known) :]


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """Find the tokenizer of the model in `folder`.

    Raises:
        ValueError: if it has none, or its files cannot be read.
    """
    folder = Path(folder)
    if (folder / FILE).is_file():
        return _from_files(folder, vocab_size)
    if vocab_size == byte_tokenizer.VOCAB:
        return Tokenizer(byte_tokenizer.encode, byte_tokenizer.decode, {})
    raise ValueError(
        f"{folder} has no {FILE}, and vocab_size={vocab_size} is not that of the course's byte tokenizer "
        f"({byte_tokenizer.VOCAB}): put the model's own tokenizer files into the folder"
    )


def _from_files(folder: Path, vocab_size: int) -> Tokenizer:
    backend = read_tokenizer_json(folder / FILE)
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"{folder / FILE} has ids up to {largest}, but the model's vocab_size={vocab_size}: not its own"
        )
    settings = _settings(folder / SETTINGS)
    special = {name: text for name in ("bos_token", "eos_token") if (text := _text(settings.get(name)))}
    ids = {name: backend.token_to_id(text) for name, text in special.items()}
    template = folder / TEMPLATE
    return Tokenizer(
        encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: backend.decode(list(ids), skip_special_tokens=True),
        special=special,
        stops=tuple(ids[name] for name in ("eos_token",) if ids.get(name) is not None),
        begin=tuple(ids[name] for name in ("bos_token",) if ids.get(name) is not None),
        template=template.read_text("utf-8") if template.is_file() else settings.get("chat_template"),
    )


def _settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from error


def _text(token: Any) -> str | None:
    """A special token is written as a text, or as an object that has it as "content"."""
    return token.get("content") if isinstance(token, dict) else token


def _render(template: str, messages: Messages, special: Mapping[str, str]) -> str:
    """Fill in a chat template, as `transformers` does; ValueError if the template refuses or is broken."""

    def refuse(reason: str) -> None:
        raise ValueError(f"the model's chat template refuses this conversation: {reason}")

    try:
        from jinja2 import TemplateError  # optional: only a chat template needs it
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ValueError("the model's chat template needs the jinja2 package: pip install 'dsa[chat]'") from error
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        return environment.from_string(template).render(messages=list(messages), add_generation_prompt=True, **special)
    except TemplateError as error:
        raise ValueError(f"the model's chat template cannot be filled in ({error})") from error
