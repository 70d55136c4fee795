# %% [markdown]
# # 09 Cost curves: when is it cheaper, and by how much, for me?
#
# "Six to seven times cheaper" is a sentence without a length. Sparse attention is not cheaper by a number. It is
# dearer for a short text. For a long one it is between three and nine times cheaper, and most of that difference is
# whether the tokens are read or written. This chapter takes the one cost figure that was published, holds
# against it what was said about it, explains it from the sizes of the model and the speed of the machine, and then
# asks the same questions of your own machine and of your own bill.
#
# **You will be able to**
# 1. say for a prompt, a cached share and an answer what sparse attention saves, and from which length on;
# 2. explain a published cost curve from first principles, and name what it cannot tell you;
# 3. read a price list against the cost of computing, and see which knob matters.
#
# **You need** PyTorch and the counts of [09a Attention at length](09a_attention_at_length.ipynb): a pair costs 81,920
# FLOP in MHA mode, 278,528 in MQA mode and 16,384 in the indexer.
#
# **Afterwards**: your machine up to 64 Ki (set `FULL`), and `dsa/analysis`. Computing: **60 s**.
#
# Line styles tell where a number comes from: **measured** here solid, **recorded** on named hardware dashed,
# **published** dotted, **modelled** dash-dotted. A Ki is 1,024 tokens. *Dense* is V3.1-Terminus, *sparse* V3.2-Exp.

# %%
import inspect
import json
import math
from pathlib import Path

import dsa
import torch
from course.exercises.costs import check
from course.figures import cost_curves, serving_cost
from course.ui.claims import claim
from course.ui.predict import predict
from course.ui.style import show, style
from dsa.analysis import flops, pricing, roofline
from dsa.analysis.published import crossing, read_costs
from dsa.analysis.roofline import DENSE, H800, SPARSE

FULL = False  # True: your machine up to 64 Ki, some minutes
style()
real = dsa.Config.v32_exp()

# %% [markdown]
# ## What was published, and what was said
#
# The report's Figure 3 has four curves: dollars per million tokens by a token's *position*, for reading a prompt
# (prefill) and for writing (decode), on rented H800s at 2 USD an hour. It is kept here as corner points. An article
# about the release, "DeepSeek Cuts Inference Costs", put it into words: "6 to 7 times" cheaper at long contexts,
# about 0.10 USD against 0.60 at 32,000 tokens, 0.30 against 2.30 at 128,000; inputs of more than 7,000 tokens
# processed "2 to 3 times" faster; and a speed that grows linearly with the length of the input.

# %%
published = read_costs("../data/published/costs.csv")
for (phase, model), curve in published.items():
    corners = zip(curve.positions, curve.dollars, strict=True)
    print(f"{phase:7} {model:13}", *[f"{p:,}: {d}" for p, d in corners])
guess = predict(
    "How many times cheaper is *reading* the last token of 128 Ki?",
    6.5,
    low=0,
    high=20,
    form=".1f",
    unit="times",
)

# %%
show(*cost_curves.draw_quoted(published))
old = {p: published[p, DENSE] for p in flops.PHASES}
new = {p: published[p, SPARSE] for p in flops.PHASES}
last = {p: old[p].at(131071) / new[p].at(131071) for p in old}
guess.reveal(
    last["prefill"],
    "attention in prefill runs in MHA mode, where a dense pair costs only"
    " 5 times what scoring it costs. In decoding it is 17 times.",
)

# %% [markdown]
# Three of the four crosses lie near the *decode* curves and far from the prefill ones. So what the article says of
# "inference" the figure says, if at all, of writing. Sentence by sentence. **"6 to 7 times"**: where?

# %%
reach = {
    p: {n: cost_curves.at_least(old[p], new[p], n) for n in (2, 3, 6, 7)}
    for p in flops.PHASES
}
for phase, found in reach.items():
    print(phase, ", ".join(f"{n}x: {x:,.0f}" for n, x in found.items()))
lo, hi = (reach["decode"][n] / 1e3 for n in (6, 7))
claim(
    "six-to-seven-times",
    math.isinf(reach["prefill"][6]) and 70 < lo < hi < 95,
    f"6 to 7 times holds in decoding from {lo:.0f} to {hi:.0f} thousand"
    " tokens, and nowhere in prefill",
    value=f"{lo:.0f} to {hi:.0f} thousand",
)
ends = f"{last['prefill']:.1f} and {last['decode']:.1f}"
claim(
    "last-position-ratios",
    last["prefill"] < 4 and last["decode"] > 8,
    f"at the last position the ratios are {ends}, in prefill and decode",
    value=ends,
)

