# %% [markdown]
# # 04 Token selection: which sixteen?
#
# The lightning indexer gives every earlier token a score. Attention then needs a *set*: the K tokens it will look
# at. Between the two stands one line, `topk`, and everything in this chapter.
#
# **You will be able to**
# 1. turn a matrix of scores into a causal selection, with its short rows and its ties, and check it against the
#    package;
# 2. measure what a selection keeps: attention mass by layer and head, and the one token that matters;
# 3. tell sparse attention that saves work from sparse attention that only looks like it.
#
# **You need** PyTorch, and the idea of attention. [00 Start here](00_start_here.ipynb) shows the same in
# pictures.
#
# **Afterwards**: the source of `dsa/kernels`. Computing: **40 s**.
#
# **Words.** The indexer's score of key s for query t is the sum over a few small heads of w · ReLU(q · k), where the
# weight w of a head may be negative; [chapter 03](03_lightning_indexer.ipynb) builds it. *Prefill* reads a prompt at
# once, *decode* adds one token at a time and finds what it needs of the earlier ones in a *cache*. *The report* is
# DeepSeek's on V3.2-Exp. Shape letters, as everywhere in this course: `T` query positions, `S` key positions, `K`
# kept tokens (top-k), `H` heads.

# %%
import inspect
from itertools import pairwise

import dsa
import torch
from course.exercises.selection import check
from course.figures import selection_map
from course.ui.claims import claim
from course.ui.predict import predict
from course.ui.reading import CHOOSERS, head_weights, read_file, reader
from course.ui.style import show, style
from dsa.kernels import loops, ops, reference, tiled
from torch import Tensor

style()

# %%
model = dsa.from_pretrained("../data/sparse")
text = read_file("../data/texts/lighthouse.txt").strip()
reading = reader(model)(text)
count = len(reading.ids)
layers = len(reading.attention_probs)
print(f"{count} tokens, {layers} layers, K = {model.top_k}")

# %% [markdown]
# ## From scores to a set
#
# Take one query. It stands at position 3 of a text with six tokens, and the indexer has scored all six.

# %%
scores = torch.tensor([0.3, -1.2, -0.4, 0.1, 2.0, 0.7])
print("best two of all six:", scores.topk(2).indices.tolist())

# %% [markdown]
# Positions 4 and 5 have not been written yet: a choice from the future. The query may see the keys 0 to 3, itself
# included. So the future must be hidden **before** the choice. Hiding it afterwards leaves slots empty that good
# keys should have had:

# %%
t, k = 3, 2
chosen = scores.topk(k).indices
print("mask after the choice :", [int(s) for s in chosen if s <= t])

visible = scores[: t + 1]
print("mask before the choice:", sorted(visible.topk(k).indices.tolist()))

# %% [markdown]
# In a whole matrix one cannot slice each row; one overwrites the future instead. With *what*? Zero looks harmless
# and is wrong, because index scores may be negative: the head weights carry a sign.

# %%
hidden_by_0 = scores.masked_fill(torch.arange(6) > 1, 0.0)
hidden_by_inf = scores.masked_fill(torch.arange(6) > 1, float("-inf"))
print("query 1 sees the scores", [round(float(x), 1) for x in scores[:2]])
print("future set to 0   :", sorted(hidden_by_0.topk(2).indices.tolist()))
print("future set to -inf:", sorted(hidden_by_inf.topk(2).indices.tolist()))

# %% [markdown]
# With zeros, query 1 prefers a token that does not exist yet to its visible neighbour with the score -1.2.
#
# The early queries have another problem. Query 0 sees one key, itself, and may keep two. `topk` always returns k
# indices, so a second one comes from somewhere: a **filler**. If attention takes it at its word, query 0 attends
# to the future. We write -1 into such slots, and attention leaves them out.
#
# Here is all of that for one row, by slicing, with nothing hidden:


# %%
def choose_row(row, t, k):
    """The keys that query t keeps, as a list of k numbers."""
    order = sorted(range(t + 1), key=lambda s: (-float(row[s]), -s))
    best = order[:k]
    return best + [-1] * (k - len(best))


print([choose_row(scores, t, 2) for t in range(6)])

