# %% [markdown]
# # What does sparse attention keep of *my* text?
#
# A language model that reads a long text lets every token look back at every earlier one. That is what makes
# attention good, and what makes it expensive: twice the text, four times the looking. **DeepSeek-V3.2-Exp** lets
# each token look at no more than 2,048 earlier ones, whatever the length. A small network, the *lightning
# indexer*, decides which. Together they are *DeepSeek Sparse Attention*, **DSA**.
#
# So the question is not whether something is lost. It is *what*. In the next minute you will see it on a text of
# your own, with a real model of the same architecture that is small enough for any laptop: 0.6 million
# parameters, three layers, trained on Python's own source code. It reads up to 512 tokens and keeps 16 of them.
#
# **You will be able to**
# 1. see, for any text and any token, which earlier tokens are kept and which are dropped;
# 2. say how much of the attention survives, beside the best choice, the nearest tokens, and chance;
# 3. hide a needle in a text, and watch a window lose it and the indexer find it.
#
# **You need** nothing but this page. Run the cells in order with Shift-Enter, or all of them with *Run → Run All
# Cells*. Every result was computed on this page; a line that begins with ✓ was asserted by its cell, and
# the tests of this course run these cells too. **15 seconds** of computing.

# %%
import dsa
from course.figures.needle import draw_needle
from course.figures.topk_viewer import draw_topk_viewer, topk_viewer
from course.ui.claims import claim
from course.ui.environment import environment
from course.ui.panel import Panel, Slider, static_snapshots
from course.ui.predict import predict
from course.ui.reading import CHOOSERS, read_file, reader
from course.ui.style import show, style

# %% tags=["nbval-ignore-output"]
style()
print(environment())

# %%
model = dsa.from_pretrained("../data/sparse")
sizes = model.config
print(
    f"{sum(p.numel() for p in model.parameters()):,} parameters,"
    f" {sizes.num_hidden_layers} layers, reads"
    f" {sizes.max_position_embeddings} tokens, keeps {model.top_k}"
)
text = read_file("../data/texts/lighthouse.txt").strip()
print(text[text.rindex("After that") :])

# %% [markdown]
# ## First a guess
#
# A token at the end of this text sees 512 tokens, itself included. Sparse attention lets it keep 16 of them, one
# in thirty-two. If attention were spread evenly, they would hold 3% of it. **What share do the indexer's 16 tokens
# hold**, as a mean over the three layers and all tokens that see at least 64 others? Write your guess into the cell,
# 0.03 for 3%, and run it.

# %%
guess = predict("What share of the attention do the 16 hold?", 0.5)

# %% [markdown]
# ## Look
#
# Now run the next cell and play. Type or paste your own text (or `file:PATH` for a file), in any language; click
# outside the box and it is read. Move the three sliders:
#
# * **top-k** is how many tokens may be kept;
# * **layer** is which of the model's attention layers you look into: each has an indexer of its own;
# * **token** is who looks back, counted from the end of the text: 0 is the last one.
#
# A token is one byte here, so most letters are one token (DeepSeek's are word pieces). Words below the figure are
# those that hold a kept token.

# %%
topk_viewer(model, text)

# %% [markdown]
# On the left is the attention that the looking token would pay to each earlier token if it could look everywhere.
# Filled squares were kept. On the right is the share that survives for every top-k, for four ways to choose:
#
# * **oracle** takes the tokens with the most attention. Nothing can keep more, but to know them one must compute
#   the whole attention first, so it saves nothing;
# * **indexer** is what the model does: a cheap score for each token, and the best are kept;
# * **window** takes the most recent tokens;
# * **random** takes any.

# %% [markdown]
# If you read this without a kernel, here are two positions of the sliders:

# %%
draw = draw_topk_viewer(model)
ends = [{"top_k": 4, "layer": 2}, {"top_k": 64, "layer": 2}]
static_snapshots(draw, [{"text": text, "token": 0, **end} for end in ends])

# %% [markdown]
# ## How much survives
#
# One token is an anecdote. Here is the mean over all tokens that see at least 64 others, layer by layer.

# %%
import matplotlib.pyplot as plt

