# %% [markdown]
# # 08 Kernels: what does it take to really do less?
#
# A formula with fewer terms is not yet less work. Much code that is called sparse attention computes every score,
# throws most of them away, and takes as long as before. This chapter follows the numbers: which are read, how
# often, and what a chip could have computed meanwhile. Then it takes the kernels of this package apart (a *kernel*
# is a function that a chip runs in many copies at once), runs them on your laptop and compiles them for graphics
# processors that you may not have.
#
# **You will be able to**
# 1. count what a kernel reads and writes, and tell from that whether it can be fast;
# 2. read a Triton kernel line by line and run it without a GPU;
# 3. check in machine code whether the matrix unit does the work, and whether anything overflows.
#
# **You need** PyTorch, [04 Token selection](04_token_selection.ipynb) and, for one paragraph,
# [07 FP8](07_fp8.ipynb).
#
# **Afterwards**: `dsa/kernels/triton` from `index_logits.py` to `sparse_backward.py`. Computing: **50 s**.
#
# *Triton* is a language for kernels, written as Python. The first cell asks it to *interpret* kernels, step by step
# on the CPU. That must be said before Triton is loaded. Triton is made for Linux; elsewhere the cells that need it
# say so and the rest of the chapter works.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import inspect
import subprocess
import sys
from importlib.util import find_spec

import dsa
import matplotlib.pyplot as plt
import numpy as np
import torch
from course.exercises.tiled_attention import check
from course.figures import gpu_targets
from course.figures.full_model import read_record
from course.figures.traffic import Memory, draw_tiles, tile_traffic
from course.ui.claims import claim
from course.ui.panel import Choice, Panel, Slider, static_snapshots
from course.ui.predict import predict
from course.ui.reading import read_file
from course.ui.style import provenance, show, style

# %%
from dsa.analysis import roofline
from dsa.analysis.flops import (
    decode_traffic,
    index_pair_flops,
    mqa_pair_flops,
)
from dsa.datasets.byte_tokenizer import encode
from dsa.kernels import fp8, ops, reference
from dsa.model.config import Config
from torch.utils.flop_counter import FlopCounterMode

style()
TRITON = find_spec("triton") is not None
real = Config.v32_exp()
print("Triton is here" if TRITON else "no Triton for this system")

# %% [markdown]
# ## Masked is not sparse
#
# Two functions of this package compute the same thing. `reference` scores all S tokens and masks those that were
# not selected. `tiled` fetches the K selected ones and never looks at the others.

# %%
guess = predict(
    "S = 1,024 tokens, K = 64 of them selected. How many times fewer FLOP"
    " does the fetching version need?",
    2,
    low=1,
    high=100,
    form=".0f",
    unit="times",
)


# %%
def flops(backend, S, K):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 16, 8, 48, generator=generator)
    kv = torch.randn(1, S, 48, generator=generator)
    chosen = torch.arange(K).expand(1, 16, K)
    with FlopCounterMode(display=False) as counter:
        ops.sparse_attention(q, kv, chosen, 0.2, 32, backend=backend)
    return counter.get_total_flops()


masked = flops("reference", 1024, 64)
fetched = flops("tiled", 1024, 64)
guess.reveal(masked / fetched, "1,024 / 64: only fetching depends on K")

# %%
claim(
    "masked-flop-any-k",
    flops("reference", 1024, 1024) == masked,
    "the masked version needs the same FLOP for 64 and for 1,024 keys",
)
claim(
    "fetching-fewer-flop",
    masked == 16 * fetched == 16 * flops("tiled", 4096, 64),
    f"fetching needs {masked // fetched} times fewer, at any length",
    value=f"{masked // fetched} times",
)

# %% [markdown]
# Masking saves nothing; fetching saves {claim:fetching-fewer-flop}. A mask is good for one thing: it is a reference
# that is hard to get wrong.
#
# ## Fresh memory is slow memory
#
# Counting FLOP is not enough, not even on a CPU. A tensor that is created anew has no memory yet: the operating
# system hands out a page of it, and clears it, at the moment of the first write. That is a *page fault*. A loop
# that creates a large temporary in each step pays again each time; a loop that reuses a buffer pays once.


# %%
COUNTED = find_spec("resource") is not None  # not on Windows


def count():
    if not COUNTED:
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def faults(work, times=8):
    work()
    before = count()
    for _ in range(times):
        work()
    return count() - before


