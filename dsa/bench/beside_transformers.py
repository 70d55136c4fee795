"""A decode step of a whole model beside that of `transformers`, which scores every token densely and masks.

    dsa bench beside-transformers

Two models with random weights, the same in both programs. The *workbench* is the course's: three narrow layers, whose
step is Python between small operations. The other has four layers of width 512 and 2,048 tokens in its cache, of which
it keeps 256: there, what is not computed begins to count. A step is one more token from the cache, logits included:
ours as `dsa.generate` takes it, theirs as their `generate` does. Needs the `transformers` package.
"""

import tempfile
from collections.abc import Callable, Sequence

import torch

from dsa import record
from dsa.bench.timing import cpu_seconds
from dsa.checkpoint.load import from_pretrained
from dsa.checkpoint.save import save_pretrained
from dsa.generation.decode import next_logits
from dsa.io.command_line import Parser
from dsa.model.config import Config
from dsa.model.transformer import Transformer

ROOM = 4096  # tokens that the models may hold: a fast machine decodes many in one sample
WORKBENCH = Config.mini().replace(max_position_embeddings=ROOM)
WIDE = WORKBENCH.replace(
    hidden_size=512, num_hidden_layers=4, num_attention_heads=8, q_lora_rank=192, kv_lora_rank=128,
    qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, intermediate_size=1024, moe_intermediate_size=256,
    index_n_heads=4, index_head_dim=64, index_topk=256,
)  # fmt: skip
CASES = {"workbench, 200 tokens": (WORKBENCH, 200), "4 layers of 512, 2,048 tokens": (WIDE, 2048)}


def load_theirs(folder: str):
    """The folder as `transformers` reads it; ValueError where it is not installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ValueError("this comparison needs the transformers package: pip install transformers") from error
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def candidates(config: Config, length: int) -> dict[str, Callable[[], object]]:
    """A step of each program after a prompt of `length` tokens; every call reads one token more."""
    model = Transformer(config)
    model.reset_parameters(seed=0)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        ours, theirs = from_pretrained(folder), load_theirs(folder)
    tokens = torch.randint(config.vocab_size, (1, length + ROOM), generator=torch.Generator().manual_seed(0))
    cache = ours.new_cache(1, ROOM)
    next_logits(ours, tokens[:, :length], cache)
    past = theirs(tokens[:, :length], use_cache=True).past_key_values
    following = {name: iter(tokens[0, length:]) for name in ("dsa", "transformers")}

    def our_step() -> object:
        return next_logits(ours, next(following["dsa"]).view(1, 1), cache)

    @torch.no_grad()
    def their_step() -> object:
        return theirs(next(following["transformers"]).view(1, 1), past_key_values=past, use_cache=True).logits

    return {"dsa": our_step, "transformers": their_step}


def measure(repeats: int = 15) -> list[dict[str, object]]:
    """Median CPU milliseconds of a step, case by case, and how many times as long theirs takes."""
    rows = []
    for name, (config, length) in CASES.items():
        found = {who: 1e3 * seconds for who, seconds in cpu_seconds(candidates(config, length), repeats).items()}
        ratio = found["transformers"] / found["dsa"]
        rows.append({"case": name, **{who: round(ms, 3) for who, ms in found.items()}, "ratio": round(ratio, 2)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = Parser("dsa bench beside-transformers", description="Time a whole model's decode step in both programs.")
    parser.add_argument("--repeats", type=int, default=15)
    record.add_options(parser, required=False)
    options, command = record.parse(parser, argv)
    rows = measure(options.repeats)
    print(f"{'CPU ms a step':<32}{'dsa':>8}{'transformers':>14}{'ratio':>8}")
    for row in rows:
        print(f"{row['case']:<32}{row['dsa']:>8.2f}{row['transformers']:>14.2f}{row['ratio']:>8.2f}")
    if options.out:
        about = record.origin(command, record.processor())
        record.write(options.out, about | {"what": "CPU milliseconds of a decode step, medians", "rows": rows})


if __name__ == "__main__":
    main()
