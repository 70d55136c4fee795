"""What a model can still do when it selects: the command `dsa eval`.

    dsa eval data/sparse --top-k 8 --length 256

Measured on held-out text are the loss under every way to choose keys, the recall of needles hidden in that text where
the model's ids are our bytes, and for a model with indexers the share of dense attention's mass that the selected keys
hold, by layer. Dense attention and the oracle bound what an indexer can reach, window and random what it must beat.
The measures are those of :mod:`dsa.training.compare`, which takes them before and after a training.
"""

from collections.abc import Sequence
from pathlib import Path

from dsa import record
from dsa.checkpoint.index import read_config
from dsa.checkpoint.load import from_pretrained
from dsa.io.command_line import Parser, count, errors_in_a_sentence
from dsa.training import adopt, compare, indexer_data


def main(argv: Sequence[str] | None = None) -> None:
    """The command `dsa eval`: measure, print, and write where --out says so."""
    parser = Parser("dsa eval", description="Measure loss, recall and kept attention mass of a model, by who chooses.")
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="a model folder, with an indexer or without")
    add("--corpus", type=Path, metavar="PATH", help="a folder or file of UTF-8 text of your own")
    add("--length", type=count, metavar="L", help=f"tokens a sequence ({adopt.LENGTH}, or what the model reads)")
    add("--top-k", type=count, metavar="K", help="keys that each query keeps (as the folder says)")
    add("--sequences", type=count, metavar="N", default=compare.SEQUENCES, help=f"how many ({compare.SEQUENCES})")
    record.add_options(parser, required=False)
    options, command = record.parse(parser, argv)
    with errors_in_a_sentence():
        config = read_config(options.folder)
        length = adopt.length_of(config, options.length)
        data = indexer_data.load(options.folder, config.vocab_size, options.corpus, length)
        model = from_pretrained(options.folder)
        model.top_k = adopt.top_k_of(config, options.top_k, length)
        found = compare.measure(model, data, options.sequences)
        print(f"{options.folder}: {options.sequences} held-out sequences of {length} tokens, {model.top_k} keys kept")
        numbers = compare.summary(found, data)
        for name, value in numbers.items():
            print(f"{name:{max(map(len, numbers))}}  {value:9.4f}")
        for layer, share in enumerate(found.get("kept", {}).get("indexer", [])):
            print(f"{f'  in layer {layer}, indexer':{max(map(len, numbers))}}  {share:9.4f}")
        if options.out:
            settings = {"length": length, "top_k": model.top_k, "sequences": options.sequences}
            origin = record.origin(command, record.processor())
            record.write(options.out, origin | settings | {"corpus": data.corpus.describe(), "measures": found})
