# %% [markdown]
# # 02 Multi-head latent attention: one vector, 128 heads
#
# To write the next token, a model needs the keys and values of all tokens before it. With 128 heads that is a key
# and a value for each of 128 heads, in each of 61 layers, for every token ever read. DeepSeek-V3.2 keeps **576
# numbers** a token and layer instead, for all heads together. How can 128 different heads live on one vector, and
# why is sparse attention built on top of exactly this?
#
# **You will be able to**
# 1. move a projection from the keys to the query ("absorption"), and prove that nothing changes;
# 2. say why a rotary embedding gets in the way, and what the extra 64 numbers are for;
# 3. count bytes per token and FLOP per pair, and say why reading a prompt (*prefill*) and writing token after token
#    (*decode*) take different sides.
#
# **You need** PyTorch, and attention with queries, keys and values. [00 Start here](00_start_here.ipynb) is a
# gentle beginning, and not required.
#
# **Afterwards**: `dsa/model/attention.py` line by line. Computing: **20 s**.
#
# Shape letters, as everywhere in this course: `T` query positions, `S` key positions, `D` model width, `H` heads,
# `N` width of a head's key without its rotary part, `R` width of that part, `V` width of a head's value, `C` width of
# the latent, the one vector that this chapter is about. *The report* is DeepSeek's on V3.2-Exp.

# %%
import inspect
import math

import dsa
import torch
from course.exercises.latent_attention import check
from course.figures import mla_figures as mla
from course.ui.claims import claim
from course.ui.predict import predict
from course.ui.reading import read_file
from course.ui.style import show, style
from dsa.analysis import flops
from dsa.datasets.byte_tokenizer import encode
from dsa.model.attention import Attention
from dsa.model.rope import Rope, frequencies
from torch import Tensor

style()
torch.set_grad_enabled(False)
real = dsa.Config.v32_exp()

# %% [markdown]
# ## What one token leaves behind
#
# Here are the published sizes. A head's key has N + R numbers, its value V. (The R rotary numbers carry the
# position; we come to them.) If every head kept its own key and value, in bf16, two bytes a number: **how many
# megabytes would one single token leave in the caches of all layers?**

# %%
H, N = real.num_attention_heads, real.qk_nope_head_dim
R, V = real.qk_rope_head_dim, real.v_head_dim
C, layers = real.kv_lora_rank, real.num_hidden_layers
print(f"H = {H} heads, N = {N}, R = {R}, V = {V}, C = {C}, {layers} layers")
guess = predict("MB per token?", 0.1, high=1000, form=".1f", unit="MB")

# %%
numbers = {
    "MHA": H * (N + R + V),
    "GQA, 8 groups": 8 * (N + R + V),
    "MQA": N + R + V,
    "MLA": C + R,
}
size = {kind: 2 * count * layers for kind, count in numbers.items()}
guess.reveal(
    size["MHA"] / 1e6,
    f"{H} heads x ({N + R} + {V}) numbers x 2 bytes x {layers} layers.",
)

# %% [markdown]
# The classical answer is to let heads **share**: grouped-query attention (GQA) gives each group of heads one key and
# value, multi-query attention (MQA) gives all heads the same. That saves bytes by giving up differences: under MQA
# 128 heads ask different questions of one and the same key. What multi-head latent attention (MLA) does instead is
# the matter of this chapter; its cache is the last bar.

# %%
show(*mla.draw_caches(size, tokens=131_072))
claim(
    "mla-against-mha-bytes",
    size["MHA"] == 4_997_120 and size["MLA"] == 70_272,
    f"a token leaves {size['MLA']:,} bytes with MLA"
    f" and {size['MHA']:,} with MHA",
    value=f"{size['MLA']:,} bytes with MLA and {size['MHA']:,} with MHA",
)
groups = numbers["MLA"] / numbers["MQA"]
claim(
    "mla-in-gqa-groups",
    groups == 1.8,
    f"MLA's cache is as large as GQA's with {groups:.1f} groups",
    value=f"{groups:.1f}",
)