# %% [markdown]
# And for random matrices, against the package. Scores are rounded to one decimal, so that some are equal:


# %%
def same_sets(a, b):
    return all(set(x) == set(y) for x, y in zip(a, b, strict=True))


generator = torch.Generator().manual_seed(0)
equal = []
for T in (1, 2, 7, 30):
    for k in (1, 3, 16):
        square = torch.randn(T, T, generator=generator).round(decimals=1)
        mine = [
            choose_row(row, t, min(k, T)) for t, row in enumerate(square)
        ]
        future = ~reference.causal_mask(T, T)
        masked = square.masked_fill(future, float("-inf"))[None]
        equal.append(same_sets(mine, ops.select(masked, k)[0].tolist()))

# %%
claim(
    "selection-by-hand",
    all(equal),
    f"the loop and dsa.kernels choose the same sets in {len(equal)} cases",
)

# %% [markdown]
# From here on we use the package's. It exists three times, with one signature: as loops to read, as whole
# matrices to check, and in tiles to run. This is the first:

# %%
print(inspect.getsource(loops.select))

# %% [markdown]
# ## Ties are real
#
# Did you notice the second sort key, `-s`? It decides between equal scores, and index scores can be equal, because of
# the ReLU: where every head's product is negative, the score is **exactly zero**. How often does that happen in a
# trained model?

# %%
guess = predict("What share of the visible scores is exactly 0?", 0.01)

# %%
seen = reading.scores > float("-inf")
zero = ((reading.scores == 0) & seen).sum((1, 2)) / seen.sum((1, 2))
guess.reveal(
    float(zero.mean()),
    "with two heads both products are often negative. With 64 heads, as in"
    " the real model, all 64 would have to be negative at once.",
)

# %% [markdown]
# Does it matter? Only where a tie is *cut through*: five equal scores for the last three slots. Then any choice is
# correct, but not every choice is repeatable, because which of the equals `topk` returns depends on the length of the
# row and on the machine. Prefill, which scores the whole text at once, and decode, which scores one row at a time,
# could keep different tokens, and a model could write different texts for the same prompt. The report says nothing
# about ties. **Our rule: the later key wins.**
#
# On this text no row is cut at a tie. With coarse scores, four values only, nearly every row is, and one can
# compare choosing for the whole matrix with choosing row by row:

# %%
generator = torch.Generator().manual_seed(0)
coarse = torch.randint(0, 4, (200, 200), generator=generator).float()
coarse = coarse.masked_fill(~reference.causal_mask(200, 200), float("-inf"))


def agreement(choose):
    """In how many of 200 rows are the same 16 keys chosen both ways?"""
    whole = choose(coarse[None])[0].tolist()
    alone = [choose(coarse[None, t : t + 1, : t + 1]) for t in range(200)]
    alone = [set(row.flatten().tolist()) for row in alone]
    return sum(
        {s for s in whole[t] if 0 <= s <= t} == alone[t] - {-1}
        for t in range(200)
    )


# %% tags=["nbval-ignore-output"]
plain = agreement(lambda x: x.topk(min(16, x.shape[-1])).indices)
print(f"plain topk agrees with itself in {plain} of 200 rows")

# %%
ours = agreement(lambda x: ops.select(x, 16))
claim(
    "tie-rule-agrees",
    ours == 200,
    f"our rule agrees with itself in all {ours} rows",
)

# %% [markdown]
# So a prompt may be read in one go, in chunks, or token by token, and the model says the same. (On this text no tie is
# cut, so this tests the cache; the rule was tested above.)

# %%
tokens = torch.tensor([reading.ids])
with torch.no_grad():
    whole = model(tokens)
    cache = model.new_cache(1, tokens.shape[1])
    parts = [
        model(part, cache) for part in tokens.split([400, 100, 11, 1], 1)
    ]
gap = float((torch.cat(parts, 1) - whole).abs().max())
claim(
    "chunked-prefill-agrees",
    gap < 1e-4,
    "prefill in one go, in chunks and by single tokens give equal logits",
)

