"""Check and time every Triton kernel on a GPU, beside the strongest that PyTorch has, against its target: one command.

    dsa bench gpu --out data/measurements/gpu_kernels.json

It takes under ten minutes on one H200 and writes as it goes; a run that is killed keeps what it had. `correctness` and
`bench.timing` say what makes a result count, `cases` what is measured. The sizes are those of DeepSeek-V3.2-Exp.
"""

import json
import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dsa import record
from dsa.io.command_line import Parser

COMMAND = "dsa bench gpu"
GROUPS = (
    "machine", "index logits", "sparse prefill", "sparse decode", "index decode", "top-k", "backward",
    "layer, prefill", "layer, decode",
)  # fmt: skip


def need_gpu() -> torch.device:
    """The GPU, or one sentence saying that there is none."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "error: this measures a GPU and PyTorch sees none: run it where there is one, with torch's build for it"
        )
    return torch.device("cuda")


def about(out: Path) -> dict[str, Any]:
    """Where a record comes from."""
    import triton

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    cudnn = str(torch.backends.cudnn.version())
    versions = {"triton": triton.__version__, "cuda": torch.version.cuda, "cudnn": cudnn}
    what = "each Triton kernel, checked, then timed by the device's clock: two medians; DeepSeek-V3.2-Exp's sizes"
    return {**record.origin(f"{COMMAND} --out {out}", machine, **versions), "what": what}


def one_group(name: str, out: Path, device: torch.device) -> None:
    """Run one case in this process and keep what it finds."""
    from dsa.bench.gpu.cases import case_groups
    from dsa.bench.gpu.inputs import Inputs, Shape
    from dsa.bench.gpu.suite import Record, run_group
    from dsa.bench.timing import device_milliseconds

    torch.seed()  # new inputs each time
    run_group(case_groups(Shape())[name], Inputs(device), device_milliseconds, Record(out, about(out)).keep)


def all_groups(names: Sequence[str], out: Path) -> None:
    """Run each case in a process of its own, and write down which did not end well."""
    from dsa.bench.gpu.suite import Record, run_isolated

    broken = run_isolated(
        names, lambda name: [sys.executable, "-m", "dsa.bench.gpu", "--out", str(out), "--only", name]
    )
    kept = Record(out, about(out))
    for name, why in broken.items():
        print(f"{name}: {why}")
        kept.keep(f"{name}, broken off", {"candidates": {}, "failed": why})


def summary(out: Path) -> str:
    """One line for each target."""
    cases = json.loads(out.read_text("utf-8"))["cases"] if out.exists() else {}
    lines = []
    for name, case in cases.items():
        if "unit" in case:
            found = "-" if case["figure"] is None else f"{case['figure']:.3g}"
            marks = f"target {case['target']:<6g} minimum {case['minimum']:<6g}"
            lines.append(f"{name:32} {found:>9} {case['unit']:14} {marks} {case['verdict']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all, or some."""
    parser = Parser(COMMAND, description="Check and time the Triton kernels.")
    record.add_options(parser)
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="NAME", help=f"some of: {'; '.join(GROUPS)}")
    options = parser.parse_args(argv)
    device = need_gpu()
    if find_spec("triton") is None:
        raise SystemExit("error: the kernels need the triton package: pip install 'dsa[triton]'")
    if options.only and len(options.only) == 1:
        one_group(options.only[0], options.out, device)
        return
    if not options.only:
        try:
            record.check_free(options)
        except FileExistsError as error:
            parser.error(f"{error}, or --only NAME to measure one case of it again")
        options.out.unlink(missing_ok=True)
    all_groups(options.only or GROUPS, options.out)
    print(summary(options.out))


if __name__ == "__main__":
    main()
