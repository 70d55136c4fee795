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
# 3. count bytes per token and FLOP per pair, and say why prefill and decode take different sides.
#
# **You need** PyTorch, and attention with queries, keys and values. [00 Start here](00_start_here.ipynb) is a
# gentle beginning, and not required.
#
# **Routes.** 15 minutes: the figures and the ✓ lines. 2 hours: predict, change numbers, and exercises 2.1 to 2.3.
# 2 days: exercises 2.4 and 2.5, then `dsa/model/attention.py` line by line. Computing: **20 s**.
#
# Shape letters, as everywhere in this course: `T` query positions, `S` key positions, `D` model width, `H` heads,
# `C` latent width, `R` rotary width, `N` width of a head's key without it, `V` width of a head's value.

# %%
import inspect

import dsa
import matplotlib.pyplot as plt
import torch
from dsa.model.attention import Attention
from dsa.model.rope import Rope, frequencies
from dsa.show.claims import claim
from dsa.show.exercises.catalogue import check
from dsa.show.figures import COLOURS, MARKERS, show, style
from dsa.show.predict import predict
from dsa.show.reading import read_file
from dsa.text.tokenizer import encode
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
H, N, R = (
    real.num_attention_heads,
    real.qk_nope_head_dim,
    real.qk_rope_head_dim,
)
C, V, layers = real.kv_lora_rank, real.v_head_dim, real.num_hidden_layers
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
for kind, count in numbers.items():
    print(f"{kind:14} {count:6,} numbers a layer {size[kind]:9,} bytes")

# %%
guess.reveal(
    size["MHA"] / 1e6,
    "128 heads x (192 + 128) numbers x 2 bytes x 61 layers.",
)
claim(
    "C2.1",
    size["MHA"] == 4_997_120 and size["MLA"] == 70_272,
    f"a token leaves {size['MHA']:,} bytes with MHA"
    f" and {size['MLA']:,} with MLA",
)
groups = numbers["MLA"] / numbers["MQA"]
claim(
    "C2.2",
    groups == 1.8,
    f"MLA's cache is as large as GQA's with {groups:.1f} groups",
    value=f"{groups:.1f}",
)

# %%
from dsa.show.latent import draw_caches

show(*draw_caches(size, tokens=131_072))

# %% [markdown]
# Under MHA one long text would not fit into eight accelerators with 80 GB each. The classical answer is to let
# heads **share**: grouped-query attention (GQA) gives each group of heads one key and value, multi-query attention
# (MQA) gives all heads the same. That saves bytes by giving up differences: under MQA 128 heads ask different
# questions of one and the same key.
#
# **MLA** is the fourth bar. It is *not* the smallest: MQA at these head sizes keeps 320 numbers. What MLA keeps is
# bigger than one head's key and value, and much smaller than all heads', and yet each head gets a key and a value
# of its own. In units of a head's 320 numbers that is {C2.2} groups of GQA. (The DeepSeek-V2 report says 2.25; it
# counts heads whose keys have 128 numbers, without a rotary part.)
#
# ## Keys that are made, not kept
#
# The idea takes one sentence: **keep what keys and values are made from.** We build it on tiny tensors, with every
# size different so that a wrong shape cannot hide, and in fp64, so that what is equal looks equal.

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
    "C2.3", rank == c, f"{rows.shape[1]} numbers a token, a rank of {rank}"
)

# %% [markdown]
# No two heads are equal, as under MQA; they only may not differ in *everything*. How much room they need is an
# empirical question, and a later slider asks it of a trained model.
#
# ## Absorption: the key's side
#
# So far we have saved memory and paid in work: at every step each cached token must be expanded for each head
# again. The trick that makes MLA worthwhile is to expand nothing at all. Look at one head and one token:
#
# $$q \cdot (W_k\, c) \;=\; q^\top W_k\, c \;=\; (W_k^\top q)^\top c \;=\; (W_k^\top q) \cdot c$$
#
# The brackets moved, nothing else. On the left W meets the *token*, on the right it meets the *query*. There are as
# many tokens as the text is long, but one query. So we move W once, for each head, and then score the cache *as it
# is*. The absorbed queries are wider (6 instead of 4), and all heads meet the same key: the latent.

