# %% [markdown]
# # 11 Cost curves: when is it cheaper, and by how much, for me?
#
# "Six to seven times cheaper" is a sentence without a length. Sparse attention is not cheaper by a number. It is
# dearer for a short text, three or eight times cheaper for a long one, and the difference between three and eight is
# whether the tokens are read or written. This chapter takes the one cost figure that was published, holds against
# it what was said about it, explains it from the sizes of the model and the speed of the machine, and then asks the
# same questions of your own machine and of your own bill.
#
# **You will be able to**
# 1. say for a prompt, a cached share and an answer what sparse attention saves, and from which length on;
# 2. explain a published cost curve from first principles, and name what it cannot tell you;
# 3. read a price list against the cost of computing, and see which knob matters.
#
# **You need** PyTorch and the counts of [01 Attention at length](01_attention_at_length.ipynb): a pair costs 81,920
# FLOP in MHA mode, 278,528 in MQA mode and 16,384 in the indexer.
#
# **Routes.** 15 minutes: the figures, the ✓ lines and the calculator. 2 hours: predict each answer, exercises 11.1
# to 11.3. 2 days: exercise 11.4, your machine up to 64 Ki (set `FULL`), then `dsa/cost`. Computing: **90 s**.
#
# Line styles tell where a number comes from: **measured** here solid, **recorded** on named hardware dashed,
# **published** dotted, **modelled** dash-dotted. A Ki is 1,024 tokens. *Dense* is V3.1-Terminus, *sparse* V3.2-Exp.

# %%
import inspect
import math

import dsa
import matplotlib.pyplot as plt
import torch
from dsa.cost import curves, prices, roofline
from dsa.cost.curves import DENSE, H800, SPARSE
from dsa.cost.published import crossing, read_costs
from dsa.show import bills, costs
from dsa.show.claims import claim
from dsa.show.exercises.catalogue import check
from dsa.show.figures import show, style
from dsa.show.predict import predict

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

# %%
guess = predict(
    "How many times cheaper is *reading* the last token of 128 Ki?",
    6.5,
    low=0,
    high=20,
    form=".1f",
    unit="times",
)

# %%
show(*costs.draw_said(published))
old = {p: published[p, DENSE] for p in roofline.PHASES}
new = {p: published[p, SPARSE] for p in roofline.PHASES}
last = {p: old[p].at(131071) / new[p].at(131071) for p in old}
guess.reveal(
    last["prefill"],
    "attention in prefill runs in MHA mode, where a dense pair costs only"
    " 5 times what scoring it costs. In decoding it is 17 times.",
)

# %% [markdown]
# So the crosses lie on the *decode* curves, and nowhere near the prefill curves. What the article says of "inference"
# the figure says of writing. Sentence by sentence. **"6 to 7 times"**: where?

# %%
reach = {p: {n: costs.at_least(old[p], new[p], n) for n in (2, 3, 6, 7)}
         for p in roofline.PHASES}  # fmt: skip
for phase, found in reach.items():
    print(phase, ", ".join(f"{n}x: {x:,.0f}" for n, x in found.items()))
lo, hi = (reach["decode"][n] / 1e3 for n in (6, 7))
claim(
    "C11.1",
    math.isinf(reach["prefill"][6]) and 70 < lo < hi < 95,
    f"6 to 7 times holds in decoding from {lo:.0f} to {hi:.0f} thousand"
    " tokens, and nowhere in prefill",
    value=f"{lo:.0f} to {hi:.0f} thousand",
)
ends = f"{last['prefill']:.1f} and {last['decode']:.1f}"
claim(
    "C11.2",
    last["prefill"] < 4 and last["decode"] > 8,
    f"at the last position the ratios are {ends}, in prefill and decode",
    value=ends,
)

# %% [markdown]
# The article's own four prices say 0.60 / 0.10 = 6.0 and 2.30 / 0.30 = 7.7. Its crosses are near the decode curves, but
# at 32,000 the sparse cross lies lower than the curve, and that makes the whole ratio:

# %%
for model, said in costs.SAID.items():
    for n, dollars in said:
        there = published["decode", model].at(n)
        print(f"{model:13} at {n:,}: said {dollars:.2f}, is {there:.2f}")
at32 = old["decode"].at(32_000) / new["decode"].at(32_000)
claim(
    "C11.3",
    3 < at32 < 4,
    f"at 32,000 tokens decoding is {at32:.1f} times cheaper, not 6 times",
    value=f"{at32:.1f}",
)

# %% [markdown]
# **"Inputs over 7,000 tokens 2 to 3 times faster"**: an input is a prompt, so prefill. A token at 7,000 and a whole
# prompt of 7,000 are not the same thing. Neither is faster:

# %%
token = old["prefill"].at(7000) / new["prefill"].at(7000)
prompt = old["prefill"].total(0, 7000) / new["prefill"].total(0, 7000)
whole = [n for n in range(1000, 131_000, 1000)
         if old["prefill"].total(0, n) > 2 * new["prefill"].total(0, n)]  # fmt: skip
print(f"token {token:.2f}, whole prompt {prompt:.2f}")
claim(
    "C11.4",
    prompt < token < 1 and 75_000 < whole[0] < 95_000,
    f"at 7,000 tokens dense prefill is cheaper; a token costs half from"
    f" {reach['prefill'][2] / 1e3:.0f} thousand on, a whole prompt from"
    f" {whole[0] / 1e3:.0f} thousand",
)

# %% [markdown]
# **"Linear"**: if the speed, or the cost, of a whole prompt were linear in its length, doubling the length would
# double the cost: power 1. A token's cost grows along a straight line in both models, so a prompt's grows faster:

# %%
powers = {m: costs.power(published["prefill", m], 131_071)
          for m in (DENSE, SPARSE)}  # fmt: skip
print(", ".join(f"{m}: power {x:.2f}" for m, x in powers.items()))
claim(
    "C11.5",
    1.2 < powers[SPARSE] < 1.5 < 1.7 < powers[DENSE],
    "from 64 to 128 Ki the cost of a prompt grows with the power"
    f" {powers[SPARSE]:.1f} sparse and {powers[DENSE]:.1f} dense",
)

# %% [markdown]
# Nearly linear is right for sparse attention *so far*: the indexer is quadratic and takes over beyond (chapter 01).
#
# **And what was not said**: below the crossover the new model is the dearer one.

# %%
meet = {p: crossing(old[p], new[p]) for p in old}
dearest = {p: max(new[p].at(n) / old[p].at(n) - 1 for n in range(0, 4096))
           for p in old}  # fmt: skip
claim(
    "C11.6",
    all(d > 0.15 for d in dearest.values()),
    "sparse is dearer below"
    f" {meet['prefill']:,.0f} (prefill) and {meet['decode']:,.0f} tokens"
    f" (decode), by up to {dearest['prefill']:.0%} and"
    f" {dearest['decode']:.0%}",
)

# %% [markdown]
# ## A slope is a rate
#
# Why are the curves where they are? Take the simplest, dense prefill. Each position adds one more key to look at. The
# figure says what that costs in dollars, two dollars are 3,600 seconds of a GPU, and chapter 01 says how many FLOP it
# is. Dividing gives the speed at which those GPUs multiplied:

# %%
guess = predict("Which share of the H800's peak, 989 TFLOP/s?", 0.3)

# %%
mha = roofline.mha_pair_flops(real)
flop = real.num_hidden_layers * mha
dollars = 0.6658 - 0.0529  # what 131,071 more keys cost, a million times
seconds = dollars / 1e6 / (2 / 3600) / 131_071
rate = flop / seconds
print(f"{flop:,} FLOP in {seconds * 1e9:.2f} ns: {rate / 1e12:.0f} TFLOP/s")
theirs = flop / curves.seconds_per_position(old["prefill"])
claim(
    "C11.7",
    math.isclose(rate, theirs) and 590e12 < rate < 600e12,
    f"the slope of dense prefill implies {rate / 1e12:.0f} TFLOP/s",
)
guess.reveal(
    rate / 989.5e12,
    "large products on long prompts: that is what a good kernel reaches.",
)