# %% [markdown]
# Under MHA one long text would not fit into eight accelerators with 80 GB each. MLA's cache is *not* the smallest:
# MQA at these head sizes keeps 320 numbers. What MLA keeps is bigger than one head's key and value, and much smaller
# than all heads', and yet each head gets a key and a value of its own. In units of a head's 320 numbers that is
# {claim:mla-in-gqa-groups} groups of GQA. (Published, DeepSeek-V2 report, Table 1: 2.25. It counts a head as 128 + 128 numbers, without
# a rotary part.)
#
# ## Keys that are made, not kept
#
# The idea takes one sentence: **keep what keys and values are made from**, one short vector a token, the *latent*. We
# build it on tiny tensors, with every size different so that a wrong shape cannot hide, and in fp64, so that what is
# equal looks equal.

# %%
generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


h, n, r, c, v, S = 3, 4, 2, 6, 5, 40  # tiny H, N, R, C, V; S tokens
latent = random(S, c)  # the cache: one vector a token
W_k = random(h, n, c)  # each head's way from the latent to its key
W_v = random(h, v, c)  # and to its value
q = random(h, n)  # one query token, h heads

# %% [markdown]
# Each head expands its own keys and values from the shared latent, and then everything is ordinary attention (we
# leave out the scale for now). What did we give up? Put everything that all heads know about a token into one long
# row. There are 3 x (4 + 5) = 27 numbers in it, but they are all linear functions of 6. So the matrix of all tokens
# has rank 6 at most. That is the whole price of MLA: the heads' keys and values *together* live in C dimensions.

# %%
keys = torch.einsum("hnc,sc->hsn", W_k, latent)
values = torch.einsum("hvc,sc->hsv", W_v, latent)

scores = torch.einsum("hn,hsn->hs", q, keys)
weights = scores.softmax(-1)
expanded = torch.einsum("hs,hsv->hv", weights, values)  # (h, v)

rows = torch.cat([*keys, *values], dim=-1)  # (S, 27)
rank = int(torch.linalg.matrix_rank(rows))
claim(
    "rank-of-small-model",
    rank == c,
    f"{rows.shape[1]} numbers a token, a rank of {rank}",
)

# %% [markdown]
# Under MQA all heads have the same key. Here each has its own, and only all of them *together* are limited. How much
# room they need is an empirical question, and a later slider asks it of a trained model.
#
# ## Absorption: the key's side
#
# So far we have saved memory and paid in work: at every step each cached token must be expanded for each head
# again. The trick that makes MLA worthwhile is to expand nothing at all. Look at one head, its query q, and one token
# s with its latent c_s:
#
# $$q \cdot (W_k\, c_s) \;=\; q^\top W_k\, c_s \;=\; (W_k^\top q)^\top c_s \;=\; (W_k^\top q) \cdot c_s$$
#
# The brackets moved, nothing else. On the left W_k meets the *token*, on the right it meets the *query*. There are as
# many tokens as the text is long, but one query. So we multiply the query with W_k once, for each head ("absorb"), and
# then score the cache *as it is*. The absorbed queries are wider (6 instead of 4), and all heads meet the same key:
# the latent.

# %%
absorbed = torch.einsum("hn,hnc->hc", q, W_k)  # (h, c), once a query
scores_absorbed = absorbed @ latent.T  # (h, S), the cache untouched
claim(
    "absorbed-queries",
    torch.allclose(scores_absorbed, scores, atol=1e-10, rtol=0),
    "absorbed queries give the scores of expanded keys",
)

# %% [markdown]
# ## Absorption: the value's side
#
# The same with the sum that attention ends in. With attention weights p_s, a matrix may come before the weighted sum
# or after it:
#
# $$\sum_s p_s\, (W_v\, c_s) \;=\; W_v \sum_s p_s\, c_s$$
#
# Mix the latents first, expand the mixture once.

# %%
mixed = weights @ latent  # (h, c): each head's mixture of latents
absorbed_out = torch.einsum("hc,hvc->hv", mixed, W_v)
claim(
    "expand-after-the-sum",
    torch.allclose(absorbed_out, expanded, atol=1e-10, rtol=0),
    "expanding after the sum gives what expanding before it gives",
)

