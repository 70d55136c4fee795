# %% [markdown]
# # 10 The full model: what is around the attention, and what does it take to run it?
#
# Sparse attention is a small part of a large machine. Of the 671 billion parameters of DeepSeek-V3.2-Exp less than
# two in a hundred belong to attention, and nearly all of the rest sleep while a token passes. This chapter looks at
# that rest, puts the whole model together, and asks what it takes to run it: on one GPU, on eight, and on none.
#
# **You will be able to**
# 1. route a token through groups of experts, and keep 256 experts equally busy without a loss term;
# 2. account for 671 billion parameters, and say how much of them one token uses;
# 3. say whether a model fits on some GPUs, how fast it could be there at best, and run it with this package.
#
# **You need** PyTorch and [02](02_latent_attention.ipynb) for what a latent is. The indexer may stay a
# black box that chooses tokens.
#
# The real weights, step by step, are at the end. Computing: **60 s** without a GPU, and 1.2 GB
# of memory for half a minute.
#
# Shape letters: `D` model width, `E` experts, `H` heads, `K` kept tokens, `n` tokens of a batch. *The report* is
# DeepSeek's on V3.2-Exp, *V3's report* the one on its predecessor, where everything here but the indexer comes from.

# %%
import inspect
import tempfile
from pathlib import Path

import dsa
import torch
from course.exercises.moe_parallelism import check
from course.figures import full_model
from course.ui.claims import claim
from course.ui.panel import Choice, Panel, static_snapshots
from course.ui.predict import predict
from course.ui.reading import read_file
from course.ui.style import show, style
from dsa.analysis.serving_fit import GPUS, fit
from dsa.bench import full_width
from dsa.checkpoint.inspect import inspect_folder, report
from dsa.datasets import byte_tokenizer, corpus
from dsa.distributed import tensor_parallel
from dsa.generation.chat import open_chat
from dsa.model.moe import Gate, MoE, route
from dsa.model.transformer import Layer
from torch import Tensor

FULL = False  # True: also two processes that share a model
style()

# %% [markdown]
# ## What is around the attention
#
# A layer adds two things to the residual stream: what attention found in other tokens, and what a *feed-forward*
# network makes of the token alone. This is the code of a layer, all of it:

# %%
print(inspect.getsource(Layer.forward))

# %% [markdown]
# `self.mlp` is one wide network in the first three layers. In the other 58 it is a **mixture of experts**: 256 narrow
# networks, of which each token takes 8, and a shared one that every token takes. Much is stored and little is
# computed.
#
# ### Route one token by hand
#
# The router gives every expert a score between 0 and 1. Here are eight experts in four groups of two:

# %%
logits = torch.tensor([2.0, -1.0, 0.5, 0.4, -2.0, 1.8, 0.1, 0.2])
bias = torch.tensor([-2.0, -2.0, -1.2, -1.2, -1.0, -1.8, -1.1, -1.1])
scores = logits.sigmoid()
biased = scores + bias
for name, row in (("scores", scores), ("biased", biased)):
    print(name, [round(float(x), 2) for x in row])

# %% [markdown]
# The bias has been learned, we shall see how, and it is there **to choose only**. All biased scores happen to be
# negative here. Two groups are kept, by the sum of their best two; then two experts are chosen among what is left:

# %%
groups = biased.view(4, 2)
kept = groups.topk(2, dim=-1).values.sum(-1).topk(2).indices
dropped = torch.ones(4, dtype=torch.bool)
dropped[kept] = False
print("kept groups", sorted(kept.tolist()))
for fill in (float("-inf"), 0.0):
    left = groups.masked_fill(dropped[:, None], fill).flatten()
    print(f"masked with {fill:4}:", sorted(left.topk(2).indices.tolist()))

# %% [markdown]
# Masked with 0, the *dropped* groups win, because everything that was kept is negative. The model code that was first
# published with V3's weights did that, and `transformers` still did in 2026 (its issue 45440 tells the story).
# Nothing crashed: an expert is an expert. (The same mistake as in [04](04_token_selection.ipynb), where a future
# token won against a negative score.)
#
# Now the weights of the chosen: their scores **without** the bias, normalised. And the same by the package:

# %%
left = groups.masked_fill(dropped[:, None], float("-inf")).flatten()
chosen = left.topk(2).indices
weights = scores[chosen] / scores[chosen].sum()
small = dsa.Config.v32_exp().replace(
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=2,
    routed_scaling_factor=1.0,
)
theirs, their_weights = route(logits[None], bias, small)
claim(
    "router-by-hand",
    torch.equal(chosen, theirs[0])
    and torch.allclose(weights, their_weights[0]),
    "experts and weights by hand are those of dsa's router",
)

# %% [markdown]
# {exercise:moe_parallelism.my_route}

# %% [markdown]
# ## The bias that keeps 256 experts busy
#
# Nobody tells a router to be fair. Hidden states have something in common, and an expert that likes it gets nearly
# every token. We draw such tokens at random, and a new router of the real kind: 64 experts in eight groups of which
# four are kept, and each token takes 4 experts. It routes 500 tokens a step.

# %%
sizes = {
    "hidden_size": 64,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "n_group": 8,
    "topk_group": 4,
}
config = dsa.Config.v32_exp().replace(**sizes)
tokens = full_model.skewed_tokens(4000, 64)
guess = predict(
    "The fullest expert has how many times its fair share?",
    2.0,
    low=1,
    high=16,
    form=".1f",
    unit="times",
)

# %%
unmoved = full_model.balance_new_router(config, tokens, speed=0.0)
first = full_model.imbalance(unmoved[0])
idle = int((unmoved[0] < unmoved[0].double().mean() / 4).sum())
guess.reveal(first, "what all tokens have in common, some experts like.")
claim(
    "experts-unbalanced",
    first > 4 and idle > 2,
    f"the fullest of 64 experts has {first:.1f} times its share, and"
    f" {idle} have less than a quarter of theirs",
)

# %% [markdown]
# On one GPU that wastes parameters: experts that see nothing learn nothing. On many it also wastes time, because all
# wait for the fullest. The usual remedy is a loss term that punishes imbalance, and it pulls at the model's own
# learning. V3 keeps only a very small one, within each sequence. Its balance comes from the bias: **after each step
# every expert's bias moves by a fixed small step**, up if it got too few tokens, down if too many. This is all of it:

# %%
print(inspect.getsource(Gate.balance))

# %%
speeds = (0.0, 0.001, 0.01, 0.1)
loads = {
    v: full_model.balance_new_router(config, tokens, v) for v in speeds
}
history = {
    v: [full_model.imbalance(load) for load in steps]
    for v, steps in loads.items()
}
show(*full_model.draw_balance(history))
last = {v: sum(line[-20:]) / 20 for v, line in history.items()}
claim(
    "bias-balances",
    max(last[0.001], last[0.01]) < 2 < 2.4 < last[0.1] < last[0.0],
    "a bias that moves by 0.001 or 0.01 a step brings the fullest expert"
    " under twice its share; one that moves by 0.1 overshoots",
)

# %% [markdown]
# V3's report has 0.001 for most of the training. The slower, the finer the balance in the end, and the longer the
# way. What it does to the 64 experts, sorted by load:

# %%
final = {}
for name, speed in (("no bias", 0.0), ("after 200 steps of 0.001", 0.001)):
    late = torch.stack(loads[speed][-20:]).double().mean(0)
    final[name] = (late / late.mean()).sort().values
show(*full_model.draw_loads(final))

# %% [markdown]
# A bias changes which experts a token gets, and nothing else: a token that keeps its experts keeps their weights.

# %%
rng = torch.Generator().manual_seed(1)
logits = torch.randn(100, 64, generator=rng)
bias = 0.02 * torch.randn(64, generator=rng)
before, plain = route(logits, torch.zeros(64), config)
after, moved = route(logits, bias, config)
before, order = before.sort(-1)
after, again = after.sort(-1)
same = (before == after).all(-1)
plain, moved = plain.gather(-1, order), moved.gather(-1, again)
claim(
    "bias-keeps-experts",
    10 < int(same.sum()) < 90 and torch.allclose(plain[same], moved[same]),
    f"a random bias leaves {int(same.sum())} of 100 tokens their experts,"
    " and with them their weights",
)