a = torch.ones(4096, 4096)  # 64 MB
buffer = torch.empty_like(a)
fresh = faults(lambda: a + a)
reused = faults(lambda: torch.add(a, a, out=buffer))

# %% tags=["nbval-ignore-output"]
print(f"page faults in 8 rounds: {fresh:,} fresh, {reused:,} reused")
if COUNTED:
    claim(
        "fresh-memory-faults",
        fresh > 10 * reused,
        "a fresh result faults, a buffer does not",
    )

# %% [markdown]
# ## Loops, tiles, buffers
#
# Each operation exists several times here. `loops` says it with plain indices, `reference` with whole matrices,
# `tiled` goes tile by tile, and `cpu` goes tile by tile in buffers that are made once. The last runs by default on a
# processor when no gradient is wanted. It scores up to 512 heads of queries against 1,000 keys or so in two megabytes,
# looks for the best K only in the K groups of 8 whose maxima are largest, and copies a few rows at a time to where the
# heads of a query share them. All give the same answer. How long do they take for it?
#
# We time a small layer that keeps the true proportions: 16 heads, 8 index heads, K = 256. One query sees 8,192 tokens.

# %%
guess = predict(
    "How many times as long as `cpu` do the loops take?",
    100,
    low=1,
    high=100_000,
    form=".0f",
    unit="times",
)

# %%
from functools import partial

from course.experiments.rejected_variants import sparse_layer
from dsa.bench import cpu
from dsa.bench.timing import cpu_seconds

small = cpu.SHAPES["s2"]()
many, single = (sparse_layer(small, n, 8192) for n in (64, 1))


def both_steps(given, backend):
    return given.attended(given.chosen(backend), backend)


with torch.no_grad():
    mine, theirs = (both_steps(many, b) for b in ("cpu", "reference"))
claim(
    "tiles-give-the-same",
    torch.allclose(mine, theirs, atol=1e-4),
    "tiles in buffers give what whole matrices give",
)

# %% tags=["nbval-ignore-output"]
took = {}
calls = {
    name: partial(both_steps, single if name == "loops" else many, name)
    for name in ("loops", "reference", "tiled", "cpu")
}
with torch.no_grad():
    for name, seconds in cpu_seconds(calls, repeats=2).items():
        took[name] = seconds / calls[name].args[0].q.shape[1]
        print(f"{name:9} {took[name] * 1e3:8.2f} ms a query")
guess.reveal(
    took["loops"] / took["cpu"],
    "a loop pays Python for each product; a tile pays once for thousands.",
)

# %%
claim(
    "loops-are-slow",
    took["loops"] > 50 * took["cpu"],
    "loops take more than 50 times as long",
)
claim(
    "matrices-are-slower",
    took["reference"] > 2 * took["cpu"],
    "whole matrices take more than twice as long as tiles",
)

# %% [markdown]
# (64 queries share a tile, and the loops get one.) The middle of this list matters more than its ends: from whole
# matrices to tiles *no formula has changed*.
#
# Now against dense attention, and against a fair one. Three things slow a dense baseline down without a word: values
# narrower than keys (the library then leaves its fused kernel), a mask for a chunk of a prompt, and small blocks of
# queries. None of them is done here (`dsa/kernels/cpu/dense.py`). One token at the end of a prompt, in one layer:

# %% tags=["nbval-ignore-output"]
for keys in (1024, 8192, 65_536):
    cost = cpu.token_seconds(small, "prefill", keys, 3)
    print(f"{keys:6,} keys:", end=" ")
    print(", ".join(f"{n} {x * 1e3:.2f} ms" for n, x in cost.items()))
ratio = cost["dense"] / cost["sparse"]
print(f"at {keys:,} dense over sparse: {ratio:.1f}")

# %%
claim(
    "sparse-faster-here",
    ratio > 1.8,
    "at 65,536 tokens sparse prefill is the faster one on this machine",
)

# %% [markdown]
# ## What was tried
#
# Most ideas do not help. Those for the processor are kept, a few lines each, in
# `notebooks/course/experiments/cpu_variants.py`, and are held against the reference like everything else. This is how
# one would write sparse attention first:

# %%
from course.experiments import cpu_variants

print(inspect.getsource(cpu_variants.four_lines))

# %% [markdown]
# And this is how all of them did. The figure is about {source:cpu_tried.what}. **Recorded**:
# {source:cpu_tried.machine}, {source:cpu_tried.date}, with `{source:cpu_tried.command}`.