reading = reader(model)(text)
share = {
    who: [
        float(reading.attention_recall(who, n, 16)[64:].mean())
        for n in range(3)
    ]
    for who in CHOOSERS
}
fig, ax = plt.subplots(figsize=(7, 2.8))
hatches = dict(zip(CHOOSERS, ("", "//", "..", "xx"), strict=True))
for at, (who, hatch) in enumerate(hatches.items()):
    places = [n + at / 5 for n in range(3)]
    ax.bar(places, share[who], width=0.18, label=who, hatch=hatch)
ax.set_xticks([n + 0.3 for n in range(3)], [f"layer {n}" for n in range(3)])
ax.set(ylabel="share of attention kept", ylim=(0, 1))
ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.2))
words = "; ".join(
    f"{who} " + ", ".join(f"{x:.0%}" for x in found)
    for who, found in share.items()
)
show(fig, f"Kept by 16 tokens in layers 0, 1, 2: {words}.")

# %%
mean = {who: sum(found) / 3 for who, found in share.items()}
close = [
    a > 0.8 * b
    for a, b in zip(
        *(share[who] for who in ("indexer", "oracle")), strict=True
    )
]
claim(
    "kept-by-16",
    all(close),
    f"16 tokens chosen by the indexer keep {mean['indexer']:.0%} of the"
    f" attention, the best 16 {mean['oracle']:.0%}",
    value=f"{mean['indexer']:.0%}",
)
claim(
    "kept-by-chance",
    mean["indexer"] > 3 * mean["random"],
    f"16 tokens at random keep {mean['random']:.0%}",
    value=f"{mean['random']:.0%}",
)

# %%
claim(
    "kept-by-window",
    abs(mean["window"] - mean["indexer"]) < 0.15,
    f"the last 16 keep {mean['window']:.0%}",
    value=f"{mean['window']:.0%}",
)

# %%
guess.reveal(
    mean["indexer"],
    "in two of the three layers most of the attention goes to a few tokens,"
    " and the indexer was trained to find those. Layer 0 is spread out:"
    f" there even the best 16 hold only {share['oracle'][0]:.0%}.",
)

# %% [markdown]
# So {claim:kept-by-16} of the attention survives where chance would leave {claim:kept-by-chance} (not 3%, because
# most of these tokens see fewer than 512). But look at the window once more: on ordinary prose the *last* 16 tokens
# keep {claim:kept-by-window}, hardly less than the indexer's, because what a letter depends on is mostly the letters
# just before it. If texts were no more than that, nobody would need an indexer.
#
# ## The needle
#
# They are more. Somewhere in the text we write a symbol and a value, ⟨K7⟩⟨V11⟩. At the very end the symbol appears
# again, and the model must say the value that stood behind it. One token holds the answer, and it can be far
# away.

# %%
panel = Panel(
    draw_needle(model, text),
    depth=Slider("depth in percent", 0, 100, 25, step=5),
    top_k=Slider("top-k", 1, 64, 16),
)
panel

# %% [markdown]
# `dense` looks at everything, `window` at the last tokens only, `random` at any. Push the depth to 100 and the
# window finds the needle too; pull it back a little and the window is blind.

# %% [markdown]
# To be sure, here are 64 needles: four depths, and each of the 16 values there are.

# %%
import torch
from dsa.datasets.recall_tasks import insert_needle

needles = [
    insert_needle(text, 512, depth, key=7, value=v)
    for depth in (0.0, 0.25, 0.5, 0.75)
    for v in range(16)
]
tokens = torch.stack([needle.tokens for needle in needles])  # (64, 512)
truth = torch.tensor([needle.answer for needle in needles])


def found(who, top_k=16):
    """How many of the 64 questions the model answers right."""
    model.attention, model.top_k = who, top_k
    with torch.no_grad():
        said = model(tokens)[:, -1].argmax(-1)
    model.attention, model.top_k = "sparse", 16
    return int((said == truth).sum())


runs = {"dense": "dense", "indexer": "sparse"}
runs |= {"window": "window", "random": "random"}
right = {who: found(kind) for who, kind in runs.items()}
print(", ".join(f"{who}: {n} of 64" for who, n in right.items()))

# %%
claim(
    "needles-found",
    right["indexer"] >= 58 and right["window"] <= 8,
    f"of 64 needles the indexer finds {right['indexer']}"
    f" and a window of the same size {right['window']}",
)