# %% [markdown]
# The article's own four prices say 0.60 / 0.10 = 6.0 and 2.30 / 0.30 = 7.7. Now the fourth cross: at 32,000 the
# sparse price lies far below its decode curve (prefill is 0.12 there), and nearly all of the "6 times" comes from it:

# %%
for model, said in cost_curves.QUOTED_PRICES.items():
    for n, dollars in said:
        there = published["decode", model].at(n)
        print(f"{model:13} at {n:,}: said {dollars:.2f}, is {there:.2f}")
at32 = old["decode"].at(32_000) / new["decode"].at(32_000)
claim(
    "position-32000",
    3 < at32 < 4,
    f"at 32,000 tokens decoding is {at32:.1f} times cheaper, not 6 times",
    value=f"{at32:.1f}",
)

# %% [markdown]
# **"Inputs over 7,000 tokens 2 to 3 times faster"**: an input is a prompt, so prefill. The figure knows cost, which
# is GPU time; how long a user waits depends on more. A token at 7,000 and a whole prompt of 7,000 are not the same
# thing. Neither takes less GPU time:

# %%
token = old["prefill"].at(7000) / new["prefill"].at(7000)
prompt = old["prefill"].total(0, 7000) / new["prefill"].total(0, 7000)
whole = next(
    n
    for n in range(1000, 131_000, 1000)
    if old["prefill"].total(0, n) > 2 * new["prefill"].total(0, n)
)
print(f"token {token:.2f}, whole prompt {prompt:.2f}")
claim(
    "half-price-from",
    prompt < token < 1 and 75_000 < whole < 95_000,
    f"at 7,000 tokens dense prefill is cheaper; a token costs half from"
    f" {reach['prefill'][2] / 1e3:.0f} thousand on, a whole prompt from"
    f" {whole / 1e3:.0f} thousand",
)

# %% [markdown]
# ("By more than half", says the article of the cost. That is a ratio of 2: in prefill these same two lengths, and in
# decoding a token at 15 thousand.)
#
# **"Linear"**: if the speed, or the cost, of a whole prompt were linear in its length, doubling the length would
# double the cost: power 1. A token's cost grows along a straight line in both models, so a prompt's grows faster:

# %%
powers = {m: cost_curves.power(published["prefill", m], 131_071)
          for m in (DENSE, SPARSE)}  # fmt: skip
print(", ".join(f"{m}: power {x:.2f}" for m, x in powers.items()))
claim(
    "power-of-a-prompt",
    1.2 < powers[SPARSE] < 1.5 < 1.7 < powers[DENSE],
    "from 64 to 128 Ki the cost of a prompt grows with the power"
    f" {powers[SPARSE]:.1f} sparse and {powers[DENSE]:.1f} dense",
)

# %% [markdown]
# Nearly linear is right for sparse attention *so far*: the indexer is quadratic and takes over beyond (chapter 09a).
#
# **And what was not said**: below the crossover the new model is the dearer one.

# %%
meet = {p: crossing(old[p], new[p]) for p in old}
dearest = {p: max(new[p].at(n) / old[p].at(n) - 1 for n in range(0, 4096))
           for p in old}  # fmt: skip
claim(
    "sparse-dearer-below",
    all(d > 0.15 for d in dearest.values()),
    "sparse is dearer below"
    f" {meet['prefill']:,.0f} (prefill) and {meet['decode']:,.0f} tokens"
    f" (decode), by up to {dearest['prefill']:.0%} and"
    f" {dearest['decode']:.0%}",
)

# %% [markdown]
# ## A slope is a rate
#
# Why are the curves where they are? Take the simplest, dense prefill. Each position adds one more key to look at.
# The figure says what that costs in dollars, two dollars buy 3,600 seconds of a GPU, and chapter 09a says how many
# FLOP it is. Dividing gives the speed at which those GPUs multiplied:

# %%
guess = predict("Which share of the H800's peak, 989 TFLOP/s?", 0.3)

# %%
mha = flops.mha_pair_flops(real)
flop = real.num_hidden_layers * mha
dollars = 0.6658 - 0.0529  # what 131,071 more keys cost, a million times
seconds = dollars / 1e6 / (2 / 3600) / 131_071
rate = flop / seconds
print(f"{flop:,} FLOP in {seconds * 1e9:.2f} ns: {rate / 1e12:.0f} TFLOP/s")
theirs = flop / roofline.seconds_per_position(old["prefill"])
claim(
    "dense-slope-rate",
    math.isclose(rate, theirs) and 590e12 < rate < 600e12,
    f"the slope of dense prefill implies {rate / 1e12:.0f} TFLOP/s",
)
guess.reveal(
    rate / 989.5e12,
    "large products on long prompts: that is what a good kernel reaches.",
)