# %% [markdown]
# {exercise:moe_parallelism.my_balance}

# %% [markdown]
# And in a model that was trained so? The course's own has 8 experts in two of its layers, of which a token takes 2.

# %%
model = dsa.from_pretrained("../data/sparse")
text = read_file("../data/texts/lighthouse.txt")
ids = torch.tensor([byte_tokenizer.encode(text)[:512]])
model.train()
with torch.no_grad():
    model(ids)
for number, gate in enumerate(model.gates(), 1):
    shares = gate.load / gate.load.sum()
    print(f"layer {number}:", [f"{float(s):.0%}" for s in shares])
    gate.load.zero_()
model = model.eval()

# %% [markdown]
# **Measured**: no expert is idle, though this is prose and they were trained on code. Equal they are not: their bias
# was balanced on that code.
#
# ## 671 billion, part by part
#
# Now the real thing, whole. The *meta* device knows shapes and allocates nothing, so a laptop can build it:

# %%
with torch.device("meta"):
    full = dsa.Transformer(dsa.Config.v32_exp())
guess = predict("What share of the parameters is in attention?", 0.2)


def billions(modules):
    """Parameters of some modules, in units of 10^9."""
    return sum(p.numel() for m in modules for p in m.parameters()) / 1e9


layers = full.model.layers
indexers = [layer.self_attn.indexer for layer in layers]
routed = [e for layer in layers[3:] for e in layer.mlp.experts]
shared = [layer.mlp.shared_experts for layer in layers[3:]]
parts = {
    "attention": billions(x.self_attn for x in layers) - billions(indexers),
    "indexers": billions(indexers),
    "routed experts": billions(routed),
    "shared experts": billions(shared),
    "routers": billions(x.mlp.gate for x in layers[3:]),
    "dense layers": billions(x.mlp for x in layers[:3]),
    "embedding and head": billions([full.model.embed_tokens, full.lm_head]),
}

# %%
used = dict(parts)
used["routed experts"] *= 8 / 256
used["embedding and head"] /= 2  # of the embedding a token reads one row
show(*full_model.draw_parts(parts, used))

# %%
total = sum(parts.values())
guess.reveal(
    parts["attention"] / total,
    "256 experts a layer are stored, and eight are used.",
)
norms = billions([full]) - total
claim(
    "parts-add-up",
    round(total - parts["indexers"] + norms, 2) == 671.03
    and round(1000 * parts["indexers"], 1) == 851.5,
    "the parts add up to the published 671.03 billion, and 61 indexers of"
    f" {1000 * parts['indexers']:.1f} million together",
)

# %%
active = sum(used.values())
claim(
    "active-share",
    round(active - parts["indexers"]) == 37,
    f"one token is multiplied with {active:.1f} billion,"
    f" {active / total:.1%} of all; without indexers"
    f" {active - parts['indexers']:.1f}, the published 37",
    value=f"{active / total:.1%}",
)

# %% [markdown]
# A token uses {claim:active-share} of what is stored. On the Hugging Face hub the model is listed with 685 billion:
# that counts one more layer, for *multi-token prediction* (below), with copies of embedding and head. Let us see:

# %%
D = full.config.hidden_size
extra = billions([layers[-1]]) + (2 * D * D + 3 * D) / 1e9
hub = billions([full]) + extra + parts["embedding and head"]
claim(
    "with-mtp-layer",
    round(hub) == 685,
    f"with that layer it is {hub:.0f} billion, as listed",
)
del full, layers, indexers, routed, shared

# %% [markdown]
# ## A layer of true width
#
# In bf16 671 billion parameters take 1.3 TB. One layer takes 1.2 GB if its feed-forward is dense, and that is a layer
# of the real shape: 128 heads, width 7168, 64 index heads. Its *speed* does not depend on what the weights say, so
# random ones will do. With a GPU the next cells take as many layers as fit, experts included (23 GB each in bf16),
# and 8K to 128K tokens. Without one they take one dense layer and a few dozen tokens.