# %% [markdown]
# ## How much attention is kept
#
# A selection is judged by what attention wanted. **Mass** is that wish: dense attention, averaged over the heads,
# so that each query's row sums to 1. What is kept is the mass on the chosen keys. Here it is by layer, for each
# top-k and each way to choose, as a mean over the queries that see at least 64 keys.

# %%
guess = predict("In layer 0, what do the best 16 keys keep?", 0.5)

# %%
sizes = [1, 2, 4, 8, 16, 32, 64, 128]
curve = {
    (who, n): [
        float(reading.attention_recall(who, n, k)[64:].mean())
        for k in sizes
    ]
    for who in CHOOSERS
    for n in range(3)
}

# %%
show(*selection_map.draw_curves(curve, sizes, at=16))
at16 = {key: values[sizes.index(16)] for key, values in curve.items()}

# %%
guess.reveal(
    at16["oracle", 0],
    "layer 0 averages over many tokens, and an average has no best sixteen."
    " The two other layers are peaked.",
)
ratio = [at16["indexer", n] / at16["oracle", n] for n in range(3)]
claim(
    "indexer-near-best",
    min(ratio) > 0.8,
    "in every layer the indexer keeps at least"
    f" {min(ratio):.0%} of what the best choice keeps",
    value=f"{min(ratio):.0%}",
)
claim(
    "diffuse-first-layer",
    at16["oracle", 0] < 0.7 * at16["oracle", 1],
    f"even the best 16 keep only {at16['oracle', 0]:.0%} in layer 0",
    value=f"{at16['oracle', 0]:.0%}",
)

# %% [markdown]
# So a share kept must be read beside the oracle's. In layer 0 **no** choice of 16 can keep more than
# {claim:diffuse-first-layer}, and that is not the indexer's fault: it reaches {claim:indexer-near-best} of the
# oracle's share or more in every layer. Layer 1 looks at the tokens just before, and a window is as good as any
# choice. Layer 2 looks mostly nearby as well, on prose. What it can do besides, and a window cannot, shows further
# down.
#
# ### One choice for all heads
#
# The heads of a layer want different things, and share one selection: a fetched token serves all of them, which
# is what makes fetching cheap. Does a head lose out?

# %%
heads = head_weights(model, reading.ids)  # (layers, T, H, T)
kept = []
for n in range(3):
    chosen = reading.select("indexer", n, 16)
    member = reference.selection_mask(chosen[None], len(reading.ids))[0]
    kept.append((heads[n] * member[:, None]).sum(-1)[64:].mean(0))
kept = torch.stack(kept)  # (layers, H)
best = heads.topk(16, dim=-1).values.sum(-1)[:, 64:].mean(1)

# %% [markdown]
# `kept` is what each head keeps under the shared choice; `best` is what it could keep with sixteen keys of its own.

# %%
show(*selection_map.draw_own(kept, best))
lost = (best - kept).amax(1)

# %%
claim(
    "mass-is-mean-of-heads",
    torch.allclose(heads.mean(2), reading.attention_probs, atol=1e-5),
    "attention mass is the mean of the heads' own attentions",
)
most = 100 * float(lost.max())
claim(
    "shared-choice-costs-heads",
    most < 20,
    f"sharing one choice costs a head at most {most:.0f} points",
    value=f"{most:.0f} points",
)

# %% [markdown]
# A head loses {claim:shared-choice-costs-heads} at most, although the choice was made for the sum of all heads, which
# is the target that taught the indexer (report Eq. 3).
#
# ## The one token that matters
#
# Mass is an average, and averages forgive. The sharper question: of all tokens one holds the answer; is it among
# the sixteen? We write pairs of symbols, *key value*, over random places of the text, and later ask for each key.
# The value's place is known, so the **hit rate** of a selection is too. It counts the questions whose answer
# stands more than 64 tokens back.

# %%
from dsa.datasets import corpus
from dsa.datasets.recall_tasks import Needles

task = Needles(corpus.load("../data/texts"), length=512, pairs=8, queries=8)
episodes = task.generate(torch.Generator().manual_seed(1), 32)
far = episodes.distance > 64
print(
    f"{far.sum()} questions of {far.numel()} reach more than 64 tokens back"
)

# %%
guess = predict("How often is the answer among the indexer's 16?", 0.5)