# %% [markdown]
# A **roofline** turns this round. Its rule: a kernel takes the longer of two times, its FLOP over the rate at which
# the machine multiplies, and its bytes over the rate at which memory delivers. Rates come from those who wrote the
# kernels: FlashMLA's authors state 660 TFLOP/s for dense decoding on an H800 at best, 640 for sparse prefill, 410
# for sparse decoding with an FP8 cache. Users measured 960 to 1,145 for DeepGEMM's index scores (on an H200, which
# multiplies no faster). For MHA prefill at these widths nobody published a rate; 600 is *assumed*. Dense decoding
# by hand, for one key in all layers:

# %%
mqa = real.num_hidden_layers * flops.mqa_pair_flops(real)
cached = real.num_hidden_layers * 2 * (512 + 64)  # bytes, bf16
multiply, read = mqa / 660e12, cached / 3.35e12
print(f"multiply {multiply * 1e9:.1f} ns, read {read * 1e9:.1f} ns")
one = roofline.seconds_per_position(old["decode"])
print(f"the figure: {one * 1e9:.1f} ns")

# %% [markdown]
# The figure lies a tenth above. Deployed models *draft*: a small extra layer guesses one token ahead (multi-token
# prediction, MTP), a pass checks two tokens at once, and the second is right in 85 to 90 % of cases, says the V3
# report. So a pass multiplies twice, reads once, and yields, at 85 %, 1.85 tokens:

# %%
by_hand = max(2 * multiply, read) / 1.85
print(f"with MTP: {by_hand * 1e9:.1f} ns")
claim(
    "dense-decoding-by-hand",
    math.isclose(by_hand, roofline.dense_seconds(real, "decode"))
    and abs(by_hand / one - 1) < 0.05,
    "dense decoding by hand is the package's, and within 5 % of the figure",
)

# %% [markdown]
# From here on we use the package's. This is scoring; the others are built alike. Beside the rate of MHA one more
# number is assumed: a pair's score moves 12 bytes (`logit_bytes`), fp32, written once and read twice by the top-k.

# %%
print(inspect.getsource(roofline.scoring_seconds))
for name, value in vars(H800).items():
    print(f"{name:17} {value:g}")

# %% [markdown]
# Four numbers are *not* derived but taken over: what a token costs at position 0, in each curve. There it pays for
# weights, communication and whatever else does not depend on its position. Slopes, knees and crossovers follow.

# %%
starts = roofline.base_costs(published)
kernels = roofline.modelled_curves(real, starts)
off = {
    key: roofline.relative_error(kernels[key], published[key])
    for key in kernels
}
for (phase, model), gap in off.items():
    print(f"{phase:7} {model:13} at worst {gap:+.1%}")
most = max(abs(gap) for gap in off.values())
claim(
    "roofline-reproduces",
    most < 0.10,
    "with four starts, published rates and two assumed numbers every curve"
    f" is reproduced within {most:.0%} at every position",
    value=f"{most:.0%}",
)

# %% [markdown]
# *At every position* is no exaggeration: both curves are piecewise linear, so their ratio is largest or smallest at
# a corner of one of them, and the corners are all checked. The knee in prefill comes out too: short prompts are
# read in masked MHA mode, and that hands over to selected keys where these become cheaper.

# %%
knee = roofline.knee_position(real, "prefill")
ours = {p: crossing(kernels[p, DENSE], kernels[p, SPARSE]) for p in old}
claim(
    "knee-and-crossovers",
    abs(knee / new["prefill"].positions[1] - 1) < 0.05
    and all(abs(ours[p] / meet[p] - 1) < 0.10 for p in ours),
    f"the model's knee in prefill is at {knee:,.0f} tokens, the figure's at"
    f" {new['prefill'].positions[1]:,}; its crossovers are within 10 %",
)

# %% [markdown]
# ## What the figure cannot tell
#
# A model that fits is not yet true. What would also fit? First, move one number at a time, and leave all others.
# `accepted` is the tokens that a pass yields; the search ends at 8 times:

# %%
names = ("mha", "mqa", "sparse_prefill", "sparse_decode", "bandwidth")
names += ("index_prefill", "index_decode", "logit_bytes", "accepted")
ranges = {}
for name in names:
    low, high = roofline.acceptable_range(real, published, name)
    ranges[name] = (low, getattr(H800, name), high)
show(*cost_curves.draw_ranges(ranges))
low, _, high = ranges["mha"]
claim(
    "mha-rate-pinned",
    high / low < 1.3,
    f"MHA's rate is pinned between {low / 1e12:.0f} and"
    f" {high / 1e12:.0f} TFLOP/s",
)
low, _, high = ranges["logit_bytes"]
claim(
    "score-bytes-unknown",
    high / low > 2,
    f"a score may move {low:.0f} to {high:.0f} bytes: hardly known",
)

# %% [markdown]
# (`index_decode` has no upper end at all: there the indexer waits for memory, and multiplying faster is no help.)
#
# **Is MTP in it?** Without it, at these rates, sparse decoding is far off. Its slope would need more than the
# memory can deliver, since each index key must be read for each token:

# %%
without = roofline.modelled_curves(real, starts, roofline.NO_MTP)
error = roofline.relative_error(without["decode", SPARSE], new["decode"])
keys = 61 * (128 + 4)  # bytes of one token's index keys, FP8 with scales
per_token = roofline.seconds_per_position(new["decode"])
needed = keys / per_token / H800.bandwidth
claim(
    "two-tokens-a-pass",
    error > 0.25 and needed > 1.5,
    f"with one token a pass the model is {error:.0%} too high, and the"
    f" figure's slope would need {needed:.0%} of the memory's bandwidth",
)

# %% [markdown]
# That looks like a proof. It is one only if the figure was *measured*. Do for every part of it what we did for
# dense prefill: divide FLOP by time, one token a pass, nothing else, and compare with the machine's peak.

# %%
shares = roofline.implied_utilization(real, published)
for part, share in shares.items():
    print(f"{part:22} {100 * share:6.2f} % of the peak")
near = [abs(100 * s - 5 * round(20 * s)) < 0.05 for s in shares.values()]
claim(
    "round-shares",
    sum(near) == 5,
    f"{sum(near)} of {len(near)} parts of the figure are a multiple of 5 %"
    " of the peak, within 0.05 points",
)

# %% [markdown]
# 60.00, 40.00, 60.00, 34.99, 40.02: to the last digit that the figure's corners carry. If shares fell anywhere, one
# of them would be that close to a multiple of 5 % with a chance of one in fifty, so five of six are no accident.
# Nobody outside knows why. One explanation: a benchmark gave the utilisations, they were rounded, and **the curves
# were computed from FLOP counts**. A model of nothing but those shares fits better than ours, with no word of MTP,
# bandwidth or bytes:

# %%
rounded = roofline.modelled_curves(real, starts, roofline.PEAK_SHARES)
show(
    *cost_curves.draw_fit(
        published, {"kernel rates": kernels, "shares of peak": rounded}
    )
)
error = roofline.max_relative_error(real, published, roofline.PEAK_SHARES)
claim(
    "flop-shares-reproduce",
    error < 0.03,
    "FLOP at constant shares of the peak reproduce every curve within"
    f" {error:.1%}",
)

# %% [markdown]
# Two models, both within the figure's reach, and they disagree about what a GPU was doing. The kernel model says
# *how it can be*, the shares say *how it may have been drawn*. So MTP **cannot be identified** from the figure.
#
# **Which batch was it?** A pass over many sequences reads all weights once. The larger the batch, the less of that
# each token pays, and the more is left for multiplying:

# %%
batches = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
decode = {m: starts["decode", m] for m in (DENSE, SPARSE)}
efficient = {
    m: [roofline.required_utilization(real, start, n) for n in batches]
    for m, start in decode.items()
}
print("sequences, and the share of the FP8 peak that explains the start")
print("(above 100 %: impossible; inf: reading alone takes too long)")
for n, dense, sparse in zip(batches, *efficient.values(), strict=True):
    print(f"{n:6,}  dense {dense:5.0%}  sparse {sparse:5.0%}")
efficient = efficient[DENSE]
claim(
    "batch-behind-start",
    efficient[1] > 1 > efficient[2] and efficient[2] < 2 * efficient[-1],
    "1,024 sequences on all GPUs together are too few to explain the dense"
    f" start, and everything from 2,048 explains it, at"
    f" {efficient[2]:.0%} to {efficient[-1]:.0%} of the FP8 peak",
)