# %% [markdown]
# That is the point of a *learned* choice: {claim:needles-found}. A model that cannot see
# the answer can only guess. Attention then
# reads 16 tokens either way; the indexer's own scoring comes on top, which a window does not need.

# %% [markdown]
# ## Your turn, in other scripts
#
# The tokens are raw bytes, so any script works, though this model has seen little but English and Python. Each
# character of this line is up to three tokens, and a character counts as kept when any of its bytes is.

# %%
line = (
    "Die Lampe brennt. Лампа горит. Ο φάρος ανάβει. 灯台の明かりがつく。 "
)
static_snapshots(
    draw, [{"text": line * 2, "top_k": 16, "layer": 2, "token": 0}]
)

# %% [markdown]
# ## Where it fails
#
# **Short texts.** Where there are no more than 16 tokens, nothing can be dropped, and sparse attention is dense
# attention with an indexer to pay for. In the real system the limit is 2,048 tokens.

# %%
from dsa.datasets.byte_tokenizer import encode

short = torch.tensor([encode("A short text.")])
sparse = model(short)
model.attention = "dense"
dense = model(short)
model.attention = "sparse"
gap = float((sparse - dense).abs().max().detach())
claim(
    "short-text-agrees",
    gap < 5e-5,
    f"on {short.shape[1]} tokens sparse and dense attention agree",
)

# %% [markdown]
# **Tiny top-k.** A needle needs one token, and the model finds many even with a top-k of 1. Prose needs several tokens
# at once. Its loss, in bits for each byte of text, says so (lower is better, and 8 bits would be no prediction at
# all):

# %%
from dsa.training.losses import bits_per_byte

prose = torch.tensor([reading.ids])


def bits(top_k):
    """Bits that the model needs for each byte of the text."""
    model.top_k = top_k
    with torch.no_grad():
        spent, size = bits_per_byte(model(prose), prose)
    model.top_k = 16
    return spent / size


loss = {k: bits(k) for k in (1, 2, 4, 16, 512)}
print(f"needles with top-k 1: {found('sparse', 1)} of 64")
print("bits:", ", ".join(f"top-k {k}: {b:.1f}" for k, b in loss.items()))
claim(
    "one-key-costs-bits",
    loss[1] > loss[16] + 0.4,
    f"a top-k of 1 costs {loss[1] - loss[16]:.1f} bits a byte more than 16",
)

# %% [markdown]
# ## Where to go from here
#
# You have seen *what* is kept. The course goes on to *how* and *why*:
#
# * 01 Sparse attention by hand is still to come;
# * [02 Multi-head latent attention](02_latent_attention.ipynb) is the attention that is made sparse here;
# * [03 Lightning indexer](03_lightning_indexer.ipynb) builds the scorer, and a museum of its mistakes;
# * [04 Token selection](04_token_selection.ipynb) builds the choice by hand and measures what it keeps;
# * [05 Training the indexer](05_training_the_indexer.ipynb) teaches one, live;
# * [06 Sparse training](06_sparse_training.ipynb) trains the model to live with what is chosen;
# * [07 FP8](07_fp8.ipynb) asks how much precision a ranking needs;
# * [08 Kernels](08_kernels.ipynb) turns less work into less time;
# * [09 Cost curves](09_cost_curves.ipynb) asks when it is cheaper, and by how much, for you, and
#   [09a Attention at length](09a_attention_at_length.ipynb) counts where operations and bytes go;
# * [10 The full model](10_full_model_on_a_gpu.ipynb) looks at the 671 billion parameters around it;
# * [11 Post-training](11_rl_when_attention_chooses.ipynb) goes on by reward alone, with sparse attention;
# * [12 Beyond](12_one_year_later.ipynb) sets it beside its alternatives, on one bench.
#
# Chapters start cold, in any order. A word you do not know, an equation of the report, a choice that somebody must
# have made: [13 Reference](13_reference.ipynb) leads to the cell.
#
# **Three questions to take along**
# 1. The indexer looks at *every* earlier token to score it. Why is that cheaper than attending to them?
# 2. Choosing passes no gradient. How can anyone have taught the indexer what to choose?
# 3. The layers keep different tokens. What would be lost if all layers had to share one choice?