# %%
def hits(who, layer, k=16):
    """Which answers' places are among the chosen: (B, n)."""
    model.attention, model.top_k = who, k
    with torch.no_grad():
        _, trace = model(episodes.tokens, trace=True)
    model.attention, model.top_k = "sparse", 16
    rows = torch.arange(len(episodes.tokens))[:, None]
    chosen = trace[layer].selected[rows, episodes.query]  # (B, n, K)
    return (chosen == episodes.source[..., None]).any(-1)


runs = {"oracle": "oracle", "indexer": "sparse"}
runs |= {who: who for who in ("window", "random")}
found = {who: hits(kind, layer=2) for who, kind in runs.items()}
rate = {who: float(hit[far].float().mean()) for who, hit in found.items()}

# %%
guess.reveal(
    rate["indexer"],
    "asked for a needle, this layer's attention goes to one token, and"
    " a single sharp peak is what a cheap scorer finds most easily.",
)
words = ", ".join(f"{who} {share:.0%}" for who, share in rate.items())
claim(
    "far-needles-kept",
    rate["indexer"] > 0.9
    and rate["window"] < 0.05
    and rate["random"] < 0.3,
    f"far needles are among the 16 kept: {words}",
    value=words,
)
claim(
    "random-holds",
    abs(rate["random"] - 1 / 24) < 1 / 24,
    f"16 tokens at random hold {rate['random']:.0%} of them",
    value=f"{rate['random']:.0%}",
)

# %%
edges = [0, 64, 128, 256, 512]
names, shares = [], {who: [] for who in runs}
for a, b in pairwise(edges):
    inside = (episodes.distance > a) & (episodes.distance <= b)
    names.append(f"{a + 1}-{b}\n{int(inside.sum())} questions")
    for who, hit in found.items():
        shares[who].append(float(hit[inside].float().mean()))

# %%
show(*selection_map.draw_hits(names, shares))

# %% [markdown]
# A window of 16 cannot reach beyond 16, by construction. The indexer finds the answer at every distance. And hits become
# answers: the same questions, answered by the whole model under each choice.


# %%
def recall(who, k=16):
    model.attention, model.top_k = who, k
    with torch.no_grad():
        right = episodes.correct(model(episodes.tokens))
    model.attention, model.top_k = "sparse", 16
    return float(right[far].float().mean())


runs = {"dense": "dense"} | runs
answered = {who: recall(kind) for who, kind in runs.items()}
print(", ".join(f"{who} {share:.0%}" for who, share in answered.items()))
claim(
    "answers-right",
    answered["indexer"] > 0.9 and answered["window"] < 0.25,
    f"answers right: indexer {answered['indexer']:.0%},"
    f" window {answered['window']:.0%}",
)

# %% [markdown]
# One model is one case. The whole recipe was run with three seeds, by the command in `data/measurements/seeds.json`, and
# each model took the same exam:

# %%
import json

table = json.loads(read_file("../data/measurements/seeds.json"))
worst = table["least"]["hit_indexer"]
window = table["most"]["hit_window"]
claim(
    "three-seeds-find",
    worst > 0.9 and window < 0.05,
    f"over {len(table['rows'])} trained models the indexer finds at least"
    f" {worst:.0%}, a window at most {window:.0%}",
    kind="recorded",
)

# %% [markdown]
# ## Masked is not sparse
#
# Given the selection, there are two ways to attend. **Masked**: compute all T x S scores and overwrite the
# unwanted ones with -inf. **Gathered**: fetch the K chosen rows, and let nothing else exist. The numbers are the
# same.

# %%
generator = torch.Generator().manual_seed(3)


def decode_inputs(S, K=16, H=4, width=64):
    """One query with H heads at the end of S tokens, K of them chosen."""
    q = torch.randn(1, 1, H, width, generator=generator)
    kv = torch.randn(1, S, width, generator=generator)
    chosen = torch.randperm(S, generator=generator)[:K].view(1, 1, K)
    return q, kv, chosen