# %% [markdown]
# A smallest batch, then, and no largest. The batch **cannot be identified** either: it moves the start of a curve,
# the start is one number, and three unknowns share it (batch, efficiency, everything that is not counted).
#
# ## Your machine
#
# The model of the figure needs many GPUs. You have one processor, and it can run *one layer at the true size*:
# 128 heads on latents of 512 + 64 numbers, an indexer of 64 heads of 128, 2,048 keys kept. First the count, which
# holds for every machine. One decoded token that sees 4,096 keys, FLOP by PyTorch's own counter (`MATH`
# writes attention out as matrix products, which the counter sees) and bytes by what the tensors hold:

# %%
from dsa.kernels import ops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

generator = torch.Generator().manual_seed(0)


def random(*sizes):
    return torch.randn(sizes, generator=generator)


# %%
S, K = 4096, real.index_topk
kv, ik = random(1, S, 576), random(1, S, 128)  # latent + rotary, index key
q, iq, w = random(1, 1, 128, 576), random(1, 1, 64, 128), random(1, 1, 64)
with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
    chosen = ops.index_topk(iq, ik, w, K, backend="tiled")
    ops.sparse_attention(q, kv, chosen, 0.04, 512, backend="tiled")
index, pair = 16_384 + 2 * 64, 278_528  # head sums included
claim(
    "layer-flop-to-the-digit",
    seen.get_total_flops() == S * index + K * pair,
    f"one sparse token ran {seen.get_total_flops():,} FLOP in this layer:"
    " what was counted, to the digit",
)
dense_bytes = kv.numel() * 4
sparse_bytes = 4 * (ik.numel() + K * kv.shape[-1])
by_count = [
    flops.decode_traffic(real, S, kind, "fp32").cache // 61
    for kind in flops.ATTENTIONS
]
claim(
    "cache-bytes-read",
    [dense_bytes, sparse_bytes] == by_count,
    f"it reads {sparse_bytes:,} bytes of cache, dense {dense_bytes:,}",
)

# %% [markdown]
# Now the clock. Random numbers do, since time does not depend on what is attended to. This is what is timed for
# sparse attention; for dense it is one call.

# %%
from dsa.bench import layer

print(inspect.getsource(layer.sparse_call))

# %% [markdown]
# CPU time of one thread, the median of three runs, for one token. In decoding that is one query. In prefill it is a
# block at the end of the prompt: for dense attention up to 1,024 queries in one of the 128 heads (all heads' keys
# and values would need gigabytes, and heads do the same work), for sparse attention 16 queries in all heads.

# %%
guess = predict(
    "At 16,384 tokens your machine decodes sparse how many times faster?",
    2,
    low=0,
    high=30,
    form=".1f",
    unit="times",
)

# %% tags=["nbval-ignore-output"]
lengths = (1024, 2048, 4096, 8192, 16384)
if FULL:
    lengths = (*lengths, 32768, 65536)
measured = {
    phase: {S: layer.token_seconds(real, phase, S) for S in lengths}
    for phase in flops.PHASES
}
for phase, found in measured.items():
    for S, (d, s) in found.items():
        print(f"{phase:7} {S:6,}: dense {d * 1e3:6.2f} ms,", end=" ")
        print(f"sparse {s * 1e3:6.2f} ms, ratio {d / s:.2f}")

# %% [markdown]
# A laptop is some ten thousand times slower than a rented GPU. To lay the two on each other we allow **one factor
# for each phase**: the one that puts the measured *dense* line on the published one. Where the sparse line falls is
# then a result.

# %% tags=["nbval-ignore-output"]
from course.figures.own_machine import draw_machine

show(*draw_machine(published, measured))
d, s = measured["decode"][16384]
guess.reveal(
    d / s,
    "the count says"
    f" {278_528 * 16384 / (16_384 * 16384 + 278_528 * 2048):.1f}; choosing"
    " and fetching rows take time and make no FLOP.",
)

# %%
gain = {p: [d / s for d, s in f.values()] for p, f in measured.items()}
claim(
    "this-machine-decodes",
    gain["decode"][4] > 2,
    "at 16,384 tokens this machine decodes more than twice as fast sparse",
)
claim(
    "this-machine-prefill",
    gain["prefill"][0] < 0.7
    and gain["prefill"][4] > 2 * gain["prefill"][1],
    "at 1,024 tokens sparse prefill takes longer than dense, and from 2,048"
    " to 16,384 its standing at least doubles",
)