# %%
import json
from pathlib import Path

from course.figures.cpu_variant_times import (
    draw_rejected_variants,
    rows_by_variant,
)

text = Path("../data/measurements/cpu_tried.json").read_text()
record = json.loads(text)
show(*draw_rejected_variants(record))

# %%
sparse, dense = (
    rows_by_variant(record, "sparse"),
    rows_by_variant(record, "dense"),
)
dearer = sparse["masked"]["seconds"] / dense["ours"]["seconds"]
claim(
    "masked-takes-longer",
    dearer > 2,
    f"masked sparse attention takes {dearer:.1f} times as long as dense",
    kind="recorded",
    value=f"{dearer:.1f} times",
)
unfair = dense["mask of a chunk"]["times"]
claim(
    "mask-slows-dense",
    unfair > 1.3,
    f"a mask alone makes dense attention {unfair:.1f} times as slow",
    kind="recorded",
    value=f"{unfair:.1f} times",
)

# %% [markdown]
# Read it from above. *Masked* is dearer than not being sparse at all, {claim:masked-takes-longer}. The *four lines*
# lose most of what they save to page faults, and so does everything that creates something of size T x S. *Fresh
# tensors* in tiles are smaller, and the allocator hands some of them out again; they still cost. Plain `topk` and
# groups of neighbours cost little, since choosing is cheap next to scoring. Narrower index vectors are faster on a
# machine that multiplies them fast, but round what is ranked: the model decides that ([07 FP8](07_fp8.ipynb)), not
# the kernel. Below, the baseline: whoever compares with a masked one gains {claim:mask-slows-dense} for nothing.

# %% [markdown]
# ## Reads, writes and the roofline
#
# A chip has two speeds: how many FLOP a second it computes, and how many bytes a second reach it. A kernel takes
# at least the longer of the two times. Their ratio is the chip's *ridge*, in FLOP a byte. A kernel that does
# fewer FLOP for each byte it moves waits for memory, however clever its arithmetic is.
#
# We take for an H200 790 TFLOP/s in bf16 and 4.3 TB/s, 80 % and nine tenths of what its maker promises, and two jobs
# at the real shape: attention, where a fetched row serves one, 64 or 128 heads, and index scores. What follows from
# these speeds is *modelled*. (Index scores are computed in FP8, twice as fast: their ridge is twice as far off.)

# %%
rates = roofline.H200
ridge = rates.mqa / rates.bandwidth
pair, latent = mqa_pair_flops(real), 2 * (512 + 64)
jobs = {
    "attention, one head a row": pair / 128 / latent,
    "attention, 64 heads a row": pair / 2 / latent,
    "attention, 128 heads a row": pair / latent,
    "index scores, one query": index_pair_flops(real) / 132,
}
for name, intensity in jobs.items():
    side = "arithmetic" if intensity > ridge else "memory"
    print(f"{name:27} {intensity:6.1f} FLOP a byte: {side}")
print(f"{'ridge of the chip':27} {ridge:6.1f}")

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.2))
x = np.logspace(0, 3, 100)
roof = np.minimum(x * rates.bandwidth, rates.mqa) / 1e12
ax.plot(x, roof, marker="", label="the roof", **provenance("modelled"))
marks = zip("os^D", (8, 13, 8, 6), jobs.items(), strict=True)
for mark, size, (name, at) in marks:
    height = min(at * rates.bandwidth, rates.mqa) / 1e12
    ax.plot([at], [height], mark, markersize=size, label=name)
ax.set(xscale="log", yscale="log", xlabel="FLOP a byte")
ax.set_ylabel("TFLOP/s at best")
ax.legend(fontsize=8)
one, many = (
    jobs["attention, one head a row"],
    jobs["attention, 128 heads a row"],
)
show(
    fig,
    f"From {one:.1f} FLOP a byte with one head to {many:.0f} with all"
    f" heads on one fetched row; the roof bends at {ridge:.0f}.",
)

# %%
claim(
    "heads-to-pay-a-row",
    many > ridge > 64 * one,
    f"a fetched row pays for itself only if it serves about"
    f" {ridge / one:.0f} heads",
    value=f"{ridge / one:.0f} heads",
)

# %% [markdown]
# This is why sparse attention works in the MQA mode of MLA, where all heads share one latent: a token that is fetched
# from anywhere in memory must serve {claim:heads-to-pay-a-row} to be worth its bytes from main memory. (Rows that
# several programs fetch at the same time come from the cache on the chip, which is faster; the model leaves that
# out.)

