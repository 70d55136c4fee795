"""What one step of the indexer's loss costs, forward and backward: closed form, autograd by chunks, autograd at once.

    dsa bench indexer-loss --out indexer_loss.json

The dense warm-up's loss (report Eq. 3) of one layer, its target on the latents as the model computes it. Sizes keep the
real model's proportions: 8 heads on 128 + 16 dimensions, an indexer of 4 x 32. Shown are CPU time and the peak of what
the allocator handed out beyond the inputs. The two rivals are the five-line way (a chunk of 128 rows, its graph,
`backward` at once) and the plain way, which keeps matrices of L x L and ends where memory does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsa import record
from dsa.bench.memory import peak_bytes
from dsa.bench.timing import cpu_seconds
from dsa.io.command_line import Parser, count
from dsa.kernels import ops, reference, tiled

LENGTHS = (1024, 2048, 4096, 8192)
WHOLE_UP_TO = 4096  # at 8192 tokens it would take 4 GB
HEADS, WIDTH, INDEX_HEADS, INDEX_WIDTH = 8, 128 + 16, 4, 32
Index = tuple[Tensor, Tensor, Tensor]  # queries, keys, head weights
COLUMNS = ("closed form", "by chunks", "at once")


def inputs(T: int) -> tuple[Index, Tensor, Tensor]:
    """The index factors, which need gradients, and attention's queries and shared keys."""
    J, W = INDEX_HEADS, INDEX_WIDTH
    index = torch.randn(1, T, J, W), torch.randn(1, T, W), torch.randn(1, T, J) * (J * W) ** -0.5
    for x in index:
        x.requires_grad_()
    return index, torch.randn(1, T, HEADS, WIDTH), torch.randn(1, T, 1, WIDTH)


def by_chunks(index: Index, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """A chunk of rows, its graph, and `backward` at once: autograd without L x L."""
    T = q.shape[1]
    total = torch.zeros(())
    for rows, seen in tiled.tiles(T, T, tiled.QUERY_TILE):
        parts = (index[0][:, rows], index[1][:, :seen], index[2][:, rows], q[:, rows], k[:, :seen])
        loss = reference.indexer_loss(*parts, scale) * ((rows.stop - rows.start) / T)
        loss.backward()
        total += loss.detach()
    return total


def candidates(T: int) -> dict[str, Callable[[], Tensor]]:
    """What is timed at T tokens: name -> a call that leaves gradients anew and returns the loss."""
    index, q, k = inputs(T)
    scale = WIDTH**-0.5

    def zero_grad() -> None:
        for x in index:
            x.grad = None

    def step(backend: str) -> Tensor:
        zero_grad()
        loss = ops.indexer_loss(*index, q, k, scale, backend=backend)
        loss.backward()
        return loss.detach()

    def chunks() -> Tensor:
        zero_grad()
        return by_chunks(index, q, k, scale)

    calls = {"closed form": lambda: step("tiled"), "by chunks": chunks, "at once": lambda: step("reference")}
    return {name: call for name, call in calls.items() if name != "at once" or T <= WHOLE_UP_TO}


def measure(lengths=LENGTHS, repeats: int = 5) -> dict[int, dict[str, dict[str, float]]]:
    """Length -> candidate -> median CPU seconds and peak megabytes over the inputs."""
    torch.manual_seed(0)
    table = {}
    for T in lengths:
        calls = candidates(T)
        peaks = {name: peak_bytes(call) / 1e6 for name, call in calls.items()}
        seconds = cpu_seconds(calls, repeats)
        table[T] = {name: {"seconds": seconds[name], "megabytes": peaks[name]} for name in calls}
    return table


def format_table(table: dict[int, dict[str, dict[str, float]]]) -> str:
    """The table and what it says."""

    def cell(row: dict, name: str) -> str:
        return f"{row[name]['seconds']:9.3f} s {row[name]['megabytes']:6.0f} MB" if name in row else f"{'-':>21}"

    lines = ["tokens " + "".join(f"{name:>21}" for name in COLUMNS) + "   (CPU time, peak memory over inputs)"]
    lines += [f"{T:>6} " + "".join(cell(row, name) for name in COLUMNS) for T, row in table.items()]
    whole, longest = max(T for T, row in table.items() if "at once" in row), max(table)

    def ratio(T: int, rival: str, unit: str) -> float:
        return table[T][rival][unit] / table[T]["closed form"][unit]

    lines += [
        "",
        f"At {whole} tokens autograd at once takes {ratio(whole, 'at once', 'seconds'):.1f} times as long as the "
        f"closed form and {ratio(whole, 'at once', 'megabytes'):.0f} times its memory. At {longest} autograd by chunks "
        f"takes {ratio(longest, 'by chunks', 'seconds'):.1f} times as long and "
        f"{ratio(longest, 'by chunks', 'megabytes'):.1f} times the memory, and the closed form needs "
        f"{table[longest]['closed form']['megabytes']:.0f} MB.",
    ]
    return "\n".join(lines)


def rows(table: dict[int, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """The table as it is recorded."""
    return [
        {"tokens": T, "way": name, **{unit: round(number, 4) for unit, number in found.items()}}
        for T, row in table.items()
        for name, found in row.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `dsa bench indexer-loss`."""
    parser = Parser("dsa bench indexer-loss", description="Time the indexer's loss by length.")
    parser.add_argument("--lengths", type=count, nargs="+", default=list(LENGTHS), metavar="L", help="tokens")
    parser.add_argument("--repeats", type=count, metavar="N", default=5, help="samples of which the median counts (5)")
    record.add_options(parser, required=False)
    options, command = record.parse(parser, argv)
    table = measure(options.lengths, repeats=options.repeats)
    print(format_table(table))
    if options.out:
        about = record.origin(command, record.processor())
        what = (
            f"CPU seconds, medians, and peak megabytes over the inputs; {HEADS} heads of {WIDTH}, "
            f"{INDEX_HEADS} index heads of {INDEX_WIDTH}"
        )
        record.write(options.out, about | {"what": what, "rows": rows(table)})


if __name__ == "__main__":
    main()
