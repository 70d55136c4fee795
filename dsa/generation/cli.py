"""A command: a folder and a prompt in, text out, on one process or several.

    dsa generate FOLDER --prompt "Once upon a time"
    torchrun --nproc-per-node 8 -m dsa generate FOLDER --prompt "Once upon a time"

Every rank computes every token, since all of them have the same logits; only the first one prints.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from dsa.checkpoint.load import from_pretrained
from dsa.datasets import tokenizers
from dsa.distributed import tensor_parallel
from dsa.generation.generate import generate
from dsa.io.command_line import Parser, errors_in_a_sentence
from dsa.model.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What every command that runs a model understands."""
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="a model folder: config.json, safetensors, tokenizer's files",
    )
    add("--max-new-tokens", type=int, default=256, metavar="N", help="how many tokens to add at most (256)")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token (the default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that reach P together")
    add("--seed", type=int, default=0, help="of the drawing, above temperature 0")
    add("--attention", choices=("sparse", "dense"), help="who chooses the keys; by default as the folder says")
    add("--top-k", type=int, metavar="K", help="how many keys each query keeps")
    add("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")
    add("--dtype", choices=tuple(DTYPES), help="of the matrices: by default bf16 on cuda, fp32 on the processor")
    add("--keep-fp8", action="store_true", help="leave FP8 weights as they are: less memory, slower")
    return parser


def load(arguments: argparse.Namespace, mesh=None) -> Transformer:
    """The model that the options ask for."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[arguments.dtype or ("bf16" if device == "cuda" else "fp32")]
    model = from_pretrained(arguments.folder, dtype, device, keep_fp8=arguments.keep_fp8, mesh=mesh)
    if arguments.attention:
        model.attention = arguments.attention
    if arguments.top_k is not None:
        model.top_k = arguments.top_k
    return model


def answer(arguments: argparse.Namespace, mesh) -> str:
    """What the model writes after the prompt."""
    model = load(arguments, mesh)
    words = tokenizers.load_tokenizer(arguments.folder, model.config.vocab_size)
    prompt = words.prompt(arguments.prompt)
    settings = (arguments.max_new_tokens, arguments.temperature, arguments.seed)
    [tokens] = generate(model, [prompt], *settings, top_p=arguments.top_p, stop=words.stops)
    return words.decode(tokens[len(prompt) :].tolist())


def main(argv: Sequence[str] | None = None) -> None:
    """The command `dsa generate`."""
    parser = options(Parser("dsa generate", description="Continue a text."))
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to go on from")
    arguments = parser.parse_args(argv)
    with errors_in_a_sentence(), tensor_parallel.processes(arguments.device) as mesh:
        text = answer(arguments, mesh)
        if mesh is None or dist.get_rank() == 0:
            print(arguments.prompt + text)


if __name__ == "__main__":
    main()