# %% [markdown]
# {exercise:tiled_attention.my_tile_reads}

# %% [markdown]
# {exercise:tiled_attention.my_gather}

# %% [markdown]
# ## Tiles
#
# A program keeps one tile of queries on the chip and lets keys pass by. The taller the tile, the fewer programs
# fetch the same rows again. Here are the two times for one query, modelled, over the number of heads in a tile.

# %%
Panel(
    draw_tiles,
    top_k=Slider("top-k", 64, 2048, 2048, step=64),
    heads=Choice("heads in a tile", [1, 16, 32, 64, 128], 64),
)

# %%
static_snapshots(draw_tiles, [{"heads": 16}, {"heads": 128}], columns=2)

# %%
short, tall = tile_traffic(2048, 16)[0], tile_traffic(2048, 128)[0]
claim(
    "few-heads-move-more",
    short > 6 * tall,
    f"16 heads a tile move {short / tall:.1f} times as many bytes as 128",
    value=f"{short / tall:.1f} times",
)

# %% [markdown]
# Taller is better until the registers are full. The answer of 128 heads is 128 x 512 numbers in fp32: 256 KB, as much
# as all registers of one of the chip's 132 processors. So our kernel takes 64.

# %% [markdown]
# {exercise:tiled_attention.my_attention}

# %% [markdown]
# ## Tokens or blocks?
#
# Hardware would rather fetch blocks of neighbouring tokens: one address, one copy. Other designs select blocks. What
# does a query lose if it may not choose single tokens? We ask the course's model, on its own text, and give every
# design the same budget of 16 tokens.

# %%
model = dsa.from_pretrained("../data/base")
ids = encode(read_file("../data/texts/lighthouse.txt"))[:256]
model.attention = "dense"
with torch.no_grad():
    _, trace = model(torch.tensor([ids]), trace=True)
mass = torch.stack([layer.mass[0, -64:] for layer in trace])
print(tuple(mass.shape), "layers, queries, keys")