# %% [markdown]
# Beyond 16 Ki it takes longer, so it is **recorded**: {source:cpu_layer.machine}, {source:cpu_layer.date}, with
# `{source:cpu_layer.command}`, while other work ran beside it. (Or set `FULL`.)

# %%
from course.figures.own_machine import layer_seconds, records

path = Path("../data/measurements/cpu_layer.json")
long = layer_seconds(json.loads(path.read_text()))
show(*draw_machine(published, long, "recorded"))
far = {p: long[p][131_072][0] / long[p][131_072][1] for p in long}
claim(
    "recorded-at-128k",
    far["decode"] > 6 and far["prefill"] > 2.5,
    f"recorded at 128 Ki, dense takes {far['prefill']:.1f} times as long as"
    f" sparse in prefill and {far['decode']:.1f} times in decode",
    kind="recorded",
)

# %% [markdown]
# (The count says 4.0 and 13.4. More than the count means that a FLOP of dense attention took longer here than one of
# sparse: the library's kernel pads values of 128 numbers to the 192 of the keys, a fifth more work that counts for
# nothing. Less means that choosing and fetching rows took their time. With index vectors in eight bits the gain is
# larger: `dsa bench cpu` shows both.)
#
# The law is the same on a laptop and in a data centre, because it is a law of the shape: where the lines cross
# depends on 5 to 1 and 17 to 1, on K, and less on who multiplies. (In decoding they cross here at half the figure's
# length. There the sparse curve starts a third higher, with what does not depend on the position, and has to earn
# that back; one layer alone has no such start.)
#
# ## A GPU
#
# The same model with other rates gives *floors*: what one layer needs at least for one query on an H200, if every
# kernel ran at 790 TFLOP/s in bf16 (80 % of the peak), twice that in FP8, and 4.3 TB/s. They are **modelled**. What
# real kernels take is to be set beside them, and is drawn below if a measurement is recorded.

# %%
from course.figures.own_machine import draw_floors, floors

show(*draw_floors(real, (32768, 65536, 131072)))
best = {}
for phase in flops.PHASES:
    f = floors(real, phase, 131_072)
    best[phase] = f["dense"] / (f["scoring"] + f["selected"])
claim(
    "perfect-kernels",
    5 < best["prefill"] < 6 and 8.5 < best["decode"] < 9.5,
    "at 128 Ki perfect kernels on an H200 would gain"
    f" {best['prefill']:.1f} times in prefill and"
    f" {best['decode']:.1f} times in decode over a perfect dense one",
)
on_gpu = records("../data/measurements", "gpu")
for record in on_gpu:
    print(record.get("machine", record.get("device")), record.get("date"))
    if pairs := layer_seconds(record):
        show(*draw_machine(published, pairs, "recorded"))
if not on_gpu:
    print("No GPU measurement is recorded yet: nothing here is measured.")

# %% [markdown]
# ## The bill
#
# Costs are one thing and prices another. DeepSeek's list for V3.2-Exp asks, per million tokens, 0.28 USD for input,
# 0.028 for input that its cache still has, and 0.42 for output, *the same at every position*. Three things people
# do with a long context:
#
# * **a document** of 60,000 tokens, five questions about it;
# * **a long chat**, 500 turns of 50 and 200 tokens;
# * **a repository** of 40,000 tokens, and an agent that takes 50 steps, each reading 1,200 and writing 300 tokens.
#
# A model keeps nothing between two calls: each turn sends everything again. A chat by hand:

# %%
guess = predict("Which share of the chat's bill is for cached tokens?", 0.3)

# %%
turns, question, answer = 500, 50, 200
fresh = cached = written = 0
text = 500  # an opening: instructions
for turn in range(turns):
    fresh += question + (text if turn == 0 else 0)
    cached += text if turn > 0 else 0
    written += answer
    text += question + answer
by_hand = [fresh * 0.28e-6, cached * 0.028e-6, written * 0.42e-6]
print(f"{fresh:,} fresh, {cached:,} cached, {written:,} written")

# %%
bill = pricing.list_price_bill(pricing.CHAT)
theirs = [bill.fresh, bill.cached, bill.written]
claim(
    "chat-bill",
    all(map(math.isclose, by_hand, theirs))
    and bill.cached > 0.9 * bill.total,
    f"the chat costs {bill.total:.2f} USD,"
    f" {bill.cached / bill.total:.0%} of it for cached tokens",
    value=f"{bill.cached / bill.total:.0%}",
)
guess.reveal(
    bill.cached / bill.total,
    "they cost a tenth, and there are 250 of them for each that is new:"
    " before 500 turns, 500 x 499 / 2 older ones are sent again.",
)

