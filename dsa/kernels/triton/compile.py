"""Machine code for a GPU that is not there, and what can be read off it.

`triton.compile` needs no GPU, only its name. So each kernel can be compiled on any Linux machine for exactly the
arguments with which it would be launched: the call is made with tensors on "meta", which have shapes and types but no
numbers, and a `Recorder` keeps it instead of launching it. From the machine code one sees what no interpreter tells:

* whether the matrix unit is used, and at which width (`HGMMA` for 16-bit, `QGMMA` for 8-bit numbers on Hopper);
* how many registers a thread takes, and whether some had to be spilled to memory, in the innermost loop of all places;
* how much shared memory a program takes: a kernel that wants more than there is does not start.

    python -m dsa.kernels.triton.compile                 all kernels at the real shape, for all three targets
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsa.kernels.triton.index_logits import index_logits, index_logits_fp8
from dsa.kernels.triton.launch import Kernel, Recorder, interpreted, viable_configs
from dsa.kernels.triton.sparse_attention import LatentKV, attend
from dsa.kernels.triton.sparse_backward import gradients
from dsa.kernels.triton.top_k import top_k

TARGETS = MappingProxyType({
    "sm_90": GPUTarget("cuda", 90, 32),  # Hopper: H100, H200, H800
    "sm_100": GPUTarget("cuda", 100, 32),  # Blackwell: B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # AMD Instinct MI300X
})  # fmt: skip
SHARED_LIMIT = MappingProxyType({"sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024})
POINTERS = MappingProxyType({
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv", torch.int64: "*i64", torch.int32: "*i32",
})  # fmt: skip
MMA = re.compile(r"\b([HQIU]\w*G?MMA|UTC\w*MMA|v_mfma_\w+)")  # instructions of the matrix unit


@dataclass(frozen=True)
class CompiledKernel:
    """What a compiled kernel says of itself."""

    kernel: str
    target: str
    tile: dict[str, Any]
    warps: int
    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes per program
    mma: dict[str, int]  # instructions of the matrix unit, by name
    assembly: str

    @property
    def fits(self) -> bool:
        """Whether the target has so much shared memory."""
        return self.shared <= SHARED_LIMIT[self.target]

    def __str__(self) -> str:
        sizes = [f"{name[6:]}={size}" for name, size in self.tile.items() if name != "BRANCH_SOFTMAX"]
        tile = " ".join([*sizes, *["branch"] * bool(self.tile.get("BRANCH_SOFTMAX"))])
        units = ", ".join(f"{count} {name}" for name, count in sorted(self.mma.items())) or "no matrix unit"
        room = f"{self.shared / 1024:.0f} KB{'' if self.fits else ' TOO MUCH'}"
        spills = f", {self.spilled} B spilled" if self.spilled else ""
        return (
            f"{self.kernel:25} {self.target:7} {tile:16} {self.warps} warps, {self.registers:3} registers{spills}, "
            f"{room}; {units}"
        )


def ast_source(kernel: Kernel, arguments: dict[str, Any], tile: triton.Config) -> ASTSource:
    """Say of each argument what the compiler may know: its type, whether it is 1, and whether 16 divides it."""
    function = kernel.function
    values = {**arguments, **tile.kwargs}
    constant = {p.name for p in function.params if p.is_constexpr}
    constant |= {name for name, value in values.items() if isinstance(value, int) and value == 1}
    signature = {name: "constexpr" if name in constant else _type(values[name]) for name in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if name not in constant and _divisible(values[name])
    }
    return ASTSource(function, signature, {name: values[name] for name in constant}, aligned)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


def _divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.itemsize % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def compile_call(kernel: Kernel, arguments: dict[str, Any], target: str, choice: int = 0) -> CompiledKernel:
    """Compile one recorded call.

    Args:
        kernel, arguments: what a `Recorder` kept.
        target: a key of TARGETS.
        choice: which of the kernel's tile sizes (of those that its types allow), the first by default.

    Raises:
        RuntimeError: if kernels are interpreted in this process.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 makes kernels Python: compile in a process that started without it")
    tile = viable_configs(kernel.configs, arguments, TARGETS[target].backend == "hip")[choice]
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    binary = triton.compile(ast_source(kernel, arguments, tile), target=TARGETS[target], options=options)
    read = _read_amd if "amdgcn" in binary.asm else _read_nvidia
    registers, spilled, assembly = read(binary.asm)
    mma = dict(Counter(name.split(".")[0] for name in MMA.findall(assembly)))
    return CompiledKernel(
        kernel.name, target, dict(tile.kwargs), tile.num_warps, registers, spilled, binary.metadata.shared, mma,
        assembly,
    )  # fmt: skip


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, str]:
    """Registers, bytes of stack and assembly, by the tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(asm["cubin"])
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run([tools / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1]
    return int(registers), int(stack), listing


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, str]:
    listing = asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", listing)
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", listing)
    return int(registers[1]) if registers else 0, 4 * int(spilled[1]) if spilled else 0, listing


# the calls that a layer makes at the real shape -----------------------------------------------------------------------


def _new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _scores(recorder: Recorder, dtype: torch.dtype, T: int, S: int) -> None:
    q, k, w = _new(1, T, 64, 128, dtype=dtype), _new(1, S, 128, dtype=dtype), _new(1, T, 64, dtype=torch.float32)
    if dtype == torch.float8_e4m3fn:
        index_logits_fp8(q, _new(1, T, 64, 1, dtype=torch.float32), k, _new(1, S, 1, dtype=torch.float32), w, recorder)
    else:
        index_logits(q, k, w, launcher=recorder)


def _attention(recorder: Recorder, dtype: torch.dtype, T: int, fp8: bool = False, splits: int = 1) -> None:
    S, selected = 131072, _new(1, T, 2048, dtype=torch.int64)
    kv = LatentKV.split(_new(1, S, 576, dtype=dtype), 512)
    if fp8:
        codes, scale = _new(1, S, 512, dtype=torch.float8_e4m3fn), _new(1, S, 4, dtype=torch.float32)
        kv = LatentKV(codes, _new(1, S, 64, dtype=dtype), scale)
    attend(_new(1, T, 128, 576, dtype=dtype), kv, selected, 0.135, splits, recorder)


def _backward(recorder: Recorder, dtype: torch.dtype) -> None:
    out, lse = _new(1, 4096, 128, 512, dtype=dtype), _new(1, 4096, 128, dtype=torch.float32)
    q, kv, selected = (
        _new(1, 4096, 128, 576, dtype=dtype),
        _new(1, 131072, 576, dtype=dtype),
        _new(1, 4096, 2048, dtype=torch.int64),
    )
    gradients(q, kv, selected, out, lse, out, 0.135, recorder)


CALLS: MappingProxyType[str, Callable[[Recorder], None]] = MappingProxyType({
    "index logits, FP8": lambda recorder: _scores(recorder, torch.float8_e4m3fn, 4096, 131072),
    "index logits, bf16": lambda recorder: _scores(recorder, torch.bfloat16, 4096, 131072),
    "top-k": lambda recorder: (top_k(_new(1, 4096, 131072, dtype=torch.float32), 2048, launcher=recorder), None)[1],
    "sparse attention, prefill": lambda recorder: _attention(recorder, torch.bfloat16, 4096),
    "sparse attention, fp32": lambda recorder: _attention(recorder, torch.float32, 4096),
    "sparse attention, FP8 cache": lambda recorder: _attention(recorder, torch.bfloat16, 1, fp8=True, splits=16),
    "sparse attention, backward": lambda recorder: _backward(recorder, torch.bfloat16),
})  # fmt: skip
"""Each makes one operation's calls at the sizes of DeepSeek-V3.2-Exp."""


def calls(name: str) -> list[tuple[Kernel, dict[str, Any]]]:
    """The kernels that an operation starts, with their arguments."""
    recorder = Recorder()
    CALLS[name](recorder)
    return recorder.calls


def main() -> None:
    """Print one line per kernel and target."""
    for name in CALLS:
        print(name)
        for kernel, arguments in calls(name):
            for target in TARGETS:
                print("  ", compile_call(kernel, arguments, target), flush=True)


if __name__ == "__main__":
    main()
