# %% [markdown]
# # 12 Beyond: DSA among its alternatives
#
# DeepSeek Sparse Attention is one answer among several. Others choose blocks instead of tokens, or choose without
# learning how, or do not choose at all and keep a memory of fixed size. Each was published with tables in which
# it does well. Here they meet on one bench: the same model, the same lessons, the same examination, and a bill on
# which the cost of *choosing* is an item of its own.
#
# **You will be able to**
# 1. place a new sparse design on a map of four squares, and say from its square what it will miss;
# 2. compute what its proxy costs, and from which length on that is more than the attention it saves;
# 3. say when you would choose something else than DSA, and show it.
#
# **You need** [02](02_latent_attention.ipynb) (latents), [04](04_token_selection.ipynb) (how a selection
# is judged) and [05](05_training_the_indexer.ipynb) (how an indexer learns).
#
# **Afterwards**: write a fifth square into `notebooks/course/experiments/attention_variants/`, and record it with
# `{source:alternatives.command}`. Computing: **40 s**.
#
# Shape letters: `S` visible keys, `K` tokens read, `Z` tokens in a block, `N` = S / Z blocks, `H` heads, `C + R`
# numbers of a latent, `J` index heads of width `W`.

# %%
import inspect
import json
from pathlib import Path

import dsa
import matplotlib.pyplot as plt
import torch
from course.exercises.sparse_variants import check
from course.experiments import variant_bench as bench
from course.experiments.attention_variants import blocks, delta
from course.experiments.attention_variants.selective_attention import Budget
from course.figures import attention_variants as pictures
from course.ui.claims import claim
from course.ui.predict import predict
from course.ui.style import COLOURS, show, style
from dsa.datasets import corpus
from dsa.datasets.recall_tasks import Needles
from dsa.model import baselines
from torch import Tensor

FULL = False  # True: also a longer lesson for two designs, five minutes
style()

# %% [markdown]
# ## The map
#
# Most sparse attention is one scheme: **score candidates by a cheap proxy, take the best, attend to those.** Two
# places are free. What is a candidate: a token, or a block of them? And where does the proxy come from: is it
# derived from keys that are there anyway, or learned for the purpose?
#
# | | derived proxy | learned proxy |
# | --- | --- | --- |
# | **blocks** | MoBA: the mean key. Quest: a bound. NSA: a compressed key (see below) | MSA: the best index score |
# | **tokens** | SparQ: a few components of each key | **DSA**: the index score |
#
# The square below on the left is often left empty in such maps. It need not be: SparQ compares with every token,
# in a few components only, and nobody has to learn anything.
#
# Beside the map stand designs that do not choose: **dense** attention, a sliding **window**, **sinks and a
# window** (the first tokens and the last), and **Gated DeltaNet**, which keeps no keys at all; Qwen3-Next has it
# in three layers of four, and full attention in the fourth.
#
# Where they come from: MoBA is arXiv 2502.13189, Quest 2406.10774, NSA 2502.11089, MSA (MiniMax Sparse Attention)
# 2606.13392, SparQ 2312.04985, sinks 2309.17453, Gated DeltaNet 2412.06464. Each file in
# `notebooks/course/experiments/attention_variants/` says where ours differs from the original.
#
# ## What a summary forgets
#
# One query, 16 keys, four blocks of 4. These are the products q . k. Key 6 is the needle: one product of 8 among
# zeros. Block 2 is tepid throughout.

# %%
products = torch.zeros(16)
products[6] = 8.0
products[8:12] = 3.0
print([int(x) for x in products])
guess = predict("Which block has the best mean?", 1, high=3, form=".0f")

# %%
means = products.view(4, 4).mean(1)
best = products.view(4, 4).amax(1)
fig, ax = plt.subplots(figsize=(6.4, 2.3))
ax.bar(range(16), products, color=COLOURS[0], label="q . k")
for n in range(4):
    ax.hlines(means[n], 4 * n - 0.4, 4 * n + 3.4, color=COLOURS[3], lw=2)
ax.plot([], [], marker="", color=COLOURS[3], label="mean of a block")
ax.set(xlabel="key", ylabel="product")
ax.legend()
show(
    fig,
    "Means of the four blocks: "
    + ", ".join(f"{m:.0f}" for m in means)
    + "; best keys: "
    + ", ".join(f"{b:.0f}" for b in best)
    + ".",
)
guess.reveal(
    int(means.argmax()), "a single key has a share of 1 / Z in the mean."
)
claim(
    "mean-misses-best",
    int(means.argmax()) == 2 and int(best.argmax()) == 1,
    "the mean prefers the tepid block, the best key is in another",
)

# %% [markdown]
# That is the weakness of every mean, and it grows with the block. What else can be said of a block without
# looking at each key? **A bound.** Quest keeps the least and the greatest value of each component. No key of the
# block can exceed the product of q with the better of the two, component by component.