# %%
def kept(block):
    blocks = mass.unflatten(-1, (-1, block)).sum(-1)
    return float(blocks.topk(16 // block).values.sum(-1).mean())


shares = {block: kept(block) for block in (1, 2, 4, 8, 16)}
fig, ax = plt.subplots(figsize=(6.4, 2.8))
ax.plot(
    shares.keys(), shares.values(), marker="o", **provenance("measured")
)
ax.set(xscale="log", xlabel="tokens in a block", ylabel="mass kept")
ax.set_xticks(list(shares), [str(block) for block in shares])
ax.minorticks_off()
show(
    fig,
    f"Of the last 64 queries' attention the best 16 tokens keep"
    f" {shares[1]:.0%}, the best block of 16 keeps {shares[16]:.0%}.",
)

# %%
claim(
    "tokens-against-blocks",
    shares[1] > shares[4] > shares[16],
    "single tokens keep"
    f" {100 * (shares[1] - shares[16]):.0f} points more of the mass",
    value=f"{100 * (shares[1] - shares[16]):.0f} points",
)

# %% [markdown]
# Tokens choose better: {claim:tokens-against-blocks} of the mass, at the same budget. The price is paid in tiles.
# Neighbouring queries choose different tokens, so a tile of rows can only be the *heads* of one query, never several
# queries. A block that 64 neighbouring queries share is fetched once for all of them. DeepSeek Sparse Attention
# (*DSA*) can afford single tokens because MLA has 128 heads on one key; a model with 8 heads would wait for memory.
#
# ## A kernel, line by line
#
# A Triton kernel is a Python function of which thousands of copies run, each with a number of its own. This one
# computes the index scores of chapter 07, codes in and scores out. It is the package's own.

# %%
if TRITON:
    from dsa.kernels.triton import index_logits

    source = inspect.getsource(index_logits.index_logits_kernel.fn)
    print("\n".join(source.splitlines()[:24]))

# %% [markdown]
# `tl.constexpr` marks what is known when the kernel is compiled. `tl.program_id` says who this copy is: BLOCK_S
# keys of one sequence, and BLOCK_T queries to meet them. The first loop treats queries that see none of these keys:
# -inf, and no product. In a prompt that is half of all pairs.

# %%
if TRITON:
    print("\n".join(source.splitlines()[24:]))

# %% [markdown]
# `tl.load` brings a tile of keys to the chip, once. The second loop brings one query after the other, all its heads.
# `tl.dot` is the matrix unit. Look at what does *not* follow it: no `tl.store` of the products. They are cut off at
# 0, weighted and summed where they lie, and one number in 64 is written.
#
# Now it runs. There is no GPU in this: each program is executed in turn, in NumPy.

# %%
generator = torch.Generator().manual_seed(0)
q = torch.randn(1, 24, 8, 128, generator=generator)
k = torch.randn(1, 80, 128, generator=generator)
w = torch.randn(1, 24, 8, generator=generator)
codes = (*fp8.quantize(q), *fp8.quantize(k), w)
expected = fp8.index_scores(*codes)
found = index_logits.index_logits_fp8(*codes) if TRITON else expected
seen = expected > -torch.inf
error = (found[seen] - expected[seen]).norm() / expected[seen].norm()
if TRITON:
    claim(
        "interpreted-scores",
        torch.equal(found > -torch.inf, seen) and error < 1e-6,
        "the interpreted kernel gives the reference's scores",
    )

# %% [markdown]
# ## The K best without sorting
#
# The selection is a *radix select*: find the K-th largest score digit by digit, then collect what is not below it. It
# needs scores as whole numbers that compare the same way. The bits of positive floats do already; negative ones
# must be turned over.

# %%
x = torch.tensor([-2.0, -1.0, -0.0, 0.0, 1.5, 700.0])
x = torch.where(x == 0, 0.0, x)  # -0 equals 0
bits = x.view(torch.int32).long() & 0xFFFFFFFF
codes32 = torch.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
print([f"{c:08x}" for c in codes32.tolist()])
claim(
    "codes-rise",
    bool((codes32.diff() >= 0).all()) and codes32[2] == codes32[3],
    "codes rise with the numbers, and both zeros are one",
)

# %% [markdown]
# The detail with the two zeros is easily missed. A head weight may be negative, and a negative number times 0 is
# -0. To a comparison it equals 0, to its bits it does not, and a tie would have been decided by a sign that nobody
# can see. Here is the kernel against the rule of chapter 04, ties included.

# %%
scores = reference.index_scores(q, k, w).round()
scores[0, -1, 10:30], scores[0, -1, 15:20] = 0.0, -0.0
backend = "triton" if TRITON else "tiled"
ours = ops.select(scores, 16, backend=backend)
rule = reference.select(scores, 16)
same = torch.equal(ours.sort(-1).values, rule.sort(-1).values)
if TRITON:
    claim(
        "radix-select-ties",
        same,
        "the radix select chooses as the rule does, ties included",
    )

# %% [markdown]
# ## Compiled for a GPU that is not here
#
# The interpreter says whether a kernel is right, not whether it is fast. The compiler knows more, and it needs no
# GPU, only the name of one. `dsa.kernels.triton.compile` makes machine code for the very arguments that one layer
# would pass at the real shape. Kernels cannot be interpreted and compiled in one process, so a second one does it.

# %%
PROGRAM = """
from dsa.kernels.triton import compile as aot
for name, target, choice in {jobs}:
    call = aot.calls(name)[0]
    code = aot.compile_call(*call, target, choice)
    unit = max(code.mma, key=code.mma.get, default="none")
    print(target, unit, code.spilled, code.shared // 1024, code.fits)
"""


def compiled(*jobs):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(jobs=jobs)],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    return [line.split() for line in made.stdout.splitlines()]


# %%
FP8, MLA = "index logits, FP8", "sparse attention, prefill"
machine = [["none"] * 5] * 5
if TRITON:
    machine = compiled(
        (FP8, "sm_90", 0), (FP8, "sm_100", 0), (MLA, "sm_90", 0),
        (MLA, "sm_90", 6), (MLA, "gfx942", 0),
    )  # fmt: skip
names = [FP8, FP8, MLA, MLA + ", 16 heads", MLA]
for name, row in zip(names, machine, strict=True):
    print(f"{name:36}", *row)

# %% [markdown]
# Each line: the GPU (`sm_90` Hopper, `sm_100` Blackwell, `gfx942` AMD's MI300X), the instruction that multiplies,
# bytes a thread spilled from registers to memory, kilobytes of shared memory, and whether that is as much as there
# is.

# %%
units = [row[1] for row in machine]
if TRITON:
    claim(
        "fp8-instruction",
        units[0] == "QGMMA",
        "on Hopper 8-bit codes multiply",
    )
    claim(
        "wide-instruction-no-spill",
        units[2] == "HGMMA" and machine[2][2] == "0",
        "64 heads get the wide 16-bit instruction, and nothing spills",
    )
    claim(
        "narrow-instruction",
        units[3] == "HMMA",
        "16 heads fall to the narrow one",
    )

# %% [markdown]
# The compiler found mistakes that the interpreter had accepted. The gradient of the latents was first written
# upright, 64 tokens by 512 numbers. It was right, and 7,328 bytes a thread would have overflowed into memory.
#
# It also showed work done twice. A program of 64 heads has eight warps, two groups, and each group multiplied all
# queries with all keys. The compiler deals rows out to warps, never columns, where the result of one product enters
# another, and 64 rows are enough for one group only. It does not look through a branch: behind an `if` that is always
# taken each group gets half of the keys. What was tried, for Hopper, recorded from the compiler:
#
# | kernel | tried | matrix instructions | spilled | shared memory | |
# |---|---|---|---|---|---|
# | sparse attention | 32 keys, both groups all keys | 74 | 0 B | 144 KB | left to the tuner |
# | | 128 heads a program | 40 | 1,728 B | 216 KB | dropped |
# | | only the products behind a branch | 38 | 0 B | 168 KB | dropped: they leave it by memory |
# | | products and softmax behind a branch | 38 | 8 B | 153 KB | |
# | | the same, addresses found inside the loop | 38 | 0 B | 153 KB | first choice |
# | | the same with 64 keys | 40 | 0 B | 233 KB | too much, but fits an FP8 cache |
# | its gradient of queries | both groups all keys | 140 | 152 B | 172 KB | dropped |
# | | behind a branch | 72 | 280 B | 180 KB | dropped |
# | | the same, addresses found inside the loop | 72 | 24 B | 180 KB | first choice |
# | its gradient of latents | both groups all keys | 172 | 96 B | 180 KB | dropped |
# | | behind a branch | 104 | 0 B | 180 KB | first choice |
# | index scores, FP8 | 128 keys, one group | 8 | 0 B | 40 KB | nothing is done twice |
#
# Half of the instructions need not be half of the time: on a GPU the tuner times both kinds and keeps the faster.
#
# Whether all this is fast only a GPU can say. On a machine with one, `make gpu` checks every kernel at full size and
# times it, beside the strongest that PyTorch has for the job and against targets that were set beforehand; the sizes of
# tiles that it tried stand in a table. Here is its record, or the sentence that stands in for it. (Rates that others
# published are in [09 Cost curves](09_cost_curves.ipynb).)

# %%
record = read_record("../data/measurements/gpu_kernels.json")
drawn = gpu_targets.draw_targets(record)
if record is None:
    print(drawn)
else:
    show(*drawn)
    print(gpu_targets.tiles(record))

# %% [markdown]
# ## Which hardware
#
# | hardware | backend here | how it is tested | besides |
# |---|---|---|---|
# | any CPU | `cpu`; with gradients `tiled` (both plain PyTorch) | run, against the loops | tries out its numbers |
# | NVIDIA Hopper, Blackwell | `triton` | interpreted; compiled for sm_90 and sm_100 | not run by us |
# | AMD MI300X (ROCm) | `triton`, smallest tiles | interpreted; compiled for gfx942 | not run, not tuned |
# | Apple silicon | `tiled` on `mps` | not run by us | Triton has no Metal backend |
# | Huawei Ascend (A2, A3) | none | not run by us | triton-ascend is a fork of Triton 3.2 for it |
# | Cambricon | none | not run by us | its makers adapted a branch of vLLM |
# | none (`meta`) | shapes only | run | for planning and compiling |
#
# An article about the release ([09](09_cost_curves.ipynb) weighs it) says that the code also supports chips of other
# makers. What that meant: Huawei's CANN team published kernels for both new operations, in Ascend C, PyPTO and
# TileLang, on the day of the release; Cambricon and Hygon announced adaptations of their own. The language the
# published kernels are written in, TileLang, has an Ascend branch. Our kernels would have to be taken to
# triton-ascend by someone who has the chip: it follows Triton 3.2, ours are tested with 3.7.1, and tile sizes are
# chosen for another memory. We have not tried.
#
# Processors differ as much. Narrow numbers are several times as fast as fp32 on one and slower on the next, and a name
# does not tell. So the backend `cpu` multiplies once in each kind when it first meets it
# (`dsa/kernels/cpu/matmul_speed.py`). A kind that is right and clearly faster is used as it is; any other is widened to fp32, with the same scores. Yours:

# %% tags=["nbval-ignore-output"]
from dsa.kernels.cpu.matmul_speed import SIDE, is_fast, matmul_seconds

for kind in (torch.float32, torch.bfloat16, torch.int8):
    rate = 2 * SIDE**3 / matmul_seconds(kind) / 1e9
    print(f"{kind}: {rate:.0f} billion a second, fast: {is_fast(kind)}")

# %% [markdown]
# Whatever the device, a backend says what it cannot do, and who can:

# %%
try:
    half = [x.bfloat16() for x in (q, k, w)]
    ops.index_scores(*half, backend="triton")
except ValueError as refusal:
    print(refusal)

# %%
empty = torch.empty(1, 4096, 128, 576, device="meta")
cache = torch.empty(1, 131072, 576, device="meta")
chosen = torch.empty(1, 4096, 2048, dtype=torch.long, device="meta")
shape = ops.sparse_attention(empty, cache, chosen, 0.1, 512).shape
claim(
    "shapes-without-numbers",
    tuple(shape) == (1, 4096, 128, 512),
    "tensors without numbers pass through at the real size",
)

# %% [markdown]
# ## Where it fails
#
# Sparse attention reads index keys of *all* tokens before it reads the latents of a few. When the text is short,
# that is more than dense attention reads.


# %%
def bytes_read(kind, keys):
    return decode_traffic(real, keys, kind, "deployed").cache


lengths = range(1, 8193)
cheaper = next(
    n for n in lengths if bytes_read("sparse", n) < bytes_read("dense", n)
)
claim(
    "bytes-cross",
    bytes_read("sparse", 2048) > bytes_read("dense", 2048),
    f"at 2,048 tokens sparse reads more; from {cheaper:,} on less",
    value=f"{cheaper:,}",
)

# %% [markdown]
# Below {claim:bytes-cross} tokens sparse decoding moves more bytes, and no kernel can mend that. A small K is the
# other case: with few keys a query the program spends its time on fetching the query and writing the answer.

# %%
few, many = tile_traffic(64, 64)[1], tile_traffic(2048, 64)[1]
claim(
    "flop-per-byte",
    few < ridge / 2 and many > 1.5 * few,
    f"with K = 64 a byte moved pays for {few:.0f} FLOP, with 2,048 for"
    f" {many:.0f}; the chip wants {ridge:.0f}",
)

# %% [markdown]
# ## What you have proved
#
# Masking saves nothing, fetching {claim:fetching-fewer-flop}, and fresh memory is paid for page by page. Tiles give what
# whole matrices give, sooner, and beat a fair dense baseline on a long text; most else that was
# tried does not. A fetched row must serve {claim:heads-to-pay-a-row}. Tokens choose better than blocks.
# The kernels are right in the interpreter, and their machine code uses the matrix unit without a spill
# where it should. Tensors without numbers work at full size. Short texts and small K lose.
#
# **What the report does not say, and what we chose.** How the selection is computed: here a radix select, ties to
# the later key. In which tiles: 64 heads, 32 keys. How gradients of shared latents are summed: here by atomic
# addition, so their last digits may differ from run to run.
#
# **Five questions**
# 1. A kernel reaches 90 % of memory bandwidth and 5 % of peak FLOP. Is it slow?
# 2. Why may a block of queries not share a tile in DSA, and what takes its place?
# 3. The interpreter accepts a kernel. Name two things that can still be wrong with it.
# 4. Why are the index scores not written for each head?
# 5. Which of the kernels here depends on the order in which programs run?
#
# <details><summary>Answers</summary>
#
# 1. No: it does as few FLOP a byte as its task has. It can only get faster by moving less.
# 2. Each query has its own list. The heads of one query take their place: they share it.
# 3. It may spill registers, want more shared memory than there is, or miss the matrix unit.
# 4. They would be 64 times as many numbers, written and read again.
# 5. Only the gradient of the latents, in its last digits.
#
# </details>
#
# **Next**: [09 Cost curves](09_cost_curves.ipynb) asks what all this is worth, at which length;
# [10 The full model](10_full_model_on_a_gpu.ipynb) puts the layer back into a model of 671 billion parameters.
