"""A conversation with a model folder, in a terminal or a notebook cell.

    dsa chat FOLDER

    chat = open_chat(FOLDER)
    for piece in chat.say("Which tokens do you keep?"):
        print(piece, end="")

How turns are written is the folder's affair (`tokenizers`): a model with a chat template answers, one without only
continues the text so far. The whole conversation is read anew at each turn, because a template may rewrite earlier
turns; what no longer fits the context is forgotten, oldest turn first. Under `torchrun` the first process listens for
all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from dsa.checkpoint.load import from_pretrained
from dsa.datasets import tokenizers
from dsa.datasets.tokenizers import Detokenizer, Tokenizer
from dsa.distributed import tensor_parallel
from dsa.generation import cli
from dsa.generation.generate import stream
from dsa.io.command_line import Parser, errors_in_a_sentence
from dsa.model.transformer import Transformer


@dataclass
class Chat:
    """A model, its words, and what has been said.

    Attributes:
        system: what a template puts before the conversation; empty for nothing.
        messages: the turns, each with "role" ("user" or "assistant") and "content".
    """

    model: Transformer
    words: Tokenizer
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> Iterator[str]:
        """Add a turn and answer it piece by piece; what has been yielded when the reader stops is the answer.

        Raises:
            ValueError: if the turn does not fit context or memory, or is empty and the model has no template.
        """
        turn = {"role": "user", "content": text}
        self.messages.append(turn)
        pieces: list[str] = []
        try:
            for piece in self._pieces(self._prompt()):
                pieces.append(piece)
                yield piece
        except ValueError:
            self.messages.pop()  # refused: as if it had not been said
            raise
        finally:
            if self.messages and self.messages[-1] is turn:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def forget(self) -> None:
        """Begin anew."""
        self.messages.clear()

    def _prompt(self) -> list[int]:
        """The conversation in ids, without the oldest turns if it is too long."""
        limit = self.model.config.max_position_embeddings - self.max_new_tokens
        while True:
            first = [{"role": "system", "content": self.system}] if self.system else []
            ids = self.words.conversation([*first, *self.messages])
            if len(ids) <= limit:
                return ids
            if len(self.messages) < 3:
                raise ValueError(
                    f"{len(ids)} tokens and an answer of up to {self.max_new_tokens} exceed the model's context of "
                    f"{self.model.config.max_position_embeddings}: say it shorter, or allow a shorter answer"
                )
            del self.messages[:2]

    def _pieces(self, prompt: list[int]) -> Iterator[str]:
        """The answer as text, as it comes."""
        text = Detokenizer(self.words)
        for token in self._tokens(prompt):
            if token in self.words.stops:
                break
            if piece := text.add(token):
                yield piece
        if piece := text.rest():
            yield piece

    def _tokens(self, prompt: list[int]) -> Iterator[int]:
        ids = torch.tensor([prompt], device=self.model.model.embed_tokens.weight.device)
        for token in stream(self.model, ids, self.max_new_tokens, self.temperature, self.seed, top_p=self.top_p):
            yield int(token)


def open_chat(folder: str | Path, **settings) -> Chat:
    """Load a folder to talk to; `settings` are those of `Chat`, errors those of both loaders."""
    model = from_pretrained(folder)
    return Chat(model, tokenizers.load_tokenizer(folder, model.config.vocab_size), **settings)


def talk(chat: Chat, read: Callable[[], str | None], write: Callable[[str], object]) -> None:
    """Read turns and write answers until `read` gives None; "/new" begins anew. A Ctrl-C stops an answer."""
    while (line := read()) is not None:
        if line.strip() == "/new":
            chat.forget()
            continue
        try:
            for piece in chat.say(line):
                write(piece)
        except KeyboardInterrupt:
            write(" …")
        except ValueError as error:
            write(f"({error})")
        write("\n")


def _listen() -> str | None:
    try:
        line = input("> ")
    except EOFError:
        return None
    return None if line.strip() == "/quit" else line


def heard_by_all(listen: Callable[[], str | None]) -> str | None:
    """What the first process hears, on every process."""
    if not dist.is_initialized():
        return listen()
    said = [listen() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(said)
    return said[0]


def _print(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, end="", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `dsa chat`."""
    about = "Talk to a model, in the turns of its chat template. /new begins anew, /quit ends, Ctrl-C stops an answer."
    parser = Parser("dsa chat", description=about)
    cli.options(parser).add_argument("--system", default="", metavar="TEXT", help="what to tell the model first")
    arguments = parser.parse_args(argv)
    with errors_in_a_sentence(), tensor_parallel.processes(arguments.device) as mesh:
        model = cli.load(arguments, mesh)
        words = tokenizers.load_tokenizer(arguments.folder, model.config.vocab_size)
        names = ("max_new_tokens", "temperature", "top_p", "seed", "system")
        settings = {name: getattr(arguments, name) for name in names}
        talk(Chat(model, words, **settings), lambda: heard_by_all(_listen), _print)


if __name__ == "__main__":
    main()