# %%
generator = torch.Generator().manual_seed(0)
q = torch.randn(1, 5, 3, 8, generator=generator)  # (B, T, H, W)
keys = torch.randn(1, 20, 8, generator=generator)  # (B, S, W)
size, scale = 4, 0.35


def my_bounds(q, keys):
    """The most that a key of each block could score, by hand."""
    found = torch.zeros(1, 5, 3, 5)
    for n in range(5):
        block = keys[0, 4 * n : 4 * n + 4]
        least, greatest = block.amin(0), block.amax(0)
        for t in range(5):
            best = torch.maximum(q[0, t] * least, q[0, t] * greatest)
            found[0, t, :, n] = scale * best.sum(-1)
    return found


# %%
from course.experiments.attention_variants import moba, msa, quest, sparq

exact = scale * torch.einsum("bthw,bsw->bths", q, keys)
top = exact.unflatten(-1, (5, 4)).amax(-1)
mean = exact.unflatten(-1, (5, 4)).mean(-1)
bound = quest.bounds(q, keys, size, scale)
claim(
    "bound-and-mean-by-hand",
    torch.allclose(my_bounds(q, keys), bound, atol=1e-5)
    and torch.allclose(
        mean, moba.mean_logits(q, keys, size, scale), atol=1e-5
    ),
    "the bound and the mean by hand are the package's",
)
claim(
    "bound-never-beaten",
    bool((bound >= top - 1e-5).all() and (mean <= top + 1e-5).all()),
    "no key beats its block's bound, and no mean beats the best key",
)
print(f"bound - best key: {float((bound - top).mean()):.1f}")
print(f"best key - mean:  {float((top - mean).mean()):.1f}")

# %% [markdown]
# Both are wrong, in opposite directions. A bound may promise a key that does not exist; a mean may hide one that
# does. MSA has neither of these problems, since it scores all tokens, by a learned index, and takes the block's best:

# %%
print(inspect.getsource(msa.best_token))

# %% [markdown]
# And tokens without learning? A product is mostly made where q is large. SparQ takes the r largest components of
# q and ignores the rest. With all of them it would be attention itself:

# %%
full = sparq.short_products(q, keys, 8, scale)
claim(
    "all-components",
    torch.allclose(full, exact, atol=1e-5),
    "with all components, short products are the products",
)
few = sparq.short_products(q, keys, 3, scale)
pairs = torch.stack([few.flatten(), exact.flatten()])
print(f"with 3 of 8 components, correlation {pairs.corrcoef()[0, 1]:.1f}")

# %% [markdown]
# Designs that choose blocks share three rules, which are easy to get wrong (exercise 12.2). The query's own block
# is always read, as far as the query. Only blocks that end before it compete: a summary of its own block would
# contain the future. And what is chosen is a list of tokens, so that the same kernel attends to it.

# %%
scores = torch.tensor([[[0.3, 0.9, 0.1, 0.5, 0.7]]]).expand(1, 20, 5)
chosen = blocks.best(scores, 3, S=20, size=4)
for t in (3, 9, 18):
    print(f"query {t:2} reads blocks", sorted(set(chosen[0, t].tolist())))
tokens = blocks.tokens_of(chosen, S=20, size=4)
claim(
    "no-future",
    bool((tokens[0] <= torch.arange(20)[:, None]).all()),
    "no query reads a token of its future",
)

# %% [markdown]
# (-1 is an empty place: early queries have too few blocks to choose from.)
#
# ## One bench for choices
#
# Now a real model, and no training yet. The dense model of this course reads text with needles; its queries, keys
# and attention are kept, and every design says what it *would* have read, 32 tokens each. Two numbers judge it: how
# many of the far needles, more than 64 tokens back, are among them, and how much of the attention? Two more choices
# frame the designs: `oracle` reads the tokens with the most attention, `random` reads any. Blocks are of 8 tokens.

# %%
warmed = dsa.from_pretrained("../data/warmed")
text = corpus.load("../data/texts")
task = Needles(text, length=256, pairs=8, queries=8)
episodes = task.generate(torch.Generator().manual_seed(1), 6)
layers = pictures.read_layers(warmed, episodes.tokens)
print(pictures.CHOOSERS)

# %%
guess = predict(
    "What share of far needles lie in the blocks of best mean?", 0.5
)

# %% tags=["nbval-ignore-output"]
draw = pictures.draw_choices(layers, episodes)
show(*draw(keys=32, block=8, layer=2))

# %% tags=["nbval-ignore-output"]
judge = pictures.evaluate_chooser
found = {
    who: judge(layers[2], episodes, who, Budget())
    for who in pictures.CHOOSERS
}
guess.reveal(found["moba"][0], "the needle is one key in a block of 8.")
claim(
    "far-needles-by-design",
    min(found[who][0] for who in ("dsa", "sparq", "msa")) > 0.95
    and found["moba"][0] < 0.9
    and found["window"][0] == found["sinks"][0] == 0,
    "DSA, SparQ and MSA hold more than 95% of the far needles, the best"
    " means less than 90%, places alone none",
)
claim(
    "window-mass-no-needle",
    found["window"][1] > 0.8 and found["window"][0] == 0,
    "the window keeps more than 80% of the attention and no far needle",
)