q, kv, chosen = decode_inputs(1024)
masked = reference.sparse_attention(q, kv, chosen, 0.125, 48)
gathered = tiled.sparse_attention(q, kv, chosen, 0.125, 48)
claim(
    "masked-equals-gathered",
    torch.allclose(masked, gathered, atol=1e-5),
    "masked and gathered attention give the same numbers",
)

# %% [markdown]
# Their cost is not. PyTorch can count the operations of the matrix products that a call really makes:

# %%
from torch.utils.flop_counter import FlopCounterMode


def flops(attend, *inputs):
    with FlopCounterMode(display=False) as counter:
        attend(*inputs, 0.125, 48)
    return counter.get_total_flops()


lengths = [2**n for n in range(6, 14)]
cost = {"masked": [], "gathered": []}
for S in lengths:
    inputs = decode_inputs(S)
    cost["masked"].append(flops(reference.sparse_attention, *inputs))
    cost["gathered"].append(flops(tiled.sparse_attention, *inputs))

# %%
show(*selection_map.draw_growth(lengths, cost))

# %%
flat = cost["gathered"][0]
claim(
    "gathered-flop-constant",
    len(set(cost["gathered"])) == 1,
    f"gathered attention makes {flat:,} FLOP at every length",
    value=f"{flat:,}",
)
claim(
    "masked-flop-grows",
    cost["masked"][-1] == 128 * cost["masked"][0],
    "masked attention costs in proportion to the length",
)

# %% [markdown]
# You can check {claim:gathered-flop-constant} by hand: H heads times K keys, once over the 64 numbers of the key and
# once over the 48 of the value, two operations each: 2 x 4 x 16 x (64 + 48). The length does not occur.
#
# Masked code is the easier one to write. It is right for training on short texts and for checking, and it is no
# measurement of sparse attention. One more honest line: gathered attention is not the *whole* cost. The indexer has
# still scored every key, and that grows with the length. What it costs for each key, beside what attention would:

# %%
for name, c in (("here", model.config), ("V3.2-Exp", dsa.Config.v32_exp())):
    index = c.index_n_heads * c.index_head_dim
    attend = c.num_attention_heads * (
        2 * c.kv_lora_rank + c.qk_rope_head_dim
    )
    print(
        f"{name}: {index:,} multiplications a key against {attend:,},",
        end="",
    )
    print(f" 1 : {attend / index:.0f}")

# %% [markdown]
# The chapters on cost take it from there.
#
# ## The whole picture, to play with
#
# Each row is a query, each mark a key that it keeps. Before you move the controls: what will a window look like?
# And chance?

# %%
from course.ui.panel import Choice, Panel, Slider, static_snapshots

draw = selection_map.draw_choices(reading)
panel = Panel(
    draw,
    top_k=Slider("top-k", 1, 256, 16),
    layer=Slider("layer", 0, 2, 2),
    who=Choice("who chooses", CHOOSERS, "indexer"),
)
panel

# %% [markdown]
# The same for readers without a kernel:

# %%
static_snapshots(
    draw,
    [
        {"top_k": 16, "layer": 2, "who": "window"},
        {"top_k": 16, "layer": 2, "who": "oracle"},
        {"top_k": 4, "layer": 2, "who": "indexer"},
        {"top_k": 16, "layer": 0, "who": "indexer"},
    ],
)

# %% [markdown]
# ## Exercises
#
# Write the function, run its cell and the check below it. Nothing happens if you skip one.

# %% [markdown]
# {exercise:selection.my_select}

# %% [markdown]
# {exercise:selection.my_attention_recall}

# %% [markdown]
# {exercise:selection.my_sparse_attention}

# %% [markdown]
# {exercise:selection.my_two_level_topk}

# %% [markdown]
# ## Where it fails
#
# **An indexer that was never taught.** Choosing passes no gradient: trained on text alone, an indexer stays what
# it was at birth. We give ours random weights again and ask for the needles.

# %%
import copy

trained = model
model = copy.deepcopy(trained)
blind = []
for seed in range(3):
    generator = torch.Generator().manual_seed(seed)
    for p in model.indexer_parameters():
        if p.ndim == 2:
            p.data = torch.randn(p.shape, generator=generator)
    blind.append(float(hits("sparse", layer=2)[far].float().mean()))