# %%
absorbed = torch.einsum("hn,hnc->hc", q, W_k)  # (h, c), once a query
scores_absorbed = absorbed @ latent.T  # (h, S), the cache untouched
claim(
    "C2.4",
    torch.allclose(scores_absorbed, scores, atol=1e-10, rtol=0),
    "absorbed queries give the scores of expanded keys",
)

# %% [markdown]
# ## Absorption: the value's side
#
# The same with the sum that attention ends in. A matrix does not care whether it comes before a weighted sum or
# after it:
#
# $$\sum_s p_s\, (W_v\, c_s) \;=\; W_v \sum_s p_s\, c_s$$
#
# Mix the latents first, expand the mixture once.

# %%
mixed = weights @ latent  # (h, c): each head's mixture of latents
absorbed_out = torch.einsum("hc,hvc->hv", mixed, W_v)
claim(
    "C2.5",
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
# They are one model, and two orders of multiplying. DeepSeek Sparse Attention is defined on the MQA mode, and this
# is why: a selected token is fetched *once* and serves all 128 heads.
#
# One warning. It is tempting to go on and multiply each head's query projection with its key projection once and
# for all, since two matrices in a row are one matrix. Count first:

# %%
Q = real.q_lora_rank
apart = H * N * (Q + C)  # query latent -> head -> latent
merged = H * Q * C  # query latent -> latent
claim(
    "C2.6",
    merged == 3 * apart,
    f"merged, {apart / 1e6:.1f} M parameters a layer would be"
    f" {merged / 1e6:.1f} M",
)

# %% [markdown]
# A head's 128 numbers are a bottleneck between 1,536 and 512, and bottlenecks are cheap. "Absorb" means an order of
# multiplication at run time, not a new matrix.
#
# ## A rotation in the way
#
# Attention must know *where* tokens stand. A rotary embedding (RoPE) takes pairs of numbers and turns each by an
# angle that grows with the position, in queries and keys alike. What remains in their product is the difference:


# %%
def rotate(x, position, theta=100.0):
    """Turn the pairs (2i, 2i + 1) of x (..., width)."""
    pairs = x.shape[-1] // 2
    angle = position * theta ** -(torch.arange(pairs) / pairs)
    a, b = x[..., 0::2], x[..., 1::2]
    turned_a = a * angle.cos() - b * angle.sin()
    turned_b = b * angle.cos() + a * angle.sin()
    return torch.stack([turned_a, turned_b], dim=-1).flatten(-2)


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
from dsa.show.latent import draw_drift

t = S - 1
distances = torch.arange(S)
each = torch.stack([rotate(q, int(d)) for d in distances])  # (S, h, n)
each = torch.einsum("dhn,hnc->dhc", each, W_k)  # one a distance
alike = torch.cosine_similarity(each, each[:1], dim=-1)  # (S, h)

show(*draw_drift(alike))

# %% [markdown]
# A query that absorbed once, for distance 0, soon asks something else entirely. The two ways out, in numbers:

# %%
turned = torch.stack([rotate(keys[:, s], s) for s in range(S)], dim=1)
true = torch.einsum("hn,hsn->hs", rotate(q, t), turned)

once = torch.einsum("hc,sc->hs", each[0], latent)  # pretends distance 0
again = torch.einsum("shc,sc->hs", each.flip(0), latent)  # S queries
off_once = float((once - true).abs().max() / true.std())
off_again = float((again - true).abs().max() / true.std())
claim(
    "C2.7",
    off_again < 1e-6 and off_once > 0.5,
    "one absorbed query for each distance gives the scores;"
    " one for all distances is off by more than half their deviation",
)

# %% [markdown]
# (A small detail: `rotate` makes its angles in fp32, so "gives the scores" means to about seven digits here.) The
# first way out is exact and useless: a new absorbed query for every token is as much work as expanding every key.
#
# ## Turn the latent instead?
#
# A plausible repair: the cache holds latents, so rotate the *latent* by its position and the absorbed query by its
# own. The scores then depend on distances again. But the latent is also the **value**, and what a head reads now is
# turned by where it was read. We attend to the same tokens twice, as if the text stood at the beginning, and as if
# it stood 10 positions later. Nothing should change:


# %%
def rope_on_latent(first):
    """Attention output when the cached latents themselves are turned."""
    cache = torch.stack([rotate(latent[s], first + s) for s in range(S)])
    weights = (rotate(absorbed, first + t) @ cache.T).softmax(-1)
    return weights, torch.einsum("hc,hvc->hv", weights @ cache, W_v)


(weights_0, out_0), (weights_10, out_10) = map(rope_on_latent, (0, 10))
moved = float((out_10 - out_0).norm() / out_0.norm())
claim(
    "C2.8",
    torch.allclose(weights_0, weights_10, atol=1e-4) and moved > 0.2,
    "with RoPE on the latent a shift leaves the weights alone and changes"
    f" what is read by {moved:.0%}",
)

# %% [markdown]
# One could keep the latents as they are and turn each of them on the fly whenever it serves as a key, at every step
# for every cached token. And the MHA mode would be gone: turned latents are no turned keys.
#
# ## Decoupled: two keys in one
#
# MLA's answer is to let content and position travel apart. A head's query and key get two parts:
#
# * **nope** (*no* position): N numbers, expanded from the latent, never turned, free to be absorbed;
# * **rope**: R numbers, made from the hidden state directly, turned *before* they are cached, and the same for all
#   heads. No W stands behind the rotation, so there is nothing to absorb.
#
# The score is the sum of both products. The cache holds C + R numbers: 512 + 64 = **576**.

# %%
q_rope = rotate(random(h, r), t)  # each head asks in its own way ...
k_rope = torch.stack(
    [rotate(random(r), s) for s in range(S)]
)  # ... one key
cache = torch.cat([latent, k_rope], dim=-1)  # (S, c + r)

mha_keys = torch.cat([keys, k_rope.expand(h, S, r)], dim=-1)
mha = torch.einsum(
    "hx,hsx->hs", torch.cat([q, q_rope], dim=-1), mha_keys
).softmax(-1)
mha = torch.einsum("hs,hsv->hv", mha, values)

mqa = (torch.cat([absorbed, q_rope], dim=-1) @ cache.T).softmax(-1)
mqa = torch.einsum("hc,hvc->hv", mqa @ cache[:, :c], W_v)
claim(
    "C2.9",
    torch.allclose(mha, mqa, atol=1e-10, rtol=0),
    f"with {c} + {r} cached numbers both modes agree, positions included",
)

# %% [markdown]
# ## Mine and the package's
#
# Now the same on a trained model. It has the published architecture at laptop size: 4 heads, a latent of 48 and a
# rotary part of 16. We take its first layer, in fp64, and the hidden states of a real text.

# %%
model = dsa.from_pretrained("../data/base", dtype=torch.float64)
text = read_file("../data/texts/lighthouse.txt").strip()
tokens = torch.tensor([encode(text)[-256:]])
layer = model.model.layers[0]
attention = layer.self_attn
x = layer.input_layernorm(model.model.embed_tokens(tokens))  # (1, T, D)
rope = Rope.at(model.config, 0, x.shape[1])
for name, p in attention.named_parameters():
    print(f"{name:26} {tuple(p.shape)}")

# %% [markdown]
# The weights bear the published names: `kv_a_proj_with_mqa` makes latent and rotary key, `kv_b_proj` holds every
# head's W_k and W_v. The latent is normalised before it is cached. By hand:

# %%
mini = model.config
sizes = [mini.kv_lora_rank, mini.qk_rope_head_dim]  # C, R of this model
freq = mini.rope_theta ** -(torch.arange(0, sizes[1], 2) / sizes[1])


def my_rotate(x):
    """Turn neighbours: x (T, R), row t by its position t."""
    angle = torch.arange(len(x))[:, None] * freq  # (T, R/2)
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(z).flatten(-2)


def my_cache(x):
    """What the tokens x (T, D) leave behind: (T, C + R)."""
    both = x @ attention.kv_a_proj_with_mqa.weight.T
    latent, k_rope = both.split(sizes, dim=-1)
    size = (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    latent = latent / size * attention.kv_a_layernorm.weight
    return torch.cat([latent, my_rotate(k_rope)], dim=-1)


# %% [markdown]
# With complex numbers a rotation of a pair is one multiplication; the package writes sines and cosines. And the two
# modes, for all query tokens at once:


# %%
def my_modes(q, cache):
    """Both modes: q (T, H, N + R), cache (T, C + R) -> twice (T, H, V)."""
    n = mini.qk_nope_head_dim
    latent, k_rope = cache.split(sizes, dim=-1)
    both = attention.kv_b_proj.weight.unflatten(0, (q.shape[1], -1))
    w_k, w_v = both[:, :n], both[:, n:]  # (H, N, C), (H, V, C)
    position = torch.einsum("thr,sr->ths", q[..., n:], k_rope)

    keys = torch.einsum("hnc,sc->hsn", w_k, latent)  # MHA: expand
    values = torch.einsum("hvc,sc->hsv", w_v, latent)
    scores = torch.einsum("thn,hsn->ths", q[..., :n], keys) + position
    mha = torch.einsum("ths,hsv->thv", causal(scores), values)

    wide = torch.einsum("thn,hnc->thc", q[..., :n], w_k)  # MQA: absorb
    scores = torch.einsum("thc,sc->ths", wide, latent) + position
    mixed = torch.einsum("ths,sc->thc", causal(scores), latent)
    return mha, torch.einsum("thc,hvc->thv", mixed, w_v)


def causal(scores):
    """Softmax of scores (T, H, S) over what each query may see."""
    future = torch.ones_like(scores[:, 0]).triu(1).bool()[:, None]
    scores = mini.softmax_scale * scores
    return scores.masked_fill(future, float("-inf")).softmax(-1)


# %%
q, _ = attention.queries(x, rope)  # (1, T, H, N + R)
kv = attention.latents(x, rope)  # (1, T, C + R)
mine = my_cache(x[0])
claim(
    "C2.10",
    torch.allclose(mine, kv[0], atol=1e-5),
    "my cache is dsa's, latent and rotary key",
)

mha, mqa = my_modes(q[0], kv[0])
gaps = {
    "mine and dsa's, MHA": mha - attention.attend_mha(q, kv)[0],
    "mine and dsa's, MQA": mqa - attention.attend_mqa(q, kv)[0],
    "my MHA and my MQA": mha - mqa,
}
for pair, gap in gaps.items():
    print(f"{pair}: differ by less than 1e-10: {gap.abs().max() < 1e-10}")
claim(
    "C2.11",
    all(float(gap.abs().max()) < 1e-10 for gap in gaps.values()),
    "both modes by hand equal both modes of dsa, within 1e-10 in fp64",
)
print(inspect.getsource(Attention.absorb))

# %% [markdown]
# The last lines are the package's own absorption, and from here on it is enough. Next comes a layer at the *real*
# head sizes, 128 heads and C = 512, with random weights. (The model's width does not matter to the two modes, so a
# small one saves memory.) In fp64 the tolerance is 1e-10, in fp32 5e-5.

# %%
torch.manual_seed(0)
one = real.replace(hidden_size=64, q_lora_rank=64)
big = Attention(one, 0)
hidden = torch.randn(1, 24, 64)
gap = {}
for dtype in (torch.float32, torch.float64):
    big, hidden = big.to(dtype), hidden.to(dtype)
    angles = Rope.at(one, 0, 24)
    q_big, _ = big.queries(hidden, angles)
    kv_big = big.latents(hidden, angles)
    both = big.attend_mha(q_big, kv_big), big.attend_mqa(q_big, kv_big)
    gap[dtype] = float((both[0] - both[1]).abs().max())
claim(
    "C2.12",
    gap[torch.float64] < 1e-10 and gap[torch.float32] < 5e-5,
    "at the real head sizes the modes agree within 5e-5 in fp32"
    " and 1e-10 in fp64",
)
del big, q_big, kv_big

# %% [markdown]
# And the whole model, all layers, from tokens to logits. Dense attention over a prompt runs in MHA mode. Choosing
# *all* 256 tokens ("the last 256") runs the same model in MQA mode, because a selection always does:


# %%
def logits(model, kind, top_k=256):
    before, model.attention = model.attention, kind
    model.top_k = top_k
    found = model(tokens)
    model.attention = before
    return found


small = dsa.from_pretrained("../data/base")  # fp32
gap = [
    float((logits(m, "dense") - logits(m, "window")).abs().max())
    for m in (model, small)
]
claim(
    "C2.13",
    gap[0] < 1e-10 and gap[1] < 5e-5,
    "from tokens to logits the modes agree within 1e-10 in fp64"
    " and 5e-5 in fp32",
)

# %% [markdown]
# ## What each mode costs
#
# Equal numbers, unequal work. Per pair of query and key, and in all heads, the MHA mode multiplies 192 numbers for
# the score and 128 for the output; the MQA mode 576 and 512. A multiplication and an addition are 2 FLOP. PyTorch
# can count what is really multiplied; tensors on the *meta* device have shapes but no contents, so the real sizes
# fit.

# %%
from torch.utils.flop_counter import FlopCounterMode


def flops(call, *shapes):
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        call(*inputs)
    return counter.get_total_flops()


pairs = 1000  # one query, 1000 keys
mha_pair = flops(
    lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    *((H, 1, N + R), (H, pairs, N + R), (H, pairs, V)),
)
mqa_pair = flops(
    lambda q, kv: (q @ kv.T).softmax(-1) @ kv[:, :C],
    *((H, C + R), (pairs, C + R)),
)
mha_pair, mqa_pair = mha_pair // pairs, mqa_pair // pairs

# %%
from dsa.cost import roofline

claim(
    "C2.14",
    mha_pair == 81_920 == roofline.mha_pair_flops(real)
    and mqa_pair == 278_528 == roofline.mqa_pair_flops(real),
    f"a pair costs {mha_pair:,} FLOP in MHA mode, {mqa_pair:,} in MQA mode",
)

# %% [markdown]
# So the absorbed mode is the *dearer* one, 3.4 times per pair: every head reads the whole shared vector instead of
# a short one made for it. But expanding is not free, and neither is absorbing. Per token, one makes 128 keys and
# values from a latent; the other takes 128 queries to the latent's side and 128 outputs back.

# %%
expand = flops(lambda c, w: c @ w, (1, C), (C, H * (N + V)))
absorb = flops(lambda q, w: q @ w, (H, 1, N), (H, N, C)) + flops(
    lambda o, w: o @ w, (H, 1, C), (H, C, V)
)
claim(
    "C2.15",
    expand == absorb == 33_554_432,
    f"expanding a key and absorbing a query cost the same {expand:,} FLOP",
)

# %% [markdown]
# The same price, but of **different things**: MHA mode pays it for every *key*, MQA mode for every *query*. Reading
# a prompt, there are as many queries as keys, so this price cancels and the cheaper pairs win: MHA. Writing one
# token after 32,768 others, there is one query and there are 32,769 keys: MQA. In between there must be a crossing.
# **How many new tokens does it take until the MHA mode is the cheaper one again?**

# %%
guess = predict(
    "New tokens after 32,768 cached ones at which MHA wins?",
    1000,
    low=1,
    high=32768,
    form=",.0f",
    unit="tokens",
)

# %%
cached = 32_768


def cost(new):
    """FLOP of one layer's attention in both modes."""
    pairs = new * cached + new * (new + 1) // 2
    mha = (cached + new) * expand + pairs * mha_pair
    mqa = new * absorb + pairs * mqa_pair
    return mha, mqa


crossing = next(n for n in range(1, cached) if cost(n)[0] < cost(n)[1])
guess.reveal(
    crossing,
    "each new query saves 196,608 FLOP with each key, and making a key"
    " costs 33.6 million: 171 queries pay for it.",
)
claim(
    "C2.16",
    crossing == 171,
    f"from {crossing} new tokens on, expanding the cache is worth it",
    value=f"{crossing}",
)

# %%
from dsa.show.latent import draw_crossing

new = [2**n for n in range(13)]
show(*draw_crossing(cost, new, crossing, cached))

# %% [markdown]
# Could decode not keep the *expanded* keys, and have the cheap pairs without expanding again? Then it would have to
# read them, and at decode time reading is what takes time. How much is computed with each byte that is read?

# %%
per_byte = {
    "MHA mode, expanded cache": mha_pair / (2 * H * (N + R + V)),
    "MQA mode, latent cache": mqa_pair / (2 * (C + R)),
}
for mode, intensity in per_byte.items():
    print(f"{mode}: {intensity:.0f} FLOP per byte")
claim(
    "C2.17",
    per_byte["MHA mode, expanded cache"] == 1.0,
    f"a latent that is read once does"
    f" {per_byte['MQA mode, latent cache']:.0f} times the work",
    value=f"{per_byte['MQA mode, latent cache']:.0f}",
)

# %% [markdown]
# An H800 can make about 300 bf16 FLOP in the time in which it reads one byte (published: 989 TFLOP/s and 3.35
# TB/s). With 1 FLOP per byte it would stand idle nearly all the time. With {C2.17} memory and arithmetic are about
# balanced. The dearer pairs are free, as it were, because they wait for nothing.
#
# So prefill takes the MHA mode and decode the MQA mode. And sparse attention takes MQA, in prefill too: it is
# defined on rows that are fetched once for all heads, and with 2,048 keys for each query it can afford the pair.
# (For short prompts the report mentions a masked MHA mode instead, because it is faster there.)
#
# ## Two rotary conventions
#
# A rotation turns pairs. *Which* numbers form a pair is a convention, and there are two. MLA turns **neighbours**
# (2i, 2i + 1); the lightning indexer, in the same model, turns **halves** (i, i + R/2).

# %%
from dsa.show.latent import draw_pairs

show(*draw_pairs())

# %% [markdown]
# Neither is better. Each gives scores that depend on the distance alone. What must never happen is that the two
# *meet*: one for the query and the other for the key, or one in training and the other afterwards.

# %%
R_mini, far = mini.qk_rope_head_dim, 5
ends = torch.randn(2, R_mini, generator=torch.Generator().manual_seed(4))
run = Rope.at(mini, 0, 128)
turned = {
    name: [
        getattr(run, name)(end.expand(1, 128, 1, -1))[0, :, 0]
        for end in ends
    ]
    for name in ("neighbours", "halves")
}  # query and key at every position


def at_distance(query, key):
    """Scores of pairs that stand `far` tokens apart, along the text."""
    return (turned[query][0][far:] * turned[key][1][:-far]).sum(-1)


series = {
    "both neighbours": at_distance("neighbours", "neighbours"),
    "both halves": at_distance("halves", "halves"),
    "halves meet neighbours": at_distance("halves", "neighbours"),
}

# %%
from dsa.show.latent import draw_swing

show(*draw_swing(series, distance=far))
swing = {name: float(x.max() - x.min()) for name, x in series.items()}
claim(
    "C2.18",
    swing["both neighbours"] < 1e-3
    and swing["both halves"] < 1e-3
    and swing["halves meet neighbours"] > 1,
    "either convention sees distances only; mixed, a score swings with the"
    " place in the text",
)

# %% [markdown]
# ## YaRN, and a scale that is not 1 / sqrt(192)
#
# The real model was first trained on 4,096 positions, and reads 163,840. The fast pairs turn thousands of times in
# either; they have seen every angle. The slow ones never completed a turn in training, and at forty times the
# length they would meet angles that they have never seen. **YaRN** slows the slow pairs down by 40, leaves the fast
# ones, and blends in between.

# %%
from dsa.show.latent import draw_turns

show(*draw_turns(real))
plain = frequencies(R, real.rope_theta, None)
yarn = frequencies(R, real.rope_theta, real.yarn)
claim(
    "C2.19",
    torch.equal(yarn[:11], plain[:11])
    and torch.allclose(yarn[23:] * 163_840, plain[23:] * 4096),
    "with YaRN the slow pairs turn as far in 163,840 tokens as they did in"
    " 4,096, and the fast ones as ever",
)

# %% [markdown]
# Attention over forty times as many tokens is also *flatter*: more keys share the softmax. YaRN's second half
# sharpens it. Both query and key are meant to grow by `mscale` = 0.1 ln 40 + 1; this model leaves them alone and
# puts the square into the softmax scale. It applies to short texts too. The square root rule would say 0.0722.

# %%
import math

mscale = 0.1 * math.log(real.yarn.factor) + 1
scale = (N + R) ** -0.5 * mscale**2
claim(
    "C2.20",
    round(scale, 6) == 0.135234 and math.isclose(scale, real.softmax_scale),
    f"with mscale = {mscale:.5f} the softmax scale is {scale:.6f}",
    value=f"{scale:.6f}",
)

# %% [markdown]
# {C2.20} instead of 0.072 nearly doubles every logit. To multiply by mscale once instead of twice is a real
# mistake that people have made; nothing crashes.
#
# ## How many numbers do the heads need?
#
# Back to the price of MLA: the rank. Our trained model has 4 heads, whose keys and values are 4 x (8 + 24) = 128
# numbers a token, from a latent of 48. Could it be less? We take `kv_b_proj`, the matrix with every W_k and W_v,
# and replace it by the nearest one of a smaller rank r. Such a matrix factors, 48 -> r -> 128, and then the cache
# need only hold the r numbers in the middle.
#
# To judge the damage we need something that the model must *do*. Two things: read prose, in bits per byte; and find
# needles, symbols whose value was given once, somewhere earlier in the text. Move the slider, or, without a kernel,
# look at four positions of it below.

# %%
guess = predict("At half the rank, what share of the needles?", 0.5)

# %%
from dsa.show.panel import Choice, Panel, Slider, twins
from dsa.show.rank import draw_rank, places
from dsa.text import corpus
from dsa.text.tasks import Needles

task = Needles(corpus.load("../data/texts"), length=256, pairs=8, queries=8)
episodes = task.generate(torch.Generator().manual_seed(1), 8)
draw = draw_rank(small, tokens, episodes)
panel = Panel(
    draw,
    rank=Slider("rank", 1, 48, 24),
    where=Choice("cut in", places(small), "all layers"),
)
panel

# %%
twins(
    draw,
    [
        {"rank": 8, "where": "all layers"},
        {"rank": 24, "where": "all layers"},
        {"rank": 8, "where": "layer 0"},
        {"rank": 8, "where": "layer 2"},
    ],
)

# %%
from dsa.show.rank import damage, low_rank

compare = damage(small, tokens, episodes)
cut = {r: compare(low_rank(small, r)) for r in (12, 24, 48)}
guess.reveal(
    cut[24].recall,
    "the directions that carry the symbols are among the strong ones.",
)
claim(
    "C2.21",
    cut[24].recall > 0.8 and cut[24].bits < cut[48].bits + 1,
    "at half the rank most needles are found, and prose costs less than"
    " one bit more",
)
by_layer = {
    n: compare(low_rank(small, 8, f"layer {n}")).recall for n in (0, 2)
}
claim(
    "C2.22",
    by_layer[0] > 0.9 and by_layer[2] < 0.75,
    f"cut to 8, layer 0 leaves {by_layer[0]:.0%} of the needles, layer 2"
    f" {by_layer[2]:.0%}",
)

# %% [markdown]
# Two things to notice. At two thirds of the rank hardly anything happens; then prose pays little by little, while
# the needles go from nearly all to few between rank 24 and rank 8. And layers differ: layer 0 hardly minds, layer
# 2, which looks symbols up, does. One C for all layers, as in the published model, is a choice for the neediest.
#
# A model *trained* at a smaller C would do better than ours cut down afterwards. The slider shows what the numbers
# are for, not what the best C is.
#
# ## Exercises
#
# Write the function, run its cell and the check below it. Nothing happens if you skip one.

# %% [markdown]
# {exercise:E2.1}

# %% [markdown]
# {exercise:E2.2}

# %% [markdown]
# {exercise:E2.3}

# %% [markdown]
# {exercise:E2.4}

# %% [markdown]
# {exercise:E2.5}

# %% [markdown]
# ## Where it fails
#
# **Too small a rank.** With a quarter of the latent the model still reads prose, worse, but not like one without a
# clue (8 bits). Looking something up is what it can no longer do.
#
# **Halves instead of neighbours.** Every shape fits and nothing crashes, but the weights were trained for the other
# pairs. The course keeps such mistakes in a list, to be switched on for a while:

# %%
claim(
    "C2.23",
    cut[12].recall < 0.5 and cut[12].bits < 6,
    f"at a quarter of the rank {cut[12].recall:.0%} of the needles are"
    f" left, prose costs {cut[12].bits:.1f} bits, not {cut[48].bits:.1f}",
)

# %%
from dsa.show.mistakes import find

mistake = find("halves in MLA")
print(mistake.what)
with mistake.apply():
    wrong = compare(small)
claim(
    "C2.24",
    wrong.moved > 0.2 and wrong.bits > cut[48].bits + 0.3,
    "with halves turned instead of neighbours more than a fifth of the"
    " attention goes elsewhere, and prose costs more",
)
claim(
    "C2.25",
    wrong.recall > 0.5,
    "and yet more than half of the needles are found",
)

# %% [markdown]
# The needles forgive a lot here, and a test made of needles alone would let this mistake pass. Is that because a
# symbol is looked up by *content*, in the part of the key that never turns? Take the rotary part away from the
# layer that does the looking up, and see.

# %%
import copy

still = copy.deepcopy(small)
last = still.model.layers[2].self_attn
last.q_b_proj.weight.unflatten(0, (4, -1))[:, mini.qk_nope_head_dim :] = 0
recall = compare(still).recall
claim(
    "C2.26",
    recall > 0.7,
    f"without any rotary part in layer 2, {recall:.0%} of the needles are"
    " found",
)

# %% [markdown]
# So it is, at least in that layer. Content and position really do travel apart.
#
# **RoPE on the latent** failed above already (C2.8): the scores survive, and what is read depends on where it
# stood.
#
# **The wrong mode.** Reading a prompt in MQA mode costs 3.4 times the attention, and writing in MHA mode expands
# the whole cache for every token (C2.14, C2.16). The numbers are right either way, so no test of *results* can
# tell. The exercises therefore count.
#
# ## What you have proved
#
# A token leaves 70,272 bytes instead of 4,997,120 (C2.1). Absorbed and expanded attention are one (C2.4, C2.5),
# positions included once they travel apart (C2.9), by hand and in the package, from tokens to logits (C2.11 to
# C2.13). A pair costs 81,920 or 278,528 FLOP (C2.14), a key or a query 33.6 million (C2.15), and from {C2.16} new
# tokens on it pays to expand.
#
# **What the report does not say, and what we chose.** It says that DSA is built on the MQA mode, and shows both
# modes in an appendix; it does not give the crossing. This package expands for any dense chunk of more than one
# token, though {C2.16} would be the better border at the real sizes. How C = 512 was chosen is not published.
#
# **Five questions**
# 1. MQA shares one key among all heads, and so does MLA's MQA mode. Why do MLA's heads still see different keys?
# 2. Why is the rotary key turned before it is cached, and the latent normalised before it is cached?
# 3. Whose price is the absorption, the key's or the query's, and why does that decide between prefill and decode?
# 4. In bf16 DSA's own index key adds 256 bytes to MLA's 1,152. Is its cache then smaller or larger than V3's?
# 5. Two programs load the same weights, and their logits differ from the first token on, or only from the second.
#    Which of the two smells of RoPE?
#
# **Next:** [04 Token selection](04_token_selection.ipynb) chooses which of these latents a query reads at all; the
# [README](../README.md) lists what else is there.