# %% [markdown]
# The window is why "attention kept" alone is a poor examination: most attention is near, and what matters may be far.
#
# DSA's index, which MSA borrows here, was taught by this very model's attention. That SparQ is as good *without*
# being taught should make you curious, all the more as the two proxies cost the same here:

# %%
config = warmed.config
learned = 2 * config.index_n_heads * config.index_head_dim
derived = 2 * config.num_attention_heads * Budget().components
claim(
    "proxy-flop",
    learned == derived,
    f"DSA's and SparQ's proxies need {learned} FLOP each to compare a query"
    " with a key",
)

# %% [markdown]
# All three look at each token. A summary does not, and pays for it the more, the larger its block:

# %% tags=["nbval-ignore-output"]
sizes = (4, 8, 16)
for who in ("msa", "quest", "moba", "dsa"):
    line = [
        judge(layers[2], episodes, who, Budget(block=Z))[0] for Z in sizes
    ]
    print(f"{who:6}", [f"{x:.1f}" for x in line])
    if who == "moba":
        small, large = line[0], line[-1]
claim(
    "larger-blocks-find-fewer",
    small > large + 0.2,
    "with blocks of 16 instead of 4 the best mean finds far fewer needles",
)

# %% [markdown]
# With larger blocks a budget of 32 also buys fewer of them: two of 16, one of which is the query's own. Real
# systems have 16 blocks of 128 (MSA's default) or 16 of 64 (NSA's), hence more to choose from; the dilution of
# the mean is larger there too.
#
# Move the controls. In which layer does no design do well, not even the best possible choice?

# %% tags=["nbval-ignore-output"]
from course.ui.panel import Choice, Panel, Slider, static_snapshots

Panel(
    draw,
    keys=Choice("tokens read", (32, 64, 96), 32),
    block=Choice("tokens in a block", (4, 8, 16), 8),
    layer=Slider("layer", 0, 2, 2),
)

# %% [markdown]
# The same for readers without a kernel:

# %% tags=["nbval-ignore-output"]
static_snapshots(
    draw,
    [
        {"keys": 32, "block": 4, "layer": 2},
        {"keys": 32, "block": 16, "layer": 2},
        {"keys": 32, "block": 8, "layer": 0},
    ],
    columns=1,
)

# %%
oracle = baselines.oracle(layers[0].attention_probs, 32)
kept = baselines.attention_recall(layers[0].attention_probs, oracle)[
    :, 32:
].mean()
claim(
    "layer-0-is-diffuse",
    kept < 0.7,
    "in layer 0 the best 32 tokens hold less than 70% of the attention",
)

# %% [markdown]
# Layer 0 spreads its attention. No proxy mends that; a layer like this wants a larger K, or no sparsity.
#
# **NSA is not in the picture**, because it needs training to be itself. It has three branches: attention to
# compressed keys, one a block, made by a small network; attention to the blocks that got most of that; and a
# window. Gates mix the three. Its proxy earns its keep, since the compressed keys are attended to, and so the
# network learns from the language loss: half a step from "derived" to "learned", without a second loss. It is in
# the tables below.
#
# ## No keys at all
#
# A head of Gated DeltaNet keeps a matrix M, W x V numbers (W is here the width of *its* keys), whatever the length.
# Each token does three things to it:

# %%
print(inspect.getsource(delta.recurrent))

# %% [markdown]
# Fade, ask, correct. The difference to older linear attention is in the asking: that one *adds* k v^T, this one
# first looks what M holds for k, and writes only what is missing. So a key can be overwritten:

# %%
key = torch.eye(4)[[0, 1, 2, 1]][None, :, None]  # (B, T, H, W)
value = torch.tensor([1.0, 2.0, 3.0, 7.0]).view(1, 4, 1, 1)
ask = torch.eye(4)[1].expand(1, 4, 1, 4)  # always for key 1
always, never = torch.ones(1, 4, 1), torch.zeros(1, 4, 1)
out = delta.recurrent(ask, key, value, never, always)
print("what the memory holds for key 1:", out.flatten().tolist())
claim(
    "delta-overwrites",
    out.flatten().tolist() == [0, 2, 2, 7],
    "key 1 is written as 2, survives key 2, and is overwritten with 7",
)

# %% [markdown]
# Token by token is the definition, and slow. Within a chunk of tokens the corrections depend on each other by a
# triangular system, and solving it gives all of them at once:

# %%
draws = torch.Generator().manual_seed(3)
shape = (2, 70, 3)
unit = torch.nn.functional.normalize
asked = unit(torch.randn(*shape, 8, generator=draws), dim=-1)
k = unit(torch.randn(*shape, 8, generator=draws), dim=-1)
v = torch.randn(*shape, 5, generator=draws)
fades = -torch.rand(shape, generator=draws)
writes = torch.rand(shape, generator=draws)
one_by_one = delta.recurrent(asked, k, v, fades, writes)
by_chunk = delta.chunked(asked, k, v, fades, writes, chunk=16)
claim(
    "delta-chunks",
    torch.allclose(one_by_one, by_chunk, atol=1e-5),
    "chunks of 16 compute what 70 single steps do",
)

# %% [markdown]
# How much does M hold? Keys of width 24 span 24 directions. We write n random keys, each with one of 16 values,
# and ask for all of them. Once by the delta rule, once by adding, as older linear attention does.

# %%
guess = predict(
    "Of 96 keys, what share does the delta rule read back?", 0.5
)


# %%
def read_back(n, correct):
    """Write n random keys, then ask for all: right or not, (64, n)."""
    draws = torch.Generator().manual_seed(n)
    k = unit(torch.randn(64, n, 24, generator=draws), dim=-1)
    wanted = torch.randint(16, (64, n), generator=draws)
    v = torch.nn.functional.one_hot(wanted, 16).float()
    memory = torch.zeros(64, 24, 16)
    for t in range(n):
        held = torch.einsum("bw,bwv->bv", k[:, t], memory)
        new = v[:, t] - held if correct else v[:, t]
        memory += torch.einsum("bw,bv->bwv", k[:, t], new)
    out = torch.einsum("btw,bwv->btv", k, memory)
    return (out.argmax(-1) == wanted).float()


counts = (4, 8, 16, 24, 32, 48, 64, 96)
found = {
    "delta rule": [read_back(n, True) for n in counts],
    "adding": [read_back(n, False) for n in counts],
}
share = {name: [float(x.mean()) for x in f] for name, f in found.items()}
age = {name: f[-1].mean(0).flip(0) for name, f in found.items()}

# %% tags=["nbval-ignore-output"]
fig, axes = plt.subplots(1, 2, figsize=(7.6, 2.7), sharey=True)
for name in found:
    axes[0].plot(counts, share[name], label=name)
    recent = age[name].unflatten(0, (12, 8)).mean(1)
    axes[1].plot(range(4, 96, 8), recent, label=name)
axes[0].set(xlabel="keys written", ylabel="read back", ylim=(0, 1.05))
axes[1].set(xlabel="of 96 keys: written so many ago")
axes[0].legend()
words = "; ".join(
    f"{name} " + ", ".join(f"{x:.0%}" for x in line)
    for name, line in share.items()
)
show(fig, f"Read back of {', '.join(map(str, counts))} keys: {words}.")

# %% tags=["nbval-ignore-output"]
guess.reveal(
    share["delta rule"][-1], "each new key wipes out a little of the old."
)
last = {name: float(line[:8].mean()) for name, line in age.items()}
claim(
    "delta-reads-back",
    share["delta rule"][1] > 0.95
    and share["delta rule"][-1] < share["adding"][-1] < 0.75
    and last["delta rule"] > 0.9 > last["adding"],
    f"8 keys are read back; of 96 the delta rule reads fewer than adding"
    f" does, but of the last 8 it reads {last['delta rule']:.0%}, adding"
    f" {last['adding']:.0%}",
)

# %% [markdown]
# Did you expect the delta rule to hold *more*? With random keys it holds less. By correcting it makes what is
# newest exact, at the expense of what is old; adding treats all ages alike and blurs them all. In text keys come
# back and their values change, and there exactness pays. Either way a new
# key disturbs all that are not orthogonal to it, and no more than W keys can all be orthogonal.
#
# Attention has no such limit: it can read any of a million keys, because it has kept a million. That is what one
# full layer in four is for, and why its cache grows after all.
#
# **A short training, live.** Our dense model has three layers. The hybrid gets four: Gated DeltaNet in the place
# of the first two attentions, a new layer, and the last attention as it was. The new parts know nothing. As DSA's
# indexer learns to imitate attention's *shares*, they learn to imitate its *output*, for the same input, with all
# else frozen:

# %% tags=["nbval-ignore-output"]
short = Needles(text, length=128, pairs=4, queries=4)
eval_set = short.generate(torch.Generator().manual_seed(5), 16)


def recall(model):
    """The share of questions answered right."""
    with torch.no_grad():
        return float(
            eval_set.correct(model(eval_set.tokens)).float().mean()
        )


grown = bench.hybrid(warmed, short, steps=0).eval()
before = recall(grown)
grown = bench.hybrid(warmed, short, steps=150).eval()
after = recall(grown)
print(f"needles before {before:.0%}, after 150 steps {after:.0%}")
full, was = grown.model.layers[-1], warmed.model.layers[-1].state_dict()
untouched = all(torch.equal(x, was[n]) for n, x in full.named_parameters())
claim(
    "hybrid-needs-warm-up",
    before < 0.3 and after > 0.7 and untouched,
    "without the warm-up the hybrid recalls less than 30% of the needles,"
    " after 150 steps more than 70%, its full layer untouched",
)