# %% tags=["nbval-ignore-output"]
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype, count = full_width.quick_dtype(device), 1
lengths, decoded = (48, 96), 3
if device == "cuda":
    memory = torch.cuda.get_device_properties(0).total_memory
    count = full_width.layers_that_fit(memory, dtype)
    lengths, decoded = (8192, 32768, 131072), 32
config = full_width.truncated_config(count)
stack = full_width.build(config, dtype, device)
size = sum(p.numel() for p in stack.parameters())
print(f"{count} layer(s), {size / 1e9:.2f} billion parameters, {dtype}")
first = sum(p.numel() for p in stack.model.layers[0].parameters())
claim(
    "one-dense-layer",
    round(first / 1e9, 2) == 0.60,
    f"one dense layer has {first / 1e9:.2f} billion parameters, its indexer"
    " included",
)

# %% [markdown]
# (The dtype is fp32 or bf16, whichever this processor multiplies faster.) First, is it right? With no more than K
# tokens sparse attention keeps all of them, so both modes must give the same, in the precision we compute in:

# %%
from dsa.generation.decode import decode_step

outputs = {}
for attention in ("dense", "sparse"):
    run = full_width.Run(stack, attention, 32)
    states = decode_step(stack, run.tokens[:, :24], run.cache)
    outputs[attention] = states.float()
gap = (outputs["dense"] - outputs["sparse"]).norm() / outputs[
    "dense"
].norm()
claim(
    "real-shape-agrees",
    gap < 0.02,
    "on 24 tokens dense and sparse attention of the real shape give the"
    " same, up to 2% for rounding",
)

# %% [markdown]
# Now the stopwatch. On a laptop the context is too short for sparse attention to be worth anything: at 100 tokens
# there is nothing to leave out, and what differs between the two is mostly noise.

# %% tags=["nbval-ignore-output"]
measured = [
    full_width.measure(stack, attention, length, decoded)
    for attention in ("dense", "sparse")
    for length in lengths
]
for run in measured:
    print(
        f"{run['attention']:6} {run['length']:6} tokens:"
        f" {run['prefill_tokens_per_second']:8.0f} tokens/s read,"
        f" {1e3 * run['decode_seconds_per_token']:6.1f} ms a token written"
    )
weights = sum(p.nbytes for p in stack.parameters())
ms = 1e3 * min(run["decode_seconds_per_token"] for run in measured)
print(
    f"{weights / 1e9:.1f} GB of weights in {ms:.0f} ms:"
    f" {weights / ms / 1e6:.0f} GB/s"
)
del stack

# %% [markdown]
# To write one token every weight of the layer is read once, and little else happens. So the last number, measured
# like the others, cannot exceed the bandwidth of the memory: some tens of GB/s in a laptop, 4,800 in an H200
# (published, its data sheet). One thread of a busy processor, as when this page was made, stays well below. **A token
# costs at least what it costs to read the weights it uses.** Reading a prompt spreads this over many tokens.
#
# And a layer with experts? One expert has 2048 hidden units, a dense layer 18432. Nine experts are at work for a
# token:

# %%
c = dsa.Config.v32_exp()
active = (c.num_experts_per_tok + c.n_shared_experts) * (
    c.moe_intermediate_size
)
claim(
    "expert-widths",
    active == c.intermediate_size == 18432,
    "eight experts and the shared one are together as wide as a dense"
    f" layer: {active}",
)

# %% [markdown]
# So for one token every layer costs about what this one does, and the whole model 61 times that and its head.
#
# What a GPU makes of the same layers is recorded by one command, with random weights or, with `--folder`, with those
# of a model. Here is its record, or the sentence that stands in for it:

# %%
record = full_model.read_record("../data/measurements/true_width.json")
found = full_model.draw_record(record)
if record is None:
    print(found)
else:
    show(*found)

