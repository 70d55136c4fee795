"""The Triton kernels on a real GPU: first whether they are right, then how fast, beside what the library offers.

Right means: on fresh random inputs, into memory that was full of NaN, within a small error of the fp32 reference; NaN
never passes. Only then is a kernel timed, by the device's own clock: median of many starts, inputs rotated so that
the cache on the chip does not hold them, and all of it twice, which shows the noise. Beside each kernel stands the
strongest thing that PyTorch has for the job, where it has one.

    python -m dsa.cost.gpu --out data/measurements/gpu_kernels.json
"""

import argparse
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dsa.kernels import fp8, ops, reference

Call = Callable[[int], object]
BF16, ROTATED = torch.bfloat16, 3


def need_gpu() -> torch.device:
    """The GPU, or one sentence saying that there is none."""
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU and PyTorch sees none: run it on a machine with CUDA or ROCm")
    return torch.device("cuda")


def error(found: Tensor, expected: Tensor) -> float:
    """The distance in units of the expected answer; infinite where one is NaN, or only one is -inf."""
    seen = expected > -torch.inf
    if not torch.equal(found > -torch.inf, seen) or found[seen].isnan().any():
        return float("inf")
    return float((found[seen].float() - expected[seen].float()).norm() / expected[seen].float().norm())


def errors(device: torch.device, kind: torch.dtype = BF16, size: int = 700, heads: int = 128) -> dict[str, float]:
    """Each kernel against the reference in fp32, on inputs that are new each time: {kernel: error}."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    J, K, few = 16, size // 3, 5
    q, k, w = (torch.randn(*s, device=device) for s in ((1, few, J, 128), (1, size, 128), (1, few, J)))
    codes = (*fp8.quantise(q), *fp8.quantise(k), w)
    from dsa.kernels.gpu.index_logits import index_logits_fp8  # only where there is Triton

    scores = fp8.index_scores(*codes)
    chosen = reference.select(scores, K)
    taken = ops.select(scores, K, backend="triton").sort(-1).values
    found = {
        "index scores, FP8": error(index_logits_fp8(*codes), scores),
        "top-k": float((taken != chosen.sort(-1).values).sum()),
    }
    x = torch.randn(1, few, heads, 576, device=device).to(kind).requires_grad_()
    kv = torch.randn(1, size, 576, device=device).to(kind).requires_grad_()
    slope = torch.randn(1, few, heads, 512, device=device)
    with torch.no_grad():
        split = ops.sparse_attention(x, kv, chosen, 0.06, 512, backend="triton")
    ours = ops.sparse_attention(x, kv, chosen, 0.06, 512, backend="triton")
    made = torch.autograd.grad(ours, (x, kv), slope.to(kind))
    exact = [tensor.detach().float().requires_grad_() for tensor in (x, kv)]
    right = ops.sparse_attention(exact[0], exact[1], chosen, 0.06, 512, backend="reference")
    wanted = torch.autograd.grad(right, exact, slope)
    torch.use_deterministic_algorithms(False)
    pairs = {"sparse attention": (ours, right), "sparse attention, split": (split, right)}
    pairs |= {"gradient of q": (made[0], wanted[0]), "gradient of kv": (made[1], wanted[1])}
    return found | {name: error(a.detach(), b.detach()) for name, (a, b) in pairs.items()}


def milliseconds(call: Call, repeats: int = 30) -> list[float]:
    """Median device time of a call, measured twice; `call(n)` is to use the n-th set of inputs."""
    medians = []
    for _ in range(2):
        for n in range(ROTATED):
            call(n)  # compile, choose tiles, warm up
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for number, (before, after) in enumerate(events):
            before.record()
            call(number % ROTATED)
            after.record()
        torch.cuda.synchronize()
        medians.append(median(before.elapsed_time(after) for before, after in events))
    return medians


def jobs(device: torch.device, S: int, T: int) -> dict[str, tuple[Call, float]]:
    """What is timed at the real shape: name -> (call, FLOP; 0 where bytes are what counts)."""
    from dsa.kernels.gpu.index_logits import index_logits_fp8

    def many(*shape: int, kind: torch.dtype = BF16) -> list[Tensor]:
        return [torch.randn(*shape, device=device, dtype=torch.float32).to(kind) for _ in range(ROTATED)]

    q8, k8 = many(1, T, 64, 128, kind=fp8.E4M3), many(1, S, 128, kind=fp8.E4M3)
    ones, w = torch.ones(1, T, 64, 1, device=device), torch.randn(1, T, 64, device=device)
    k_scale, scores = torch.ones(1, S, 1, device=device), many(1, T, S, kind=torch.float32)
    q, kv = many(1, T, 128, 576), many(1, S, 576)
    chosen = torch.randint(S, (1, T, 2048), device=device)
    rows, one = q8[0].view(-1, 128), torch.ones((), device=device)
    return {
        "index scores, FP8": (
            lambda n: index_logits_fp8(q8[n], ones, k8[n], k_scale, w),
            2 * 64 * 128 * T * (S - T / 2),
        ),
        "torch._scaled_mm, the products alone": (
            lambda n: torch._scaled_mm(rows[:65536], k8[n][0].T, scale_a=one, scale_b=one, out_dtype=BF16),
            2 * 128 * 65536 * S,
        ),
        "top-k": (lambda n: ops.select(scores[n], 2048, backend="triton"), 0),
        "torch.topk": (lambda n: scores[n].topk(2048, dim=-1), 0),
        "sparse attention": (
            lambda n: ops.sparse_attention(q[n], kv[n], chosen, 0.135, 512, backend="triton"),
            2 * 128 * 1088 * 2048 * T,
        ),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print and write."""
    parser = argparse.ArgumentParser("python -m dsa.cost.gpu", description="Check and time the Triton kernels.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--queries", type=int, default=2048)
    options = parser.parse_args(argv)
    device = need_gpu()
    wrong = errors(device)
    for name, distance in wrong.items():
        print(f"{name:40} error {distance:.1e}")
    if not all(distance < 2e-2 for distance in wrong.values()):
        raise SystemExit("a kernel is wrong: nothing was timed")
    rows = []
    for name, (call, flop) in jobs(device, options.keys, options.queries).items():
        times = milliseconds(call)
        rate = flop / min(times) / 1e9 if flop else None
        rows.append({"name": name, "milliseconds": times, "tflops": rate})
        print(f"{name:40} {times[0]:8.3f} {times[1]:8.3f} ms", f"{rate:6.0f} TFLOP/s" if rate else "")
    record: dict[str, Any] = {
        "command": f"python -m dsa.cost.gpu --keys {options.keys} --queries {options.queries}",
        "date": datetime.now(UTC).date().isoformat(), "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "errors": wrong, "runs": rows,
    }  # fmt: skip
    options.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