# %% [markdown]
# No language loss was used, and the layer that looks needles up has not changed by a bit. It has merely got the
# input it was used to: which token came before, for instance, is a thing that a fixed memory holds easily.
#
# ## Equal lessons, one examination
#
# **Recorded** with `{source:alternatives.command}`, {source:alternatives.date}: every design starts from the same
# dense model and gets {source:alternatives.options.steps} steps of {source:alternatives.options.batch} sequences
# of {source:alternatives.options.length} tokens, the same ones in the same order; three seeds. A query reads
# {source:alternatives.options.keys} tokens, in blocks of {source:alternatives.options.block}. The examination is
# on files that were held out: needles by distance, and bits per byte of plain text. In the table below the figure,
# *recall* is the range of the three seeds and *before* what the design recalls before its lessons.
#
# What is equal and what is not: learned proxies and the hybrid's new layers had 150 steps of imitation before,
# and the others nothing to imitate. The lessons are short. They show how a design lives with a model that was
# trained dense, which is DSA's own history; they do not show what NSA, MoBA or Gated DeltaNet become when a model
# is trained with them from its first step, as their authors do.

# %%
record = json.loads(
    Path("../data/measurements/alternatives.json").read_text()
)
runs, steps = record["runs"], record["options"]["steps"]
length = record["options"]["length"]
show(*pictures.draw_distances(runs, length, steps))

# %%
print(f"{'':20}recall       before  bits")
for design in bench.DESIGNS:
    now = bench.measure_by_seed(runs, design, "recall", steps)
    first = bench.measure_by_seed(runs, design, "recall", 0)
    bits = bench.measure_by_seed(runs, design, "bits", steps)
    print(
        f"{pictures.NAMES[design]:18}",
        f"{min(now):.2f}-{max(now):.2f}",
        f"  {sum(first) / len(first):.2f}",
        f"      {sum(bits) / len(bits):.2f}",
    )

# %%
least = {
    d: min(bench.measure_by_seed(runs, d, "recall", steps))
    for d in bench.DESIGNS
}
most = {
    d: max(bench.measure_by_seed(runs, d, "recall", steps))
    for d in bench.DESIGNS
}
claim(
    "recall-by-design",
    min(least[d] for d in ("dense", "dsa", "sparq", "msa")) > 0.95,
    "with every seed DSA, SparQ and MSA recall more than 95%, as dense"
    " attention does",
    kind="recorded",
)
claim(
    "worst-against-best",
    max(most[d] for d in ("moba", "nsa", "window", "sinks"))
    < min(least[d] for d in ("dsa", "sparq", "msa", "delta")),
    "the worst seed of DSA, SparQ, MSA and the hybrid is better than the"
    " best of MoBA, NSA, window and sinks",
    kind="recorded",
)

# %% [markdown]
# Three things to see.
#
# **Who looks at each token recalls; who looks at summaries recalls less; who looks at places recalls what is
# near.** MSA belongs to the first: it reads blocks, but it scores tokens. (NSA compares badly with MoBA here
# perhaps because it spends one of its four blocks on the window. And sinks are worth nothing in this small model:
# four tokens more of window would have been as good.)
#
# **The short lessons did not mend the summaries.** A model could learn to write keys that stand out in a mean,
# and MoBA's and NSA's authors report that models trained so from the start do well. Ours did not begin to in
# {source:alternatives.options.steps} steps: MoBA and NSA recall less than before. A longer lesson is recorded at the
# end.
#
# **Plain text hardly notices.** The bits lie close together.


# %%
def mean_bits(design):
    """Mean over seeds of bits per byte after training."""
    found = bench.measure_by_seed(runs, design, "bits", steps)
    return sum(found) / len(found)


gap = mean_bits("window") - mean_bits("dsa")
claim(
    "window-costs-little",
    0 < gap < 0.1,
    f"a window of 32 costs {gap:.2f} bits per byte against DSA",
    value=f"{gap:.2f}",
    kind="recorded",
)
claim(
    "hybrid-recalls",
    mean_bits("delta") > mean_bits("window") and least["delta"] > 0.9,
    "the hybrid finds more than 90% of the needles and reads plain text"
    " worse than the window does",
    kind="recorded",
)

# %% [markdown]
# By the bits alone, a window of 32 tokens loses {claim:window-costs-little} to DSA, and nobody would build an indexer
# for that. By the needles it loses all that lies beyond it. The hybrid is the other way round: its new layers have
# learned in a few hundred steps what the lookup needs, and not yet all that the dense layers knew of text.
#
# ## The bill
#
# Now the cost, and at real sizes: V3.2's config, one layer, one new token that sees S. All designs on the same
# MLA, and with the same 2,048 tokens read, blocks of 128, 64 components for SparQ. Counted, not measured. The
# proxy has two items, the matrices that make it and the products that compare it. Left out are the matrices that
# every layer has in some form, and whatever a kernel does besides.

