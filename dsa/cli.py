"""The console script `dsa`: what the package can do from a terminal, one sub-command for each.

    dsa inspect FOLDER
    dsa train indexer data/base --out runs/warmed
    torchrun --nproc-per-node 2 -m dsa train pretrain --optimizer adamw --out runs/base

A sub-command is the `main` of the module that does the work, and there is nothing here but the way to it: modules are
named in a table and imported when they are run. PyTorch alone takes seconds to import, and nobody who asks what there
is should wait for it. Every module can be run by itself, too: `python -m dsa.checkpoint.inspect FOLDER` is the same.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """A sub-command: the module and the function of it that takes the words after the sub-command's name."""

    summary: str
    module: str
    function: str = "main"


@dataclass(frozen=True)
class Group:
    """Sub-commands under one name."""

    summary: str
    commands: Mapping[str, "Command | Group"]


DSA: Command | Group = Group(
    "DeepSeek Sparse Attention: models that choose what they attend to",
    {
        "inspect": Command("what a checkpoint folder holds and needs, and whether it loads", "dsa.checkpoint.inspect"),
        "generate": Command("continue a text", "dsa.generation.cli"),
        "chat": Command("talk to a model in the terminal", "dsa.generation.chat"),
        "adopt": Command("give a dense model a lightning indexer", "dsa.training.indexer", "adopt_main"),
        "eval": Command("measure loss, recall and kept attention of a model", "dsa.evaluate"),
        "train": Group(
            "train a model, stage by stage",
            {
                "pretrain": Command("the dense base model", "dsa.training.pretrain"),
                "indexer": Command("its indexers (dense warm-up), or all with --sparse", "dsa.training.indexer"),
            },
        ),
        "bench": Group(
            "measure speed and memory on this machine",
            {
                "cpu": Command("one layer's attention by length, on the processor", "dsa.bench.cpu"),
                "decode": Command("one decoded token by length, on the processor", "dsa.bench.decode"),
                "beside-transformers": Command(
                    "a whole model's decode step beside transformers", "dsa.bench.beside_transformers"
                ),
                "indexer-loss": Command("the indexer's loss, forward and backward", "dsa.bench.indexer_loss"),
                "full-width": Command("layers of the published size, on the device at hand", "dsa.bench.full_width"),
                "gpu": Command("every Triton kernel, checked and timed on a GPU", "dsa.bench.gpu.__main__"),
            },
        ),
    },
)


def overview(name: str, group: Group) -> str:
    """The help text of a group: a line for each of its sub-commands."""
    widest = max(map(len, group.commands))
    lines = [f"  {word:{widest}}  {entry.summary}" for word, entry in group.commands.items()]
    title = f"{group.summary[0].upper()}{group.summary[1:]}."
    return "\n".join([f"usage: {name} COMMAND ...", "", title, "", *lines, "", f"More: {name} COMMAND --help"])


def find(words: Sequence[str]) -> tuple[str, Command | Group, list[str]]:
    """Go down the table as far as words lead: the name up to there, what it names, and the words that are left.

    Raises ValueError for a word that a group does not know.
    """
    name, entry, rest = "dsa", DSA, list(words)
    while isinstance(entry, Group) and rest and rest[0] not in ("-h", "--help"):
        word = rest.pop(0)
        if word not in entry.commands:
            raise ValueError(f"{name} has no command {word!r}: use one of {', '.join(entry.commands)}")
        name, entry = f"{name} {word}", entry.commands[word]
    return name, entry, rest


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the words name, or print what there is to choose from."""
    try:
        name, entry, rest = find(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    if isinstance(entry, Group):
        print(overview(name, entry))
    else:
        getattr(import_module(entry.module), entry.function)(rest)


if __name__ == "__main__":
    main()