# %% [markdown]
# Read the two lines that touch the cache once more: `absorbed @ latent.T` and `weights @ latent`. One vector a
# token, shared by all heads, key and value at once. **That is multi-query attention**, with wide queries. Hence the
# names:
#
# * **MHA mode** expands, then attends like multi-head attention;
# * **MQA mode** absorbs, then attends like multi-query attention.
#
# They are one model in two orders of multiplying. DeepSeek Sparse Attention is defined on the MQA mode, and this
# is why: a selected token is fetched *once* and serves all 128 heads.
#
# "Absorb" means an order of multiplication at run time, not a new matrix. MLA makes its queries through a latent too,
# of 1,536 numbers, so two matrices stand in a row, from the query's latent to a head's query and from there to the
# key's latent, and it is tempting to multiply them once and for all. But in between a head passes through only 128
# numbers, and two thin matrices are smaller than one thick one.
#
# ## A rotation in the way
#
# Attention must know *where* tokens stand. A rotary embedding (RoPE) takes pairs of numbers and turns each by an
# angle that grows with the position, in queries and keys alike. What remains in their product is the difference:


# %%
def rotate(x, position, theta=100.0):
    """Turn the pairs (2i, 2i + 1) of x (..., width)."""
    pairs = torch.arange(x.shape[-1] // 2, dtype=x.dtype)
    angle = position * theta ** (-pairs / len(pairs))
    a, b = x[..., 0::2], x[..., 1::2]
    turned_a = a * angle.cos() - b * angle.sin()
    turned_b = b * angle.cos() + a * angle.sin()
    return torch.stack([turned_a, turned_b], dim=-1).flatten(-2)


# %%
key = W_k[0] @ latent[7]
for t, s in ((10, 7), (60, 57), (60, 7)):
    score = rotate(q[0], t) @ rotate(key, s)
    print(f"query at {t}, key at {s}: {score:.4f}")

# %% [markdown]
# Same distance, same score. Now absorb. The rotation stands between W and the query, and it depends on the
# distance:
#
# $$\mathrm{rot}_t(q) \cdot \mathrm{rot}_s(W_k\,c_s) \;=\; q^\top\, \mathrm{rot}_{s-t}\, W_k\, c_s
#   \;=\; \big(W_k^\top\, \mathrm{rot}_{t-s}\, q\big) \cdot c_s$$
#
# So there is an absorbed query, but a *different one for every distance*. How different?

# %%
at = torch.arange(S)[:, None]  # the position of each token, (S, 1)
each = rotate(q, at[:, None])  # (S, h, n), one for each distance
each = torch.einsum("dhn,hnc->dhc", each, W_k)  # absorbed
alike = torch.cosine_similarity(each, each[:1], dim=-1)  # (S, h)
show(*mla.draw_drift(alike))

# %% [markdown]
# The query that was absorbed for distance 0 is soon the wrong one. One could absorb anew for each distance, or pretend
# that one absorbed query will do. In numbers, for a query at the last position:

# %%
t = S - 1
true = torch.einsum("hn,hsn->hs", rotate(q, t), rotate(keys, at))
again = torch.einsum("shc,sc->hs", each.flip(0), latent)  # S queries
once = torch.einsum("hc,sc->hs", each[0], latent)  # that of distance 0
off = [float((x - true).norm() / true.norm()) for x in (again, once)]
claim(
    "one-query-per-distance",
    off[0] < 1e-10 and off[1] > 0.5,
    "an absorbed query for each distance gives the scores; one for all"
    f" distances misses them by {off[1]:.0%} of their size",
)

# %% [markdown]
# The first is exact and useless: a new absorbed query for every token is as much work as expanding every key. The
# second is wrong.
#
# ## Turn the latent instead?
#
# A plausible repair: the cache holds latents, so rotate the *latent* by its position and the absorbed query by its
# own. The scores then depend on distances again. But the latent is also the **value**, and what a head reads now is
# turned by where it was read. We attend to the same tokens twice, as if the text stood at the beginning, and as if
# it stood 10 positions later. Nothing should change:


# %%
def rope_on_latent(first):
    """Weights and output when the cached latents themselves are turned."""
    cache = rotate(latent, first + at)
    weights = (rotate(absorbed, first + t) @ cache.T).softmax(-1)
    return weights, torch.einsum("hc,hvc->hv", weights @ cache, W_v)


weights_0, out_0 = rope_on_latent(0)
weights_10, out_10 = rope_on_latent(10)
moved = float((out_10 - out_0).norm() / out_0.norm())
claim(
    "rope-on-latent-fails",
    torch.allclose(weights_0, weights_10, atol=1e-10) and moved > 0.2,
    "with RoPE on the latent a shift leaves the weights alone and changes"
    f" what is read by {moved:.0%} of its size",
)

# %% [markdown]
# One could keep the latents as they are and turn each of them on the fly whenever it serves as a key, at every step
# for every cached token. And the MHA mode would be gone: with the rotation between W_k and the latent, no key could be
# expanded once and serve queries at different positions.
#
# ## Decoupled: two keys in one
#
# MLA's answer is to let content and position travel apart. A head's query and key get two parts:
#
# * **nope** (*no* position): N numbers, expanded from the latent, never turned, free to be absorbed;
# * **rope**: R numbers that carry the position. The key's are made from the hidden state directly, turned *before*
#   they are cached, and the same for all heads. No W stands behind the rotation, so there is nothing to absorb.
#
# The score is the sum of both products. The cache holds C + R numbers: 512 + 64 = **576**.


# %%
def my_mha(q, q_rope, latent, k_rope, w_k, w_v, scale=1.0):
    """Expand: latent (S, c) to each head's keys and values."""
    keys = torch.einsum("hnc,sc->hsn", w_k, latent)
    values = torch.einsum("hvc,sc->hsv", w_v, latent)
    scores = torch.einsum("hn,hsn->hs", q, keys) + q_rope @ k_rope.T
    weights = (scale * scores).softmax(-1)
    return torch.einsum("hs,hsv->hv", weights, values)


# %%
def my_mqa(q, q_rope, latent, k_rope, w_k, w_v, scale=1.0):
    """Absorb: one key of c + r numbers for all heads."""
    wide = torch.cat([torch.einsum("hn,hnc->hc", q, w_k), q_rope], -1)
    cache = torch.cat([latent, k_rope], dim=-1)  # (S, c + r)
    weights = (scale * (wide @ cache.T)).softmax(-1)
    return torch.einsum("hc,hvc->hv", weights @ latent, w_v)


# %%
q_rope = rotate(random(h, r), t)  # each head asks in its own way ...
k_rope = rotate(random(S, r), at)  # ... one key
tiny = q, q_rope, latent, k_rope, W_k, W_v
claim(
    "modes-agree-with-positions",
    torch.allclose(my_mha(*tiny), my_mqa(*tiny), atol=1e-10, rtol=0),
    f"with {c} + {r} cached numbers both modes agree, positions included",
)

# %% [markdown]
# ## Mine and the package's
#
# Now the same on a trained model. It has the published architecture at laptop size: 4 heads, a latent of 48 and a
# rotary part of 16. We take its first layer, in fp64, and the hidden states of a real text. The weights bear the
# published names: `kv_a_proj_with_mqa` makes latent and rotary key, `kv_b_proj` holds every head's W_k and W_v. The
# latent is normalised before it is cached.

# %%
model = dsa.from_pretrained("../data/base", dtype=torch.float64)
text = read_file("../data/texts/lighthouse.txt").strip()
tokens = torch.tensor([encode(text)[-256:]])
layer = model.model.layers[0]
attention = layer.self_attn
x = layer.input_layernorm(model.model.embed_tokens(tokens))  # (1, T, D)
rope = Rope.at(model.config, 0, x.shape[1])

# %%
mini = model.config
sizes = [mini.kv_lora_rank, mini.qk_rope_head_dim]  # C, R of this model


def my_cache(x):
    """What the tokens x (T, D) leave behind: (T, C + R)."""
    both = x @ attention.kv_a_proj_with_mqa.weight.T
    latent, k_rope = both.split(sizes, dim=-1)
    size = (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    latent = latent / size * attention.kv_a_layernorm.weight
    at = torch.arange(len(x))[:, None]
    return torch.cat([latent, rotate(k_rope, at, mini.rope_theta)], -1)


# %%
kv = attention.compress_kv(x, rope)[0]  # (T, C + R)
claim(
    "my-cache-is-dsas",
    torch.allclose(my_cache(x[0]), kv, atol=1e-4, rtol=0),
    "my cache is dsa's, latent and rotary key, within 1e-4",
)

# %% [markdown]
# (1e-4, because `dsa` makes its angles in fp32.) Now both modes, for the last token, which sees all others. They are
# the functions from above, with the model's weights and its softmax scale:

# %%
asked, _ = attention.queries(x, rope)  # (1, T, H, N + R)
parts = [mini.qk_nope_head_dim, mini.qk_rope_head_dim]
both = attention.kv_b_proj.weight.unflatten(0, (attention.heads, -1))
w_k, w_v = both.split([parts[0], mini.v_head_dim], dim=1)
mine = *asked[0, -1].split(parts, -1), *kv.split(sizes, -1), w_k, w_v

# %%
my_two = [mode(*mine, mini.softmax_scale) for mode in (my_mha, my_mqa)]
its = attention.attend_mha, attention.attend_mqa
its_two = [mode(asked, kv[None])[0, -1] for mode in its]
claim(
    "modes-by-hand",
    all(torch.allclose(a, b, atol=1e-10, rtol=0)
        for a in my_two for b in its_two),
    "both modes by hand equal both modes of dsa, within 1e-10 in fp64",
)  # fmt: skip

# %%
print(inspect.getsource(Attention.absorb_query))

# %% [markdown]
# That is the package's own absorption. Next comes a layer at the *real* head sizes, 128 heads and C = 512, with
# random weights. And then the whole model, all layers, from tokens to logits. Dense attention over a prompt runs in
# MHA mode. Choosing *all* 256 tokens ("the last 256") runs the same model in MQA mode, because a selection always
# does. (`between_modes` and `between_logits`, in `notebooks/course/figures/latent.py`, run both and return the
# largest difference.)

# %%
claim(
    "modes-at-real-sizes",
    mla.between_modes(real, torch.float64) < 1e-10
    and mla.between_modes(real, torch.float32) < 5e-5,
    "at the real head sizes the modes agree within 1e-10 in fp64"
    " and 5e-5 in fp32",
)

# %%
small = dsa.from_pretrained("../data/base")  # fp32
claim(
    "modes-to-logits",
    mla.between_logits(model, tokens) < 1e-10
    and mla.between_logits(small, tokens) < 5e-5,
    "from tokens to logits the modes agree within 1e-10 in fp64"
    " and 5e-5 in fp32",
)

# %% [markdown]
# ## What each mode costs
#
# Equal numbers, unequal work. For a pair of query and key, each head multiplies 192 numbers for the score and 128 for
# the output in MHA mode, 576 and 512 in MQA mode. A multiplication and an addition are 2 FLOP.
# ([Chapter 09a](09a_attention_at_length.ipynb) has PyTorch count the same.)

# %%
mha_pair = 2 * H * ((N + R) + V)
mqa_pair = 2 * H * ((C + R) + C)
times = f"{mqa_pair / mha_pair:.1f}"
claim(
    "pair-flop-of-modes",
    mha_pair == flops.mha_pair_flops(real)
    and mqa_pair == flops.mqa_pair_flops(real),
    f"a pair costs {mha_pair:,} FLOP in MHA mode, {mqa_pair:,} in MQA mode:"
    f" {times} times as many",
    value=times,
)

# %% [markdown]
# So the absorbed mode is the *dearer* one, {claim:pair-flop-of-modes} times per pair: every head reads the whole
# shared vector instead of a short one made for it. But expanding is not free, and neither is absorbing. Per token,
# one makes 128 keys and values from a latent; the other takes 128 queries to the latent's side and 128 outputs back.

# %%
expand = 2 * C * H * (N + V)  # one token's keys and values
absorb = 2 * H * N * C + 2 * H * C * V  # one query in, its output back
claim(
    "expanding-one-token",
    expand == absorb,
    f"expanding one token's keys and values costs {expand:,} FLOP, and so"
    " does absorbing one query and expanding its output",
    value=f"{expand:,} FLOP",
)

# %% [markdown]
# The same price, but of **different things**: MHA mode pays it for every *key*, MQA mode for every *query*. Reading
# a prompt, there are as many queries as keys, so this price cancels and the cheaper pairs win: MHA. Writing one
# token after 32,768 others, there is one query and there are 32,769 keys: MQA. In between there must be a crossing.
# **How many new tokens does it take until the MHA mode is the cheaper one again?**

# %%
guess = predict(
    "New tokens after 32,768 cached ones at which MHA wins?",
    1000, high=32768, form=",.0f", unit="tokens",
)  # fmt: skip


# %%
def cost(new, cached=32_768):
    """FLOP of one layer's attention in both modes."""
    pairs = new * cached + new * (new + 1) // 2
    mha = (cached + new) * expand + pairs * mha_pair
    mqa = new * absorb + pairs * mqa_pair
    return mha, mqa


# %%
crossing = next(n for n in range(1, 32_768) if cost(n)[0] < cost(n)[1])
show(*mla.draw_crossing(cost, [2**n for n in range(13)], crossing, 32_768))
claim(
    "when-expanding-pays",
    crossing == 171,
    f"from {crossing} new tokens on, expanding 32,768 cached ones pays",
    value=f"{crossing}",
)
guess.reveal(
    crossing,
    f"each new query saves {mqa_pair - mha_pair:,} FLOP with each key, and"
    f" making a key costs {expand:,}: {crossing} queries pay for it.",
)

# %% [markdown]
# Could decode not keep the *expanded* keys, and have the cheap pairs without expanding again? Then it would have to
# read them, and at decode time reading is what takes time. How much is computed with each byte that is read?

# %%
mha_byte = mha_pair / (2 * H * (N + R + V))  # expanded cache
mqa_byte = mqa_pair / (2 * (C + R))  # latents
claim(
    "flop-per-cached-byte",
    mha_byte == 1 and round(mqa_byte) == 242,
    f"for one query, a byte of expanded keys serves {mha_byte:.0f} FLOP,"
    f" a byte of latents {mqa_byte:.0f}",
    value=f"{mqa_byte:.0f}",
)
print(f"an H100: {989e12 / 3.35e12:.0f} FLOP in the time of one byte")

# %% [markdown]
# The last line is what an NVIDIA H100 can do while it reads one byte (published in its data sheet: 989 TFLOP/s in
# bf16, 3.35 TB/s). With 1 FLOP per byte it would stand idle nearly all the time. With {claim:flop-per-cached-byte},
# memory and arithmetic are about balanced: the dearer pairs cost little time, since the arithmetic would otherwise
# wait for memory.
#
# So prefill takes the MHA mode and decode the MQA mode. And sparse attention takes MQA, in prefill too: it is
# defined on rows that are fetched once for all heads, and with 2,048 keys for each query it can afford the pair.
# (For short prompts the report mentions a masked MHA mode instead, as more efficient there.)
#
# ## Two rotary conventions
#
# A rotation turns pairs. *Which* numbers form a pair is a convention, and there are two. MLA turns **neighbours**
# (2i, 2i + 1); the lightning indexer, in the same model, turns **halves** (i, i + R/2).

# %%
show(*mla.draw_pairs())

# %% [markdown]
# Neither is better. Each gives scores that depend on the distance alone. What must never happen is that the two
# *meet*: one for the query and the other for the key, or one in training and the other afterwards. Here are two
# vectors, always five tokens apart, in all places of a text:

# %%
series = mla.swings(mini, distance=5)
show(*mla.draw_swing(series, distance=5))
swing = {name: float(x.max() - x.min()) for name, x in series.items()}
claim(
    "distances-only",
    swing["both neighbours"] < 1e-3
    and swing["both halves"] < 1e-3
    and swing["halves meet neighbours"] > 1,
    "either convention sees distances only; mixed, a score swings with the"
    " place in the text",
)

# %% [markdown]
# ## YaRN, and a scale that is not 1 / sqrt(192)
#
# The real model was first trained on 4,096 positions, and reads 163,840. The fast pairs turn many times over in
# either; they have seen every angle. The slow ones never completed a turn in training, and at forty times the length
# they would meet angles that they have never seen. **YaRN** (Peng et al. 2023) slows the slow pairs down by 40, leaves
# the fast ones, and blends in between.

# %%
show(*mla.draw_turns(real))
plain = frequencies(R, real.rope_theta, None)
yarn = frequencies(R, real.rope_theta, real.yarn)
claim(
    "yarn-slows-some-pairs",
    torch.equal(yarn[:11], plain[:11])
    and torch.allclose(yarn[23:] * 163_840, plain[23:] * 4096),
    "with YaRN the slowest 9 pairs turn as far in 163,840 tokens as they"
    " did in 4,096, and the fastest 11 as ever",
)

# %% [markdown]
# Attention over forty times as many tokens is also *flatter*: more keys share the softmax. YaRN's second half
# sharpens it. Both query and key are meant to grow by `mscale` = 0.1 ln 40 + 1; this model leaves them alone and
# puts the square into the softmax scale. It applies to short texts too.

# %%
mscale = 0.1 * math.log(real.yarn.factor) + 1
usual = (N + R) ** -0.5
scale = usual * mscale**2
claim(
    "yarn-softmax-scale",
    round(scale, 6) == 0.135234 and math.isclose(scale, real.softmax_scale),
    f"the softmax scale is {scale:.6f}, not {usual:.4f}: each score is"
    f" {scale / usual:.2f} times the usual one",
    value=f"{scale / usual:.2f} times",
)

# %% [markdown]
# To multiply by mscale once instead of twice is an easy mistake, and nothing would crash: scores would still be larger
# than usual, only not {claim:yarn-softmax-scale}.
#
# ## How many numbers do the heads need?
#
# Back to the price of MLA: the rank. Our trained model has 4 heads, whose keys and values are 4 x (8 + 24) = 128
# numbers a token, from a latent of 48. Could it be less? We take `kv_b_proj`, the matrix with every W_k and W_v,
# and replace it by the nearest one of a smaller rank r. Such a matrix factors, 48 -> r -> 128, and then the cache
# need only hold the r numbers in the middle.
#
# To judge the damage we need something that the model must *do*. Two things: read prose, in bits per byte; and find
# needles, symbols whose value was given once, somewhere earlier in the text. Predict, then move the slider.

# %%
from course.figures.low_rank import damage, low_rank
from dsa.datasets import corpus
from dsa.datasets.recall_tasks import Needles

task = Needles(corpus.load("../data/texts"), length=256, pairs=8, queries=8)
episodes = task.generate(torch.Generator().manual_seed(1), 8)
compare = damage(small, tokens, episodes)
found = compare(small)
print(f"whole: {found.recall:.0%} of needles, {found.bits:.1f} bits a byte")
guess = predict("At half the rank, what share of the needles?", 0.5)

# %%
cut = {r: compare(low_rank(small, r)) for r in (12, 24, 32, 48)}
guess.reveal(
    cut[24].recall,
    "what was cut is the weaker half, and the needles hardly use it.",
)

# %%
claim(
    "half-the-rank",
    cut[24].recall > 0.8 and cut[24].bits < cut[48].bits + 1,
    "at half the rank more than 80% of the needles are found, and prose"
    " costs less than one bit more",
)
claim(
    "two-thirds-of-the-rank",
    cut[32].recall > 0.95 and cut[32].bits < cut[48].bits + 0.25,
    "at two thirds of it more than 95%, and less than a quarter of a bit",
)

# %%
from course.figures.low_rank import draw_rank, layer_choices
from course.ui.panel import Choice, Panel, Slider, static_snapshots

draw = draw_rank(small, tokens, episodes)
panel = Panel(
    draw,
    rank=Slider("rank", 1, 48, 24),
    where=Choice("cut in", layer_choices(small), "all layers"),
)
panel

# %%
static_snapshots(draw, [{"rank": n, "where": where} for n, where in (
    (8, "all layers"), (24, "all layers"), (8, "layer 0"), (8, "layer 2"),
)])  # fmt: skip
by_layer = [
    compare(low_rank(small, 8, f"layer {n}")).recall for n in (0, 2)
]
claim(
    "rank-8-by-layer",
    by_layer[0] > 0.9 and by_layer[1] < 0.75,
    f"cut to 8, layer 0 leaves {by_layer[0]:.0%} of the needles, layer 2"
    f" {by_layer[1]:.0%}",
)

# %% [markdown]
# Two things to notice. Down to two thirds of the rank little happens; then prose pays bit by bit, while the needles
# go from nearly all to few between rank 24 and rank 8. And layers differ: layer 0 hardly minds, layer 2 does. One C
# for all layers, as in the published model, must do for the neediest.
#
# A model *trained* at a smaller C may well do better than ours cut down afterwards. The slider shows what the numbers
# are for, not what the best C is.
#
# ## Exercises
#
# Write the function, run its cell and the check below it. Nothing happens if you skip one.

# %% [markdown]
# {exercise:latent_attention.my_cache_bytes}

# %% [markdown]
# {exercise:latent_attention.my_scores}

# %% [markdown]
# {exercise:latent_attention.my_output}

# %% [markdown]
# {exercise:latent_attention.my_partners}

# %% [markdown]
# {exercise:latent_attention.my_for_halves}

# %% [markdown]
# ## Where it fails
#
# **Too small a rank.** With a quarter of the latent the model still reads prose, worse, but not like one without a
# clue (8 bits). Looking something up is what it can mostly no longer do.

# %%
claim(
    "quarter-of-the-rank",
    cut[12].recall < 0.5 and cut[12].bits < 6,
    f"at a quarter of the rank {cut[12].recall:.0%} of the needles are"
    f" found, and prose costs {cut[12].bits:.1f} bits, not"
    f" {cut[48].bits:.1f}",
)

# %% [markdown]
# **Halves instead of neighbours.** Every shape fits and nothing crashes, but the weights were trained for the other
# pairs. The course keeps such mistakes in a list, to be switched on for a while:

# %%
from course.bugs.injected_bugs import find_bug

bug = find_bug("halves in MLA")
print(bug.what)
with bug.apply():
    wrong = compare(small)

# %%
claim(
    "wrong-pairing-costs",
    wrong.moved > 0.2 and wrong.bits > cut[48].bits + 0.3,
    "with halves turned instead of neighbours more than a fifth of the"
    " attention goes elsewhere, and prose costs at least 0.3 bits more",
)
claim(
    "wrong-pairing-still-finds",
    wrong.recall > 0.8,
    f"and yet {wrong.recall:.0%} of the needles are still found",
    value=f"{wrong.recall:.0%}",
)

# %% [markdown]
# The needles forgive a lot here: a test that asks for 80% of them would let this mistake pass. A symbol can be
# looked up by *content* alone, in the part of the key that never turns.
#
# **RoPE on the latent** failed above already: the scores survive, and what is read depends on where it
# stood.
#
# **The wrong mode.** Reading a prompt in MQA mode costs {claim:pair-flop-of-modes} times as much for each pair, and
# writing in MHA mode expands the whole cache for every token. The numbers are right either way, so no test of
# *results* can tell. That is why exercises 2.2 and 2.3 count multiplications.
#
# ## What you have proved
#
# A token leaves {claim:mla-against-mha-bytes}. Absorbed and expanded attention are one, positions included once they
# travel apart, by hand and in the package, from tokens to logits. In MQA mode a pair costs {claim:pair-flop-of-modes}
# times as much. Expanding a key or absorbing a query costs {claim:expanding-one-token}, and after 32,768 cached
# tokens it pays to expand from {claim:when-expanding-pays} new ones on.
#
# **What the report does not say, and what we chose.** It says that DSA is built on the MQA mode, and shows both
# modes in an appendix; it does not give the crossing. This package expands for any dense chunk of more than one
# token: that is right for whole prompts, and too early for a few new tokens after many at the real sizes. Nor does it
# say how C = 512 was chosen.
#
# **Five questions**, with short answers folded away
# 1. MQA shares one key among all heads, and so does MLA's MQA mode. Why do MLA's heads still see different keys?
# 2. Why is the rotary key turned before it is cached, and the latent normalised before it is cached?
# 3. Whose price is the absorption, the key's or the query's, and why does that decide between prefill and decode?
# 4. Sparse attention caches an index key too, 256 bytes a token and layer in bf16, beside MLA's 1,152. Is its cache
#    smaller or larger than that of dense attention?
# 5. Two programs load the same weights. Their logits may differ from the first token on, or only from the second. Which
#    of the two points to RoPE?
#
# <details><summary>Answers</summary>
#
# 1. Each head absorbs its own W_k into its query, and so asks the shared latent for something else; and its own W_v
#    reads something else out of the mixture.
# 2. Both depend on the token and its place alone, never on the query. Done once, they serve every later query.
# 3. The query's, once however many keys there are. In decode one query meets all keys, so absorb. In prefill there are
#    as many queries as keys, the prices cancel, and the cheaper pair decides.
# 4. Larger, 1,408 bytes. What sparse attention saves is work; bytes are saved by FP8.
# 5. Only from the second. At position 0 nothing is turned, and a first token sees only itself, whatever its score.
#
# </details>
#
# **Next:** [03 The lightning indexer](03_lightning_indexer.ipynb) scores these tokens for each query, and
# [04 Token selection](04_token_selection.ipynb) chooses which of their latents it reads at all. The
# [README](../README.md) lists what else is there.