# %%
from course.experiments.variant_costs import token_cost
from dsa.analysis import flops

real = dsa.Config.v32_exp()
show(*pictures.draw_split(real, 131_072))

# %%
long = {d: token_cost(d, real, 131_072) for d in bench.DESIGNS}
share = long["dsa"].scoring / (long["dsa"].scoring + long["dsa"].attention)
claim(
    "choosing-share",
    0.78 < share < 0.8,
    f"at 128 Ki, choosing takes {share:.0%} of DSA's FLOP",
    value=f"{share:.0%}",
)
claim(
    "same-scoring-flop",
    long["dsa"].scoring == long["sparq"].scoring == long["msa"].scoring,
    "DSA, MSA with DSA's indexer, and SparQ with 64 components need exactly"
    " the same FLOP for scoring",
)
ratio = long["dsa"].flops / long["moba"].flops
claim(
    "block-means-cost-less",
    3 < ratio < 5,
    f"a mean for each block of 128 costs {ratio:.1f} times less in all",
    value=f"{ratio:.1f}",
)

# %% [markdown]
# That three designs need the same FLOP is a coincidence of sizes, 64 heads of width 128 against 128 heads of 64
# components, and a useful one: on paper the learned proxy is no cheaper than the derived one. DSA's advantage is
# elsewhere: its index keys are 128 numbers that lie together and are read in FP8, where SparQ picks other components
# of each latent for each query. No memory likes that, and we have counted it as if memory did.
#
# And MSA? MiniMax's own indexer has 4 heads, not 64: a sixteenth of the products. Blocks are then chosen by their
# best token, and read in one piece. What that saves is in no FLOP:

# %%
for design in ("dsa", "msa", "moba", "sparq"):
    one = long[design]
    print(
        f"{pictures.NAMES[design]:6} ranks {one.candidates:>7,} candidates,"
        f" reads {one.places:>5,} places"
    )
claim(
    "places-read",
    long["dsa"].places == 128 * long["msa"].places,
    "DSA reads from 2,048 places what MSA reads from 16",
)

# %% [markdown]
# Now by length, and beside what must be kept. First a guess:

# %%
guess = predict(
    "From how many tokens on does DSA cost less than the hybrid?",
    50_000,
    low=1,
    high=2_000_000,
    form=",.0f",
)

# %%
show(*pictures.draw_token_costs(real))


# %%
def first_below(cheap, dear):
    """The first length, in steps of 64, at which one costs less."""
    for keys in range(64, 2**20, 64):
        if (
            token_cost(cheap, real, keys).flops
            < token_cost(dear, real, keys).flops
        ):
            return keys
    return None


meets = {other: first_below("dsa", other) for other in ("dense", "delta")}
print(meets)
guess.reveal(
    meets["delta"], "a quarter of full attention still grows with S."
)
claim(
    "dsa-pays-from",
    2_000 < meets["dense"] < 2_500 and 8_000 < meets["delta"] < 20_000,
    f"DSA costs less than dense attention from {meets['dense']:,} visible"
    f" tokens on, and less than the hybrid from {meets['delta']:,}",
)

# %%
prompt = flops.crossover(real, "prefill")
claim(
    "roofline-agrees",
    abs(meets["dense"] - flops.crossover(real, "decode")) < 64
    and 9_000 < prompt < 9_200,
    f"the count of chapter 09a agrees, and says {prompt:,.0f} for reading"
    " a prompt",
)

# %% [markdown]
# (A prompt is read with dense attention's cheaper mode, MHA, so there sparse attention pays later.)
#
# Four kinds of curve. Dense grows with S, and the hybrid a quarter as fast. DSA grows {claim:slope-against-dense}
# times slower than dense, and means of blocks {claim:slope-of-means} times slower than DSA. A window does not grow.
# *Everything that chooses among all tokens is linear in S for each token*, quadratic for a text; the constant is what
# differs:


# %%
def slope(design):
    """FLOP for one more visible token, beyond K."""
    here, there = (
        token_cost(design, real, n).flops for n in (2**16, 2**17)
    )
    return (there - here) / 2**16


ratios = (slope("dense") / slope("dsa"), slope("dsa") / slope("moba"))
claim(
    "slope-against-dense",
    ratios[0] == 17,
    f"DSA's slope is {ratios[0]:.0f} times less than dense attention's",
    value=f"{ratios[0]:.0f}",
)
claim(
    "slope-of-means",
    14 < ratios[1] < 14.5,
    f"the slope of means of 128 is {ratios[1]:.0f} times less than DSA's",
    value=f"{ratios[1]:.0f}",
)