# %% [markdown]
# What does it cost to *compute*? Add up the published curves over the very positions that are computed: fresh
# tokens along the prefill curve, written ones along the decode curve. (GPU time only. To keep a cache and to fetch
# it is not in the figure, so here it is free.)

# %%
uses = {
    "a document": pricing.DOCUMENT,
    "a long chat": pricing.CHAT,
    "a repository": pricing.REPOSITORY,
}
show(*serving_cost.draw_serving_costs(published, uses))
gpu = {
    name: pricing.published_gpu_bills(published, work)
    for name, work in uses.items()
}
saved = {n: b[DENSE].total / b[SPARSE].total for n, b in gpu.items()}
words = ", ".join(f"{name} {x:.1f}" for name, x in saved.items())
claim(
    "three-uses",
    1.5 < min(saved.values()) < 3 and 4 < max(saved.values()) < 6,
    f"dense over sparse GPU time: {words}",
    value=words,
)

# %% [markdown]
# So "how much cheaper for me?" has an answer for each use: {claim:three-uses} times, prefill and decode together. The
# more is written late in a long context, the more is saved.
#
# One price for every position is a bet on your lengths. From which position does a token cost more GPU time than it
# brings? With the dense model there is one:

# %%
asked = {"prefill": 0.28, "decode": 0.42}
loss = {p: pricing.break_even(old[p], asked[p]) for p in asked}
still = {p: pricing.break_even(new[p], asked[p]) for p in asked}
claim(
    "dense-loses-beyond",
    still == {"prefill": None, "decode": None}
    and loss["decode"] < loss["prefill"] < 131_071,
    "at these prices the dense model would lose on each token read beyond"
    f" {loss['prefill'] / 1e3:.0f} thousand and written beyond"
    f" {loss['decode'] / 1e3:.0f} thousand; the sparse one never does",
)

# %% [markdown]
# ## What matters most
#
# A **tornado chart** moves one thing at a time and sorts by what that does to the cost. Here is GPU time of the
# three uses, on the modelled curves: the cache's hit rate, the model, half the length, half the answers, another K,
# another number of index heads. How far each is moved is our choice, and such a chart is no better than its ranges.


# %%
def gpu_time(case):
    return pricing.modelled_gpu_bill(real, starts, case).total