# %% [markdown]
# A **roofline** turns this round. Its rule: a kernel takes the longer of two times, its FLOP over the rate at which the
# machine multiplies, and its bytes over the rate at which memory delivers. Rates come from those who wrote the
# kernels: FlashMLA's authors state 660 TFLOP/s for dense decoding on an H800, 640 for sparse prefill, 410 for sparse
# decoding with an FP8 cache. Users measured 960 to 1,145 for DeepGEMM's index scores. For MHA prefill at these widths nobody
# published a rate; 600 is *assumed*. Dense decoding by hand, for one key in all layers:

# %%
mqa = real.num_hidden_layers * roofline.mqa_pair_flops(real)
cached = real.num_hidden_layers * 2 * (512 + 64)  # bytes, bf16
multiply, read = mqa / 660e12, cached / 3.35e12
print(f"multiply {multiply * 1e9:.1f} ns, read {read * 1e9:.1f} ns")
one = curves.seconds_per_position(old["decode"])
print(f"the figure: {one * 1e9:.1f} ns")

# %% [markdown]
# The figure lies a tenth above. Deployed models *draft*: a small extra layer guesses one token ahead (multi-token
# prediction, MTP), a pass checks two tokens at once, and the second is right in 85 to 90 % of cases, says the V3
# report. So a pass multiplies twice, reads once, and yields 1.85 tokens:

# %%
by_hand = max(2 * multiply, read) / 1.85
print(f"with MTP: {by_hand * 1e9:.1f} ns")
claim(
    "C11.8",
    math.isclose(by_hand, curves.dense_seconds(real, "decode"))
    and abs(by_hand / one - 1) < 0.05,
    "dense decoding by hand is the package's, and within 5 % of the figure",
)

# %% [markdown]
# From here on we use the package's. This is scoring; the others are built alike:

# %%
print(inspect.getsource(curves.scoring_seconds))
print(H800)

# %% [markdown]
# Four numbers are *not* derived but taken over: what a token costs at position 0, in each curve. There it pays for
# weights, communication and whatever else does not depend on its position. Slopes, knees and crossovers follow.

# %%
starts = curves.starts(published)
kernels = curves.modelled(real, starts)
off = {key: curves.gap(kernels[key], published[key]) for key in kernels}
for (phase, model), gap in off.items():
    print(f"{phase:7} {model:13} at worst {gap:+.1%}")
claim(
    "C11.9",
    max(abs(gap) for gap in off.values()) < 0.10,
    "with four starts and published rates every curve is reproduced within"
    f" {max(abs(gap) for gap in off.values()):.0%} at every position",
    value=f"{max(abs(gap) for gap in off.values()):.0%}",
)

# %% [markdown]
# *At every position* is no exaggeration: both curves are piecewise linear, so their ratio is largest or smallest at a
# corner of one of them, and the corners are all checked. The knee in prefill comes out too: short prompts are read
# in masked MHA mode, and that hands over to selected keys where these become cheaper.

# %%
knee = curves.hand_over(real, "prefill")
ours = {p: crossing(kernels[p, DENSE], kernels[p, SPARSE]) for p in old}
claim(
    "C11.10",
    abs(knee / new["prefill"].positions[1] - 1) < 0.05
    and all(abs(ours[p] / meet[p] - 1) < 0.10 for p in ours),
    f"the model's knee in prefill is at {knee:,.0f} tokens, the figure's at"
    f" {new['prefill'].positions[1]:,}; its crossovers are within 10 %",
)

# %% [markdown]
# ## What the figure cannot tell
#
# A model that fits is not yet true. What would also fit? First, move one rate at a time, and leave all others:

# %%
named = {
    "MHA prefill": "mha",
    "MQA decode": "mqa",
    "sparse prefill": "sparse_prefill",
    "sparse decode": "sparse_decode",
    "scoring, prefill": "index_prefill",
    "scoring, decode": "index_decode",
    "bandwidth": "bandwidth",
    "bytes for each score": "logit_bytes",
    "tokens accepted": "accepted",
}
ranges = {}
for label, name in named.items():
    low, high = curves.range_that_fits(real, published, name)
    ranges[label] = (low, getattr(H800, name), high)