model = trained
worst, luckiest = min(blind), max(blind)
claim(
    "untaught-indexers-find",
    luckiest < 0.3,
    f"three untaught indexers find {worst:.0%} to {luckiest:.0%}"
    " of the far needles",
    value=f"{worst:.0%} to {luckiest:.0%}",
)

# %% [markdown]
# Chance found {claim:random-holds}. A sparse model is only as good as its indexer, which is why the report gives it a
# training stage of its own before anything else becomes sparse.
#
# **Too small a K.** A needle needs one token; prose needs several at once. So the two suffer differently when K
# shrinks. The second is measured by its loss, in bits for each byte of text, where lower is better.

# %%
from dsa.training.losses import bits_per_byte


def bits(who, k=16):
    model.attention, model.top_k = who, k
    with torch.no_grad():
        spent, size = bits_per_byte(model(tokens), tokens)
    model.attention, model.top_k = "sparse", 16
    return spent / size


for k in (1, 2, 4, 8, 16):
    needle, prose = recall("sparse", k), bits("sparse", k)
    print(f"K = {k:2}: {needle:4.0%} of needles, {prose:.1f} bits a byte")

# %%
dearer = bits("sparse", 1) - bits("sparse", 16)
claim(
    "single-key-costs-bits",
    dearer > 0.4,
    f"with K = 1 prose costs {dearer:.1f} bits a byte more than with 16",
)

# %% [markdown]
# **A text without needles.** On the same prose, the ways to choose:

# %%
prose = {who: bits(kind) for who, kind in runs.items()}
print(", ".join(f"{who} {b:.2f}" for who, b in prose.items()))
dearer = prose["window"] - prose["indexer"]
claim(
    "window-costs-on-prose",
    abs(dearer) < 0.2,
    f"on plain prose a window of 16 costs {dearer:.1f} bits a byte more",
    value=f"{dearer:.1f} bits",
)
assert prose["indexer"] < prose["dense"] + 0.05
dearer = prose["random"] - prose["indexer"]
claim(
    "random-costs-on-prose",
    dearer > 0.2,
    f"random tokens cost {dearer:.1f} bits more",
)

# %% [markdown]
# A difference of {claim:window-costs-on-prose}: whoever measures only the loss on prose would conclude that a window
# is enough. The needles say otherwise. Both are true, of different texts, and a model does not know beforehand which
# kind it will be given. (That 16 tokens do no worse than all of them is no mistake: this model was trained to live
# with the indexer's choice, [06](06_sparse_training.ipynb).)
#
# ## What you have checked
#
# The selection by hand equals the package's, with ties too and in pieces. In every layer the indexer keeps at least
# {claim:indexer-near-best} of what is possible. Far needles among the 16 kept: {claim:far-needles-kept}. Gathered
# attention costs the same at every length.
#
# **What the report does not say, and what we chose.** What happens among equal scores: here the later key wins.
# What stands in an unfilled slot: here -1, elsewhere often an arbitrary index that attention must mask again. In
# which order the chosen are listed: here none is promised.
#
# **Five questions**, with short answers folded away
# 1. Why must the mask come before the top-k, and why is 0 no mask?
# 2. Why can the oracle not be used in practice?
# 3. All heads share one selection. What would it cost to give each its own?
# 4. Masked and gathered attention agree to the last digits. How would you notice which of the two somebody benchmarked?
# 5. K is 2,048 in the real model, at 128K tokens one in 64. Ours is one in 32. Does that flatter our figures?
#
# <details><summary>Answers</summary>
#
# 1. A future key must not take a slot from a visible one; and a visible key may score below 0.
# 2. It needs the whole dense attention to know what to keep.
# 3. An indexer and a top-k for each head, and each head would fetch its own tokens: H times the memory traffic.
# 4. Double the length: the masked one takes twice as long for one query, the gathered one as long as before.
# 5. Yes: with more tokens to choose from for each slot, choosing is harder. Needles at 128K are not proved by needles
#    at 512.
#
# </details>
#
# **Next**: [05 Training the indexer](05_training_the_indexer.ipynb) teaches an indexer before your eyes, and
# [07 FP8](07_fp8.ipynb) makes the scores coarse and asks what stays chosen.