# %% [markdown]
# In memory the order is another one. Whoever may read any token must keep them all, and DSA (like MSA) keeps an index
# key besides: the most of any design here. Only those that forget save memory, and what the hybrid remembers instead
# is not small: its matrices are as large as {claim:hybrid-memory} latents, in a short text and in a long one.
#
# ## One table
#
# Recall of needles more than 128 back and bits per byte are recorded, from the bench; the rest is counted at
# V3.2's sizes: numbers stored for each token, and MFLOP for a token in one layer at three lengths, with the
# proxy's share of them at the last. (What the hybrid and the windows keep once for a whole text is not in the
# column.)

# %%
far = f"to {length}"
lengths = f"{'8 Ki':>6} {'128 Ki':>6} {'1 Mi':>7}"
print(f"{'':18}  far  bits  stored  {lengths} proxy")
for design in bench.DESIGNS:
    found = bench.measure_by_seed(runs, design, far, steps)
    three = [token_cost(design, real, n) for n in (2**13, 2**17, 2**20)]
    work = [f"{one.flops / 1e6:,.0f}" for one in three]
    choosing = 1 - three[-1].attention / three[-1].flops
    print(
        f"{pictures.NAMES[design]:18} {sum(found) / len(found):.2f}",
        f" {mean_bits(design):.2f}  {three[0].stored:6.0f}",
        f"{work[0]:>7} {work[1]:>6} {work[2]:>7} {choosing:5.0%}",
    )

# %% [markdown]
# ## Exercises
#
# Write the function, run its cell and the check below it. Nothing happens if you skip one.

# %% [markdown]
# {exercise:sparse_variants.my_bound}

# %% [markdown]
# {exercise:sparse_variants.my_blocks}

# %% [markdown]
# {exercise:sparse_variants.my_step}

# %% [markdown]
# {exercise:sparse_variants.my_meeting}

# %% [markdown]
# ## Where DSA loses
#
# **In short texts.** Below K there is nothing to leave out, and the indexer has been paid for:

# %%
short_text = {d: token_cost(d, real, 1024).flops for d in bench.DESIGNS}
more = short_text["dsa"] / short_text["dense"] - 1
claim(
    "dearer-at-1024",
    more > 0.1,
    f"at 1,024 tokens DSA needs {more:.0%} more FLOP than dense attention",
    value=f"{more:.0%}",
)

# %% [markdown]
# **In very long ones.** At a million tokens nearly all of its work is choosing, and a proxy by block is far
# below:

# %%
million = {d: token_cost(d, real, 2**20) for d in bench.DESIGNS}
asking = million["dsa"].scoring / million["dsa"].flops
claim(
    "million-scoring",
    asking > 0.95 and million["dsa"].flops > 5 * million["quest"].flops,
    f"at a million tokens {asking:.0%} of DSA's work is scoring, and it"
    " needs more than five times the FLOP of Quest's bounds",
)

# %% [markdown]
# **In memory, always**, if all store their numbers alike. (What FP8 saves in DSA's cache it could save in any.)

# %%
kept = {d: million[d].memory(2**20) / 1e6 for d in bench.DESIGNS}
claim(
    "million-memory",
    max(kept, key=kept.get) in ("dsa", "msa")
    and kept["delta"] < 0.3 * kept["dsa"],
    f"a million tokens: DSA keeps {kept['dsa']:,.0f} million numbers a"
    f" layer, dense {kept['dense']:,.0f}, the hybrid"
    f" {kept['delta']:,.0f}, a window {kept['window']:,.1f}",
)
same = million["delta"].state / million["dense"].stored
claim(
    "hybrid-memory",
    2_000 < same < 4_000,
    f"the hybrid's memories are as large as {same:,.0f} latents",
    value=f"{same:,.0f}",
)

# %% [markdown]
# **On plain local text** a window is nearly as good, and on a model that must not be touched SparQ or
# Quest need no training at all. **Where attention is diffuse** every choice loses, DSA's too.
#
# And one loss that no table here shows: DSA, as it was published, needs a dense model first, and then two more stages
# of training. A design that is trained so from the beginning needs neither.
#
# ## When would you choose which?
#
# | your situation | choose | because |
# | --- | --- | --- |
# | texts below a few thousand tokens | dense | nothing to save |
# | a trained model, no training possible | SparQ or Quest | derived proxies work at once (*before* above) |
# | a trained dense model, long texts, far facts | **DSA** | recall of dense, {claim:slope-against-dense} times less slope |
# | the same, and hardware that wants blocks | MSA | same recall here, 16 places instead of 2,048 |
# | a million tokens, training from the start | blocks by summary | a far cheaper proxy |
# | memory is what runs out | Gated DeltaNet with some full layers | a quarter of the cache |
# | only what is near matters | window | |
#
# The right column is what this course's small model and counted costs support. Quality at 100 billion parameters
# is a matter for those who can train them; each of these designs has authors who report that it works.
#
# ## A longer lesson
#
# Would more training mend the summaries? **Recorded** with `{source:alternatives_longer.command}`,
# {source:alternatives_longer.date}: {source:alternatives_longer.options.steps} steps instead of
# {source:alternatives.options.steps}, all else as before.