charts = {}
for name, work in uses.items():
    moves = {
        "hit_rate": (0.5, 1.0),
        "model": (DENSE, SPARSE),
        "turns": (work.turns // 2, work.turns),
        "opening": (work.opening // 2, work.opening),
        "answer": (work.answer // 2, work.answer),
        "top_k": (1024, 4096),
        "index_heads": (32, 128),
    }
    case = pricing.Scenario(work)
    charts[name] = gpu_time(case), pricing.tornado(gpu_time, case, moves)

# %%
show(*serving_cost.draw_tornado(charts))
first = [[bar.name for bar in bars[:2]] for _, bars in charts.values()]
claim(
    "hit-rate-matters",
    all(names == ["hit_rate", "model"] for names in first),
    "moved so, the cache's hit rate matters most in all three uses, and"
    " which model it is comes second",
)

# %% [markdown]
# Here sparse attention is the second best thing that can happen to a long conversation. The best is not to read it
# again.
#
# ## Play with it
#
# One request: a prompt, part of which is cached from before, and 1,000 tokens of answer. **length** counts Ki
# tokens, **top-k** is what each token keeps, **price** is what an hour of one GPU costs in cents, **cached** is the
# share of the prompt that was read before. Before you move: does a cache make sparse attention more worth while, or
# less?

# %%
from course.ui.panel import Panel, Slider, static_snapshots

draw = serving_cost.draw_calculator(real, published)
Panel(
    draw,
    length=Slider("length in Ki tokens", 1, 127, 64),
    top_k=Slider("top-k", 256, 8192, 2048, step=256),
    price=Slider("price of a GPU hour in cents", 50, 500, 200, step=50),
    cached=Slider("share of the prompt cached, %", 0, 100, 0),
)

# %% [markdown]
# The same for readers without a kernel:

# %%
base = {"length": 64, "top_k": 2048, "price": 200, "cached": 0}
static_snapshots(draw, [base | {"cached": 90}])


def gained(cached):
    """Dense over sparse GPU time of the request at 64 Ki."""
    call = pricing.Request(65_536, 65_536 * cached // 100, 1000)
    both = [
        pricing.gpu_time_bill(
            [call], kernels["prefill", m], kernels["decode", m]
        )
        for m in (DENSE, SPARSE)
    ]
    return both[0].total / both[1].total


claim(
    "cached-share",
    gained(90) > 1.3 * gained(0),
    f"with 90 % of the prompt cached sparse takes {gained(90):.1f} times"
    f" less GPU time, with nothing cached {gained(0):.1f} times",
)

# %% [markdown]
# More: what is left to compute stands at the far end of the context, where the curves are widest apart.
#
# ## Exercises
#
# Write the function, run its cell and the check below it. Nothing happens if you skip one.

# %% [markdown]
# {exercise:costs.my_reach}

# %% [markdown]
# {exercise:costs.my_chat}

# %% [markdown]
# {exercise:costs.my_crossover}

# %% [markdown]
# {exercise:costs.my_scoring}

# %% [markdown]
# ## Where it fails
#
# **Many short requests.** A prompt of 2,000 tokens and 500 of answer, as many requests are:

# %%
short = pricing.published_gpu_bills(
    published, pricing.Conversation(2000, 0, 500, 1)
)
more = short[SPARSE].total / short[DENSE].total - 1
claim(
    "short-use-costs-more",
    more > 0.15,
    f"2,000 tokens read and 500 written take {more:.0%} more GPU time"
    " sparse",
    value=f"{more:.0%}",
)

# %% [markdown]
# Who serves nothing else pays {claim:short-use-costs-more} more for a feature that hardly comes into play.
#
# **Half a cache hit saves less than half.** A cache finds beginnings, and the first half of a prompt is the cheap
# half. In the dense model much cheaper:

# %%
halves = {m: published["prefill", m].total(0, 50_000)
          / published["prefill", m].total(0, 100_000)
          for m in (DENSE, SPARSE)}  # fmt: skip
claim(
    "half-cached",
    halves[DENSE] < 0.35 < halves[SPARSE] < 0.5,
    "having half of 100,000 tokens cached saves"
    f" {halves[DENSE]:.0%} of reading them dense,"
    f" {halves[SPARSE]:.0%} sparse",
)

# %% [markdown]
# ## What you have proved
#
# 6 to 7 times holds in decoding from {claim:six-to-seven-times} tokens and nowhere in prefill; at the end of the
# figure it is
# {claim:last-position-ratios}; 2 to 3 times is not to be had at 7,000; below the crossover sparse is dearer.
# Published rates, two assumed numbers and four starts give every curve within {claim:roofline-reproduces}, and round
# shares of the peak do better, so neither MTP nor the batch can be read off. Your machine shows the same shape. Of a
# chat's bill {claim:chat-bill} is for cached tokens, and in every use, moved as far as we moved it, the hit rate
# matters most.
#
# **What the report does not say, and what we chose.** The rates: as their authors state them, and 600 TFLOP/s for
# MHA. Traffic of a score: 12 bytes, written once and read twice. The cache of the dense model: bf16. That fetching
# a cached prompt is free: nothing is published. The three uses and their lengths are ours; put in your own.
#
# **Five questions**
# 1. The two models of the figure disagree about MTP. Which measurement would settle it?
# 2. K is halved to 1,024. Which curve changes most, at which length, and what might it cost elsewhere?
# 3. A provider rents GPUs at half the price. Does any crossover move?
# 4. Why does decoding gain more than prefill, though both select the same 2,048 keys?
# 5. You serve a support chat of 3,000 tokens on average. What would you ask before you move to the sparse model?
#
# <details><summary>Answers</summary>
#
# 1. The decoding speed at one length with MTP switched on and off, or with one, two and three drafts.
# 2. By the model both by about a sixth, each at its old knee: decode near 2,000 tokens, prefill near 6,500. Farther
#    on it is less, as scoring grows and stays. Both knees move to half their place. The price is paid in quality
#    (chapter 04 measures what fewer keys keep).
# 3. No: both curves scale alike. It moves where a token costs more than its price.
# 4. Dense decoding runs in MQA mode, 17 times the indexer's FLOP; dense prefill in MHA mode, 5 times.
# 5. How long the *longest* chats are and how much is written in them; what share of input the cache finds; and
#    whether the sparse model answers as well.
#
# </details>
#
# **Next**: [10 The full model](10_full_model_on_a_gpu.ipynb), what is around the attention and what it takes to run it;
# [09a](09a_attention_at_length.ipynb) has the counts behind this chapter. The [README](../README.md) lists what is there.