# %% [markdown]
# ## Two tokens in one pass
#
# If a pass costs what it costs to read the weights, a pass that writes two tokens is half the price for each. (Not
# quite: the second token brings experts of its own, unless so many sequences share the pass that all are read
# anyway.) The extra layer of the 685 billion is for that: *multi-token prediction*. It takes the model's hidden state
# and the token the model has just written, and guesses the one after it. The model then reads both in one pass and
# says whether it would have written the same. If so, two tokens came out of one reading of the weights; if not, one
# did. As long as the model always takes its likeliest token, which tokens come out does not depend on the guesses.
#
# We give the course's dense model such a layer, and teach the layer alone, for half a minute at most:

# %% tags=["nbval-ignore-output"]
from dsa.generation.speculative import speculate
from dsa.model.mtp import MTP
from dsa.training.indexer_data import PlainText
from dsa.training.losses import multi_token_loss

base = dsa.from_pretrained("../data/base").requires_grad_(False)
mtp = MTP(base.config).tie_embeddings(base)
mtp.reset_parameters(seed=0)
training_text = PlainText(corpus.load(), length=128)
rng = torch.Generator().manual_seed(0)
optimizer = torch.optim.AdamW(mtp.own_parameters(), lr=0.01)
for _ in range(40):
    loss, extra = multi_token_loss(
        base, mtp, training_text.generate(rng, 8)
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss of the new layer: {float(extra):.1f} nats a token")

# %%
guess = predict("Tokens written per pass?", 1.5, low=1, high=2, form=".1f")

# %% tags=["nbval-ignore-output"]
mtp = mtp.eval()
lengths_accepted, same = [], []
for start in ("    def ", "class ", "        return "):
    prompt = torch.tensor([byte_tokenizer.encode(start)])
    found = speculate(base, mtp, prompt, 60)
    plain_text = dsa.generate(base, prompt, 60)
    same.append(torch.equal(found.tokens, plain_text))
    lengths_accepted.append(found.accepted_length)
mean = sum(lengths_accepted) / 3
guess.reveal(mean, "40 steps are enough for part of what is easy.")
print("each prompt:", [f"{x:.1f}" for x in lengths_accepted])
claim(
    "speculative-tokens-equal",
    all(same),
    "the tokens are those of plain decoding",
)
claim(
    "accepted-per-pass",
    1.1 < mean <= 2,
    "and a pass writes more than 1.1 of them",
)

# %% [markdown]
# For the real layer V3's report says that 85 to 90% of the second tokens are accepted (**published**): 1.85 to 1.9
# tokens a pass.
#
# ## Several GPUs
#
# On no single GPU is there room for 671 billion. So the model is dealt out, layer by layer, in two ways at once. Each
# GPU gets some **heads** of every attention, and some **experts** of every mixture. All see all tokens; what they
# have found is added up. Why may one add? Take attention's last step, a matrix over all heads side by side:

# %%
H, V, width = 8, 4, 16
torch.manual_seed(1)
heads = torch.randn(5, H, V).double()  # what 8 heads found for 5 tokens
out = torch.randn(width, H * V).double()
whole = heads.flatten(1) @ out.T
gpus = [slice(0, 4), slice(4, 8)]  # four heads each
partial = [
    heads[:, mine].flatten(1) @ out.view(width, H, V)[:, mine].flatten(1).T
    for mine in gpus
]
claim(
    "heads-add-up",
    torch.allclose(sum(partial), whole),
    "the sum of what two GPUs make of four heads each is what one makes of"
    " eight",
)

# %% [markdown]
# For experts it is plainer still: a mixture *is* a sum over experts. Here a real `MoE` module gives up half of its
# experts, and its copy the other half:

# %%
torch.manual_seed(0)
config = small.replace(hidden_size=32, moe_intermediate_size=16)
moe = MoE(config).double()
x = torch.randn(1, 6, 32).double()
with torch.no_grad():
    whole = moe(x)
    shared = moe.shared_experts(x)
    halves = []
    for gone in (range(4), range(4, 8)):
        half = MoE(config).double()
        half.load_state_dict(moe.state_dict())
        for number in gone:
            half.experts[number] = None
        halves.append(half(x) - shared)
claim(
    "experts-add-up",
    torch.allclose(sum(halves) + shared, whole),
    "two halves of the experts and the shared one add up to the mixture",
)

# %% [markdown]
# {exercise:moe_parallelism.my_partial}

# %% [markdown]
# In the package this is a table: which part of a layer is cut by columns (each GPU has some outputs), and which by
# rows (each has some inputs, and there is a sum). Splitting, summing and gathering are PyTorch's own (`DTensor`).

# %%
layer = Layer(small.replace(hidden_size=32, num_attention_heads=8), 3)
for name, how in tensor_parallel.plan(layer).items():
    print(f"{name:35} {type(how).__name__}")

# %% [markdown]
# What is *not* in the table is on every GPU: the router, the projections into the latents, and the **indexer**. Each
# GPU works out all scores by itself and chooses the same tokens as the others, without a word between them. And the
# **cache** is on every GPU, whole, because one latent serves all heads.
#
# Two processes on this machine can play two GPUs. That takes half a minute, so it waits for `FULL`; the tests do it
# with two and four processes, and hold logits, tokens and choices against one
# (`tests/distributed/test_tensor_parallel.py`).

# %%
if FULL:
    once, twice = (
        full_model.run_generation("../data/sparse", "def ", n)
        for n in (1, 2)
    )
    print(once == twice, twice)

# %% [markdown]
# ## Does it fit, and how fast could it be?
#
# Memory can be counted. On each GPU lie its share of the weights, the whole cache of all sequences, and a reserve.
# For speed there is a bound, the *roofline*: no GPU reads faster than its memory delivers, or multiplies faster than
# its peak. Communication and imperfect kernels come on top, so the truth is slower. Sizes and rates of GPUs are from
# their makers' data sheets.

# %%
real = dsa.Config.v32_exp()
guess = predict(
    "How many 128K sequences fit on 8 H200 in FP8?",
    64,
    low=0,
    high=1000,
    form=".0f",
    unit="sequences",
)

# %%
h200 = GPUS["H200 141 GB"]
eight = fit(real, h200, 8, 131_072, 1, "deployed")
bf16 = fit(real, h200, 8, 131_072, 1, "bf16")
guess.reveal(
    eight.largest_batch, "each GPU keeps the whole cache of every sequence."
)
claim(
    "what-8-h200-hold",
    eight.fits and eight.largest_batch == 7,
    f"8 H200 hold {eight.weights / 1e9:.0f} GB of FP8 weights each, and"
    f" {eight.largest_batch} sequences of 128K tokens",
    value=f"{eight.largest_batch}",
)
claim(
    "fp8-fits-bf16-not",
    eight.fits and not bf16.fits,
    "in FP8 the model fits on 8 H200, in bf16 it does not",
)

# %% [markdown]
# {claim:what-8-h200-hold} is few, and the reason shows when weights and cache are drawn over the number of GPUs:

# %%
numbers = [1, 2, 4, 8, 16, 32]
plans = [fit(real, h200, n, 131_072, 4, "deployed") for n in numbers]
show(*full_model.draw_split(numbers, plans))

# %% [markdown]
# It is the price of splitting by heads. Servers split by *sequences* as well ("data-parallel attention"):
# then a GPU keeps the cache of its own sequences only. Move the controls. With the first settings dense attention
# has the higher bound up to some 32K tokens: there the cache is short, and sparse attention makes every GPU read
# every indexer. (Below the panel, for readers without a kernel, it stands still at four places.)

# %%
draw = full_model.draw_fit(real)
Panel(
    draw,
    gpu=Choice("GPU", list(GPUS), "H200 141 GB"),
    ranks=Choice("how many", [1, 4, 8, 16], 8),
    context=Choice("context in K", [8, 32, 128], 128),
    batch=Choice("sequences", [1, 4, 16, 64], 1),
    precision=Choice(
        "precision", list(full_model.PRECISIONS), "FP8, as published"
    ),
)

# %%
at = {"context": 128, "batch": 1, "precision": "FP8, as published"}
static_snapshots(
    draw,
    [
        {"gpu": "H100 80 GB", "ranks": 8, **at},
        {"gpu": "H200 141 GB", "ranks": 8, **at},
        {"gpu": "B200 180 GB", "ranks": 4, **at},
        {"gpu": "H200 141 GB", "ranks": 16, **at, "batch": 16},
    ],
)

# %% [markdown]
# {exercise:moe_parallelism.my_bytes}

# %% [markdown]
# ## The real weights, step by step
#
# **1. Room.** The download has 163 files, some 690 GB (published). In FP8 you need eight GPUs of 141 GB (see the
# panel), or sixteen of 80 GB in two machines. In bf16, twice as many.
#
# **2. Fetch** them with the hub's own client. It goes on where it was stopped:
#
# ```sh
# pip install huggingface_hub
# hf download deepseek-ai/DeepSeek-V3.2-Exp --local-dir v32
# ```
#
# **3. Look** before you load. From the headers alone this says what is in a folder, what it will take, and whether it
# will load; it finds missing files and cut-off shards in seconds: `dsa inspect v32`.
# Here it is for a folder of this course:

# %%
summary = inspect_folder(Path("../data/sparse"))
print("\n".join(report(summary)))

# %% [markdown]
# The published weights are FP8: one byte each, and a scale for every block of 128 x 128. They may stay so in memory,
# or be expanded on the way. In small, with this course's model written in the same format:

# %%
with tempfile.TemporaryDirectory() as folder:
    dsa.save_pretrained(model, folder, fp8=True)
    kept = dsa.from_pretrained(folder, keep_fp8=True)
    expanded = dsa.from_pretrained(folder)
with torch.no_grad():
    gap = (kept(ids) - expanded(ids)).abs().max()
held = [
    sum(t.nbytes for t in m.state_dict().values()) for m in (kept, expanded)
]
claim(
    "fp8-kept-same-logits",
    gap < 1e-4 and held[0] < 0.5 * held[1],
    f"kept in FP8 the weights take {held[0] / 1e6:.1f} MB, expanded to fp32"
    f" {held[1] / 1e6:.1f}, and both give the same logits",
)

# %% [markdown]
# **4. Run**, with a process for each GPU. Each reads its own experts and its own part of everything else; the FP8
# codes stay FP8:
#
# ```sh
# torchrun --nproc-per-node 8 -m dsa generate v32 --keep-fp8 --prompt "Sparse attention is"
# torchrun --nproc-per-node 8 -m dsa chat v32 --keep-fp8
# ```
#
# | what | on each of 8 GPUs |
# | --- | --- |
# | weights in FP8, with their scales | 86 GB |
# | cache of one sequence of 128K tokens, bf16 | 11.3 GB |
# | the same with `model.cache_precision = "fp8"`, `index_precision = "fp8"` | 6.3 GB |
# | for a moment: the largest matrix, expanded | less than 0.1 GB |
#
# *Not tested here:* nobody has run this package on the real weights yet. Tested are the same files in small (FP8
# blocks, scales in other shards, a multi-token-prediction layer) and the same split on two and four processes. It
# will be slow: FP8 matrices are expanded at every use, and every expert is a matrix product of its own.
#
# **5. Serve.** For many users take a server with fused kernels. What `dsa.save_pretrained` writes is the published
# layout, `transformers` loads it (`tests/model/test_oracle.py`, `tests/checkpoint/test_checkpoint.py`), and these
# commands take the same folder. They are from the servers' own documentation and *not tested here*:
#
# ```sh
# python -m sglang.launch_server --model v32 --tp 8 --dp 8 --enable-dp-attention
# vllm serve v32 --tensor-parallel-size 8 --enable-expert-parallel
# ```
#
# ## Talk to it
#
# `open_chat` takes any folder that loads, with its tokenizer's files and its chat template. The course's own model
# has read Python and needles, and nobody has taught it to converse: it goes on with what you write.

# %% tags=["nbval-ignore-output"]
chat = open_chat("../data/sparse", max_new_tokens=24)
for piece in chat.say("def main(self):\n        return self."):
    print(piece, end="")

# %% [markdown]
# Give it another folder, or type `dsa chat FOLDER` in a terminal. Every turn reads the whole
# conversation again; what no longer fits is forgotten, oldest turn first.
#
# ## Where it fails
#
# **More GPUs do not make sparse reading faster for ever.** Attention is divided by the GPUs. The indexer is not: each
# of them scores all pairs. Reading 128K tokens on H200s, by the roofline:

# %%
many = [1, 2, 4, 8, 16]
times = {
    kind: [
        fit(real, h200, n, 131_072, 1, "deployed", kind).prefill_seconds
        for n in many
    ]
    for kind in ("dense", "sparse")
}
gain = [a / b for a, b in zip(*times.values(), strict=True)]
show(*full_model.draw_speedup(many, times))

# %%
claim(
    "replicated-indexer",
    gain[0] > 3 and gain[3] < 1.3 and gain[4] < 1,
    f"on one GPU sparse attention would read {gain[0]:.1f} times as fast as"
    f" dense, on 8 that share heads {gain[3]:.1f} times, on 16 not at all",
    value=f"{gain[3]:.1f}",
)

# %% [markdown]
# So a gain of {claim:replicated-indexer} is what is left at eight. It is the second reason for data-parallel
# attention: there each GPU scores for its own sequences, and nobody scores twice. V3's report deploys its model so
# (published): for reading prompts four GPUs share the heads of a sequence, and eight such groups share the sequences.
#
# **A missing sum is not a crash.** One GPU's part looks like an answer. Here a mixture that lost half of its experts:

# %%
with torch.no_grad():
    alone = halves[0] + shared
error = float((alone - whole).norm() / whole.norm())
claim(
    "half-the-experts-missing",
    0.2 < error < 1.5 and bool(alone.isfinite().all()),
    f"without the other half the output is finite, plausible, and"
    f" {error:.0%} off",
)

# %% [markdown]
# That is why the tests compare every rank with one process, and not only with each other.
#
# ## What you have proved
#
# The router by hand is the package's, and a bias that moves by the sign of the load keeps experts busy.
# The parts add up to 671.03 billion and 685 with the extra layer, of which a token uses {claim:active-share}. A layer
# of true width runs here, and dense and sparse agree in it. Heads and experts may be dealt out, because both
# are summed anyway. In FP8 it fits on eight H200, for {claim:what-8-h200-hold} long sequences.
#
# **What the report does not say, and what we chose.** How the model is dealt out to GPUs: by heads and experts, the
# indexer on each, as the published inference code does. How long the bias moves in V3.2's training: V3's report has
# 0.001 for most of it, and we say nothing about V3.2.
#
# **Five questions**
# 1. Why is the group's score the sum of its best two experts and not the best one alone, when a token takes eight
#    experts out of four groups?
# 2. A bias moved by *how much* an expert is over its share would settle faster. What would it do after one odd batch?
# 3. Why must every GPU choose the same tokens, when each has heads of its own?
# 4. With 16 sequences at once, a decoding step reads more experts than with one. About how many more?
# 5. What would you have to add to the plan so that the cache, too, is divided?
#
# <details><summary>Answers</summary>
#
# 1. Two experts of each kept group are used on average, so a group is worth what its best two are worth.
# 2. It would throw the bias of a popular expert far down, and it would be idle for many steps. The sign is bounded.
# 3. Nothing would crash, since heads are independent. But the choice is defined once for all heads and the model was
#    trained with it; and the answer would depend on the number of GPUs, so that nobody could test it against one.
# 4. One token uses 8 of 256. Sixteen that choose at random meet 256 (1 - (1 - 8/256)^16), about 102: thirteen times
#    as many, for sixteen times the tokens.
# 5. Either sequences are dealt out (each GPU then has whole heads for its own sequences), or positions (each GPU then
#    attends to its own part of the context, and softmaxes must be merged).
#
# </details>
#
# **Next**: [11](11_rl_when_attention_chooses.ipynb), post-training, where specialists teach one student.