# %%
path = Path("../data/measurements/alternatives_longer.json")
longer = json.loads(path.read_text())
more = longer["options"]["steps"]
print(f"{'recall':8}   0 steps   {steps} steps   {more} steps")
ends = {}
for design in ("moba", "quest", "nsa"):
    first = bench.measure_by_seed(runs, design, "recall", 0)[0]
    now = bench.measure_by_seed(runs, design, "recall", steps)
    ends[design] = bench.measure_by_seed(
        longer["runs"], design, "recall", more
    )
    print(
        f"{pictures.NAMES[design]:8} {first:7.2f}",
        f"    {min(now):.2f}-{max(now):.2f}",
        f" {min(ends[design]):.2f}-{max(ends[design]):.2f}",
    )
claim(
    "longer-summaries",
    max(max(found) for found in ends.values()) < min(least["dsa"], 0.95),
    f"after {more} steps no summary recalls as DSA does after {steps}",
    kind="recorded",
)

# %%
read = {
    d: sum(bench.measure_by_seed(longer["runs"], d, "bits", more)) / 3
    for d in ends
}
claim(
    "longer-prose",
    all(read[d] < mean_bits(d) for d in ends),
    "plain text is read better meanwhile, by each of the three",
    kind="recorded",
)

# %% [markdown]
# It did not. What was learned, it seems, was the text, which fills most of each sequence. One reason may be the one
# of chapter 05: the language loss passes through the tokens that were read, so a key that its block hides gets no
# gradient that would make it stand out. (We have not tested that.) NSA's compressed branch is a way round, since
# every block is attended to a little; in so few steps it did not help. Try it live with `FULL = True`, about two
# minutes for each design.

# %%
if FULL:
    library = corpus.load()
    bench.bench(
        warmed,
        library,
        designs=("moba", "quest"),
        seeds=[0],
        steps=4 * steps,
    )

# %% [markdown]
# ## What you have proved
#
# A mean hides a single key, a bound never does. On one bench, with no lesson to the model, designs that look at
# tokens find the needles and those that look at summaries lose some, the more the larger the block; after equal
# lessons the order is the same. A fixed memory loses or blurs what is written beyond its width, and with one full
# layer it can take over from attention by imitation. Choosing is {claim:choosing-share} of DSA's work at 128 Ki, and
# there are lengths, memories and texts for which it is the wrong choice.
#
# **What the sources do not say, and what we chose.** How MoBA, Quest, SparQ or NSA would sit on MLA: they are
# defined for heads with keys of their own, which choose for themselves. We let one choice serve all heads, by the
# sum of each head's softmax over the candidates. NSA's branches share one latent here. SparQ's mean value for
# what was not chosen is left out. The hybrid's fourth layer, and its imitation warm-up, are ours.
#
# **Five questions**
# 1. A design scores blocks by q . mean(k) and then, inside the eight best blocks, tokens by q . k. Which square
#    is it in? What does it miss that DSA does not?
# 2. Why may the query's own block not compete by its summary, even if the summary is computed anew at each step?
# 3. MSA with DSA's indexer needs the same FLOP as DSA. Name two things it saves, and one it wastes.
# 4. A head of width 128 has read a million tokens. About how many keys can it still tell apart? Why may that be
#    enough?
# 5. DSA's slope is {claim:slope-against-dense} times less than dense attention's. Which of its sizes would you change to make it
#    forty times less, and what would you measure first?
#
# <details><summary>Answers</summary>
#
# 1. Tokens by a derived proxy, behind blocks by a derived proxy: two stages. It misses every token in a block
#    whose mean is dull.
# 2. It could: a summary of the tokens up to the query is no look into the future. But it is another summary for
#    each query, so it cannot be stored, and a fair comparison of a begun block with whole ones is hard. Always
#    reading it is simpler.
# 3. Contiguous reads, and a top-k over N instead of S. It wastes most of the tokens it reads: bystanders of the
#    one that was wanted.
# 4. About as many as it is wide, a hundred or so. Most of a text need not be told apart; it fades, and the gates
#    decide what is written at all.
# 5. J: 27 heads instead of 64 would do (MSA's own indexer has 4). Measure the needles by distance at that J, with
#    several seeds: in chapter 05 one head was a gamble.
#
# </details>
#
# **Next**: your own square. Everything you need is in `notebooks/course/experiments/attention_variants/choosing.py`:
# one class, one method. And when you ask "where was that?": [13 Reference](13_reference.ipynb) leads from each
# equation of the report to code, test and cell, holds every statement of the report and the article against what was
# found, and says every term in a sentence.