# %%
show(*costs.draw_ranges(ranges))
low, _, high = ranges["MHA prefill"]
claim(
    "C11.11",
    high / low < 1.3,
    f"MHA's rate is pinned between {low / 1e12:.0f} and"
    f" {high / 1e12:.0f} TFLOP/s",
)
low, _, high = ranges["bytes for each score"]
claim(
    "C11.12",
    high / low > 2,
    f"a score may move {low:.0f} to {high:.0f} bytes: hardly known",
)

# %% [markdown]
# **Is MTP in it?** Without it, at these rates, sparse decoding is far off. Its slope would need more than the memory
# can deliver, since each index key must be read for each token:

# %%
alone = curves.modelled(real, starts, curves.NO_MTP)["decode", SPARSE]
keys = 61 * (128 + 4)  # bytes of one token's index keys, FP8 with scales
per_token = curves.seconds_per_position(new["decode"])
needed = keys / per_token / H800.bandwidth
claim(
    "C11.13",
    curves.gap(alone, new["decode"]) > 0.25 and needed > 1.5,
    "with one token a pass the model is"
    f" {curves.gap(alone, new['decode']):.0%} too high, and the figure's"
    f" slope would need {needed:.0%} of the memory's bandwidth",
)

# %% [markdown]
# That looks like a proof. It is one only if the figure was *measured*. Do for every part of it what we did for
# dense prefill: divide FLOP by time, one token a pass, nothing else, and compare with the machine's peak.

# %%
shares = curves.shares_of_peak(real, published)
show(*costs.draw_shares(shares))
near = [abs(100 * s - 5 * round(20 * s)) < 0.05 for s in shares.values()]
claim(
    "C11.14",
    sum(near) == 5,
    f"{sum(near)} of {len(near)} parts of the figure are a multiple of 5 %"
    " of the peak, within a twentieth of a per cent",
)

# %% [markdown]
# 60.00, 40.00, 60.00, 34.99, 40.02: to the last digit that the figure's corners carry. If shares fell anywhere, one of
# them would be that close to a multiple of 5 % with a chance of one in fifty, so five of six are no accident. Nobody outside knows why. One
# explanation: a benchmark gave the utilisations, they were rounded, and **the curves were computed from FLOP counts**.
# A model of nothing but those shares fits better than ours, with no word of MTP, bandwidth or bytes:

# %%
rounded = curves.modelled(real, starts, curves.SHARES)
show(
    *costs.draw_fit(
        published, {"kernel rates": kernels, "shares of peak": rounded}
    )
)
claim(
    "C11.15",
    curves.worst(real, published, curves.SHARES) < 0.03,
    "FLOP at constant shares of the peak reproduce every curve within"
    f" {curves.worst(real, published, curves.SHARES):.1%}",
)

# %% [markdown]
# Two models, both within the figure's reach, and they disagree about what a GPU was doing. The kernel model says *how it
# can be*, the shares say *how it may have been drawn*. So MTP **cannot be identified** from the figure.
#
# **Which batch was it?** A pass over many sequences reads all weights once. The larger the batch, the less of that each
# token pays, and the more is left for multiplying:

# %%
batches = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
decode = {m: starts["decode", m] for m in (DENSE, SPARSE)}
show(*costs.draw_batch(real, decode, batches))
efficient = [curves.efficiency(real, decode[DENSE], n) for n in batches]
claim(
    "C11.16",
    efficient[1] > 1 > efficient[2] and efficient[2] < 2 * efficient[-1],
    "1,024 sequences on all GPUs together are too few to explain the dense"
    f" start, and everything from 2,048 explains it, at"
    f" {efficient[2]:.0%} to {efficient[-1]:.0%} of the FP8 peak",
)

# %% [markdown]
# A smallest batch, then, and no largest. The batch **cannot be identified** either: it moves the start of a curve, the
# start is one number, and three unknowns share it (batch, efficiency, everything that is not counted).
#
