# %% [markdown]
# # 09a Attention at length: where does the work go?
#
# A model with 671 billion parameters reads a long text. It is natural to think that the parameters are what costs.
# For the last token of a prompt of 128 Ki, under dense attention, they are a tenth of the work. This chapter
# counts, for the real DeepSeek-V3.2-Exp, what a token costs, where the work goes as the context grows, and what
# sparse attention does and does not take away.
#
# Nothing here needs a large machine. A count needs only the sizes, and they are published.
#
# **You will be able to**
# 1. count FLOPs, bytes and parameters of any model of this family, and trust the count because a real model ran
#    exactly that many, and some more whose reason you can name;
# 2. say at which length sparse attention begins to pay, and why not before;
# 3. answer "but the indexer still looks at everything, so is it not still O(L²)?" with a number.
#
# **You need** PyTorch, and the idea of attention; [00 Start here](00_start_here.ipynb) is a good warm-up.
#
# **Afterwards**: the source of `dsa/analysis` and its tests. Computing: **15 s**.
#
# Shape letters, as everywhere in this course: `S` visible keys, `D` model width, `H` heads, `C` latent width, `R`
# rotary width, `N` and `V` each head's further key and value width, `J` index heads of width `W`, `K` kept tokens
# (top-k). Beside them `L`, the tokens of a prompt. A Ki is 1,024, so 128 Ki are 131,072.
#
# Where numbers come from is told by the line: what is **modelled**, counted from sizes, is dash-dotted, and what
# the report (DeepSeek's, on V3.2-Exp) **published** is dotted. Bars are modelled too. Time is **measured** once, under
# "Where it fails".

# %%
import math
from itertools import product

import dsa
import torch
from course.exercises.attention_flops import check
from course.figures import flop_counts
from course.ui.claims import claim
from course.ui.predict import predict
from course.ui.style import show, style
from dsa.analysis import flops, memory
from dsa.model.config import Config
from torch.utils.flop_counter import FlopCounterMode

style()

# %%
real = Config.v32_exp()
H, N = real.num_attention_heads, real.qk_nope_head_dim
V, R = real.v_head_dim, real.qk_rope_head_dim
C, D, layers = real.kv_lora_rank, real.hidden_size, real.num_hidden_layers
J, W, K = real.index_n_heads, real.index_head_dim, real.index_topk
print(f"{layers} layers, D {D}, H {H}, N {N}, R {R}, V {V}, C {C}")
print(f"indexer: J {J}, W {W}, K {K}")

# %% [markdown]
# ## One pair
#
# Attention is made of pairs: one query looks at one key. For each head it multiplies two vectors (the **score**),
# and later adds the key's value with the weight that came out (the **value**). Here is one pair in slow motion, on
# tiny vectors, with a counter. One multiplication with its addition makes 2 FLOP (floating-point operations).
# Softmax is left out: it is one exponential for each score, not hundreds of multiplications.


# %%
def one_pair(query, key, value):
    """One query and one key, H heads: what is added, and FLOP."""
    out, flop = torch.zeros_like(value), 0
    for h in range(len(query)):
        score = 0.0
        for a, b in zip(query[h], key[h], strict=True):
            score, flop = score + a * b, flop + 2
        for i, number in enumerate(value[h]):
            out[h, i], flop = score * number, flop + 2
    return out, flop


# %%
generator = torch.Generator().manual_seed(1)
query, key = torch.randn(2, 3, 5, generator=generator)  # 3 heads, width 5
value = torch.randn(3, 4, generator=generator)
slow, flop = one_pair(query, key, value)
fast = (query * key).sum(-1, keepdim=True) * value
print(flop, "FLOP; 2 H (key + value) is", 2 * 3 * (5 + 4))
print("same numbers:", torch.allclose(slow, fast, atol=1e-5))

# %% [markdown]
# Multi-head latent attention can be computed in two ways, and they differ in what a key *is*. ([Chapter
# 02](02_latent_attention.ipynb) proves that they give the same result. Here only the widths matter.)
#
# * **MHA mode** expands: each head has a key of N + R numbers and a value of V of its own.
# * **MQA mode** does not: all heads share the cached latent. The key has C + R numbers, and its first C are the
#   value.
#
# And the **indexer** has J small heads that score W numbers, and no values at all. It only ranks.
#
# The formula was right for tiny vectors. For the real ones we ask PyTorch: `FlopCounterMode` counts the products
# that a piece of code really makes. But first:

# %%
guess = predict(
    "One pair in MQA mode is the work of how many in the indexer?",
    3, high=100, form=".0f", unit="pairs",
)  # fmt: skip


# %%
def counted(heads, key_width, value_width):
    """FLOP of one pair as PyTorch counts them."""
    q, k = torch.ones(heads, 1, key_width), torch.ones(heads, key_width, 1)
    with FlopCounterMode(display=False) as counter:
        score = q @ k  # (heads, 1, 1)
        score @ torch.ones(heads, 1, value_width)
    return counter.get_total_flops()


# %%
mha = 2 * H * ((N + R) + V)
mqa = 2 * H * ((C + R) + C)
index = 2 * J * W
print(f"MHA {mha:,}   MQA {mqa:,}   indexer {index:,}")

# %%
show(*flop_counts.draw_pair(real))
claim(
    "mha-pair-flop",
    mha == flops.mha_pair_flops(real) == counted(H, N + R, V),
    f"a pair in one layer takes {mha:,} FLOP in MHA mode",
    value=f"{mha:,}",
)
claim(
    "mqa-pair-flop",
    mqa == flops.mqa_pair_flops(real) == counted(H, C + R, C),
    f"a pair in one layer takes {mqa:,} FLOP in MQA mode",
    value=f"{mqa:,}",
)
claim(
    "index-pair-flop",
    index == flops.index_pair_flops(real) == counted(J, W, 0),
    f"the indexer takes {index:,} FLOP to score a pair in one layer",
    value=f"{index:,}",
)

# %%
claim(
    "pairs-in-index-units",
    (mha, mqa) == (5 * index, 17 * index),
    "a pair in MHA mode costs exactly 5 times the indexer's, in MQA 17",
)
guess.reveal(
    mqa / index,
    "a latent is wide, and 128 heads read it twice: as key and as value.",
)

# %% [markdown]
# Remember 5 and 17: most of this chapter follows from them.
#
# (One term is missing by custom. Eq. 1 of the report also adds the index heads up with their weights: 2 J = 128
# FLOP more, under one per cent. `flops.head_sum_pair_flops` has it, and we will meet it again.)
#
# ## What does not depend on length
#
# Besides the pairs, each token is multiplied with weights. In a **mixture of experts** it is not multiplied with
# all of them: in each layer a small router picks some of many feed-forward networks, the experts, for each token.

# %%
guess = predict(
    "Which share of the 671 B parameters works on a token?", 0.5
)

# %%
query_side = D * real.q_lora_rank + real.q_lora_rank * H * (N + R)
latent_side = D * (C + R) + C * H * (N + V)
attention = layers * (query_side + latent_side + H * V * D)
first = real.first_k_dense_replace  # 3 layers without experts
dense_ffn = first * 3 * D * real.intermediate_size
used = real.num_experts_per_tok + real.n_shared_experts  # 8 + 1
expert = 3 * D * real.moe_intermediate_size
router = D * real.n_routed_experts
moe = (layers - first) * (used * expert + router)
active = attention + dense_ffn + moe + D * real.vocab_size  # and the head
indexer = layers * (real.q_lora_rank * J * W + D * W + D * J)

# %%
parts = memory.active_parameters(real)
claim(
    "active-parameters",
    active == sum(parts.values()) - parts["indexer"],
    f"a token passes {active / 1e9:.1f} B parameters, without indexer",
    value=f"{active / 1e9:.1f} B",
)
claim(
    "indexer-parameters",
    indexer == parts["indexer"],
    f"the indexers of all layers add {indexer / 1e9:.2f} B",
    value=f"{indexer / 1e9:.2f} B",
)

# %%
show(*flop_counts.draw_parameters(real))
stored = memory.stored_parameters(real)
claim(
    "main-model-parameters",
    round((stored - indexer) / 1e9) == 671,
    "all matrices of the main model together have 671 B parameters",
)
guess.reveal(
    (active + indexer) / stored,
    "8 experts of 256 work, and one that is shared. Attention, the head"
    " and the first layers work in full.",
)

# %% [markdown]
# Each parameter makes 2 FLOP for each token, whatever stands before it: 2 x {claim:active-parameters} FLOP. The
# embedding is missing because it is a look-up and not a product.
#
# ## A token among others
#
# Now put it together. A token that sees S keys costs, in FLOP:
#
# | | weights | scoring | attention |
# | --- | --- | --- | --- |
# | dense, prefill | 2 x active | 0 | layers x S x MHA |
# | dense, decode | 2 x active | 0 | layers x S x MQA |
# | sparse | 2 x (active + indexer) | layers x S x index | layers x min(S, K) x MQA |
#
# Prefill (reading the prompt) uses MHA mode, because the prompt's keys are expanded once and then serve all its
# queries. Decoding (one token at a time) uses MQA mode: to expand the whole past for a single query would cost far
# more than it saves. Sparse attention is defined on the latents (App. A of the report), and we count it so in
# both phases: a selected token is fetched once, and all heads share it. (For short prompts the deployed model does
# something else. We will find its trace below.)


# %%
def my_token(keys, attention, phase):
    """GFLOP of one token that sees `keys` tokens, itself included."""
    if attention == "dense":
        pair = mha if phase == "prefill" else mqa
        return (2 * active + layers * keys * pair) / 1e9
    each = keys * index + min(keys, K) * mqa
    return (2 * (active + indexer) + layers * each) / 1e9


# %%
ways = list(product(flops.ATTENTIONS, flops.PHASES))
equal = [
    math.isclose(
        my_token(S, *way), flops.token_flops(real, S, *way).total / 1e9
    )
    for S, way in product((1, 2047, 2048, 2049, 131072), ways)
]
claim(
    "hand-count-equals-package",
    all(equal),
    f"the hand count equals the package's in {len(equal)} cases",
)

# %% [markdown]
# From here on we use the package's, which keeps the kinds of work apart. All curves start near the weights, and then
# attention takes over: the next figure shows where it is half of a token's work in dense prefill, and how far apart
# dense and sparse end. Before you see it:

# %%
guess = predict(
    "In prefill, above how many tokens is sparse attention cheaper?",
    2048, high=131072, form=",.0f", unit="tokens",
)  # fmt: skip

# %%
show(*flop_counts.draw_work(real))
even = 2 * active / (layers * mha)
there, end = (my_token(S, "dense", "prefill") for S in (even, 131072))
share = layers * 131072 * mha / 1e9 / end
claim(
    "dense-prefill-half",
    math.isclose(there, 2 * 2 * active / 1e9) and 0.89 < share < 0.91,
    f"in dense prefill attention is half of the work at {even:,.0f} keys,"
    f" and {share:.0%} at 131,072",
)

# %%
sparse = my_token(131072, "sparse", "decode")  # the same in prefill
ratio = {p: my_token(131072, "dense", p) / sparse for p in flops.PHASES}
claim(
    "flop-ratio-at-the-end",
    ratio["prefill"] > 3 and ratio["decode"] > 9,
    f"at 131,072 keys sparse attention needs {ratio['prefill']:.1f} times"
    f" fewer FLOP in prefill and {ratio['decode']:.1f} in decode",
)

# %% [markdown]
# ## The crossover
#
# Look at the left half of that figure again. Below some length the sparse curve is the *upper* one. The indexer
# must be paid from the first token on, and what it saves comes later. When?
#
# Take attention and indexer alone. For S above K, dense costs `S x MHA`, and sparse `S x index + K x MQA`. They are
# equal at
#
# $$S = \frac{K \cdot \mathrm{MQA}}{\mathrm{MHA} - \mathrm{index}} = K \cdot \frac{17}{5 - 1} = 4.25\,K,$$
#
# and in decoding, where dense is in MQA mode too, at $K \cdot 17 / (17 - 1)$.

# %%
show(*flop_counts.draw_gain(real))
alone = [K * mqa / (pair - index) for pair in (mha, mqa)]
claim(
    "attention-alone-crosses",
    alone == [flops.crossover(real, p, False) for p in flops.PHASES],
    f"attention alone crosses at {alone[0]:,.0f} and {alone[1]:,.0f} keys",
)

# %%
whole = [flops.crossover(real, phase) for phase in flops.PHASES]
both = [[my_token(S, kind, p) for kind in flops.ATTENTIONS]
        for S, p in zip(whole, flops.PHASES, strict=True)]  # fmt: skip
claim(
    "crossing-with-indexer-weights",
    all(math.isclose(dense, sparse) for dense, sparse in both),
    f"with the indexer's weights at {whole[0]:,.0f} and {whole[1]:,.1f}",
    value=f"{whole[0]:,.0f} and {whole[1]:,.1f}",
)
guess.reveal(
    whole[0],
    "K is only where keys begin to be dropped. And a chosen pair, in MQA"
    f" mode, costs {mqa / mha:.1f} times a dense one in MHA mode.",
)

# %% [markdown]
# That is the token at which sparse attention becomes cheaper, not the prompt. All tokens before it were a loss, and
# a longer prompt must first earn that back. The areas between the curves say when: at
# $L = S + \sqrt{S^2 - 4.25\,K^2}$, nearly twice as far.

# %%
L = round(whole[0] + math.sqrt(whole[0] ** 2 - 4.25 * K**2))
lengths = (1, 2048, 9130, L - 2, L + 2, 131072)
prompts = [[flops.prompt_flops(real, n, kind).total
            for kind in flops.ATTENTIONS] for n in lengths]  # fmt: skip
around = [sparse < dense for dense, sparse in prompts]
claim(
    "whole-prompt-crosses",
    around == [False, False, False, False, True, True],
    f"a whole prompt takes fewer FLOP sparse than dense above {L:,} tokens,"
    " at none of four lengths below and at both above",
    value=f"{L:,}",
)

# %% [markdown]
# ## Is it still O(L²)?
#
# "The indexer scores every earlier token. So the whole thing is still quadratic, and nothing is won." The first
# sentence is true, and the report says so itself: the indexer is O(L²), at a smaller constant. What follows from
# it?

# %%
guess = predict(
    "At 128 Ki tokens, how much of the sparse attention is scoring?", 0.1
)

# %%
show(*flop_counts.draw_shares(real))
work = flops.token_flops(real, 131072, "sparse", "decode")
scoring, attending = work.scoring, work.attention
of_attention = scoring / (scoring + attending)
print(f"{scoring / 1e9:.0f} GFLOP scoring, {attending / 1e9:.0f} attending")
guess.reveal(
    of_attention,
    "scoring grows with the length and attending has stopped at K keys.",
)

# %%
exact = 0.79 / 0.21 * K * mqa / index
claim(
    "scoring-reaches-most",
    math.isclose(exact, flops.keys_at_index_share(real, 0.79)),
    f"scoring reaches 79 % of sparse attention at {exact:,.0f} keys",
    value=f"{exact:,.0f}",
)
of_all = scoring / work.total
claim(
    "scoring-share-at-128k",
    0.53 < of_all < 0.56,
    f"at 128 Ki it is {of_all:.0%} of everything that the token costs",
    value=f"{of_all:.0%}",
)

# %% [markdown]
# So yes: the length decides in the end. At 128 Ki four fifths of sparse attention is the indexer, counted in FLOP.
# And yet something is won, twice.
#
# **The constant.** What grows, grows with {claim:index-pair-flop} FLOP a pair instead of {claim:mha-pair-flop} or
# {claim:mqa-pair-flop}. However long the context, dense attention costs at most 5 times as much in prefill, and 17
# times in decode. Those are ceilings.
#
# **The exponent, where we are.** On logarithmic axes the slope of a cost is the power of S with which it grows, and
# for a constant plus a growing term that slope is *the share of the growing term*. The {claim:scoring-share-at-128k}
# that looked like bad news says: at 128 Ki the cost of a token grows with little more than the square root of the
# length.
#
# A whole prompt is the sum over its tokens, so its power is between 1 and 2. Note the sum: token t sees t + 1 keys,
# so a prompt of L tokens has L (L + 1) / 2 pairs, **half a square**. Whoever counts L² reports twice the FLOP/s.

# %%
far = my_token(2**40, "sparse", "decode")
ceilings = [my_token(2**40, "dense", p) / far for p in flops.PHASES]
claim(
    "ratio-ceilings",
    4.99 < ceilings[0] < 5 and 16.99 < ceilings[1] < 17,
    "at 2^40 keys dense over sparse is nearly 5 and 17, and still below",
)

# %%
power = {}
for kind in flops.ATTENTIONS:
    near, far = (my_token(S, kind, "prefill") for S in (131072, 131073))
    power[kind] = math.log(far / near) / math.log(131073 / 131072)
claim(
    "power-is-growing-share",
    abs(power["sparse"] - of_all) < 0.001
    and abs(power["dense"] - share) < 0.001,
    "the power at 131,072 keys is the share of the growing term:"
    f" {power['sparse']:.2f} sparse, {power['dense']:.2f} dense",
)

# %%
more = {kind: flops.prompt_flops(real, 131072, kind).total
              / flops.prompt_flops(real, 65536, kind).total
        for kind in flops.ATTENTIONS}  # fmt: skip
claim(
    "twice-the-prompt",
    3.3 < more["dense"] < 3.5 and 2.4 < more["sparse"] < 2.6,
    f"a prompt of 128 Ki costs {more['dense']:.1f} times one of 64 Ki"
    f" dense, and {more['sparse']:.1f} times sparse",
)

# %% [markdown]
# ## Bytes
#
# Work is half of the story. A decoded token must also *read* what it attends to, and someone must keep it.
#
# Dense and sparse models are often compared in different precisions, and then one sees the precision. So compare at
# **equal** precision first.

# %%
guess = predict(
    "The sparse cache in bf16, as a multiple of the dense one?",
    0.5, high=3, form=".2f", unit="times",
)  # fmt: skip

# %%
dense_bf16 = 2 * layers * (C + R)  # bytes: one latent for all heads
sparse_bf16 = dense_bf16 + 2 * layers * W  # and the indexer's key
claim(
    "cache-bytes-bf16",
    sparse_bf16 == memory.cache_bytes(real, "bf16"),
    f"a token's cache in bf16 takes {sparse_bf16:,} bytes with the index"
    f" key and {dense_bf16:,} without",
    value=f"{sparse_bf16:,}",
)
guess.reveal(
    sparse_bf16 / dense_bf16,
    "any token may be chosen later, so all latents stay.",
)

# %% [markdown]
# And yet the sparse model, as its published code deploys it, has a smaller cache than a dense one in bf16. That is
# the doing of FP8: one byte a number, and an fp32 scale for each 128 numbers. The rotary part stays in bf16.
# (Exercise 1.2 makes a function of this sum.)

# %%
show(*flop_counts.draw_cache(real))
deployed = layers * ((512 + 4 * 4 + 2 * 64) + (128 + 4))
claim(
    "cache-bytes-deployed",
    deployed == memory.cache_bytes(real, "deployed"),
    f"as deployed it takes {deployed:,} bytes",
    value=f"{deployed:,}",
)
dense_fp8 = memory.cache_bytes(real, "deployed", indexer=False)
claim(
    "saving-is-fp8s",
    dense_fp8 < deployed < dense_bf16,
    f"a dense cache in the same FP8 would take {dense_fp8:,}:"
    " the saving is FP8's",
)

# %% [markdown]
# Kept is not read. A dense token reads every latent. A sparse one reads every *index key*, and K latents. That is
# where sparse attention saves memory traffic:

# %%
show(*flop_counts.draw_reads(real))
dense, sparse = (
    flops.decode_traffic(real, 131072, kind, "deployed").cache
    for kind in flops.ATTENTIONS
)
claim(
    "cache-read-ratio",
    4 < dense / sparse < 5,
    f"at 131,072 keys sparse attention reads {dense / sparse:.1f} times"
    " less cache",
)

# %% [markdown]
# Weights are read as well, but once for a whole batch. A cache is read for its own sequence, and nobody can share
# it: in a large batch of long texts, dense attention's cache is the bill. [Chapter 09](09_cost_curves.ipynb) adds
# up both.
#
# ## Does a machine do what we counted?
#
# So far one formula agreed with another. Now we take a real model, the small one of this course. First, is the list
# of matrices complete? Then it runs, and PyTorch counts.

# %%
model = dsa.from_pretrained("../data/sparse")
small = model.config
own = sum(p.numel() for p in model.parameters() if p.ndim > 1)
claim(
    "counter-finds-parameters",
    own == memory.stored_parameters(small),
    f"the counter finds all {own:,} matrix parameters of the small model",
)


# %%
def machine(tokens, kind, cache=None):
    """FLOP that PyTorch counts in one forward pass."""
    model.attention = kind
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, cache)
    return counter.get_total_flops()


# %%
tokens = torch.arange(256)[None]  # (1, 256); what they are costs nothing
seen = machine(tokens, "dense")
claim(
    "pytorch-counts-dense",
    seen == flops.prompt_flops(small, 256, "dense").weights,
    f"for a dense pass PyTorch counts {seen:,}, our count of weights alone",
)

# %% [markdown]
# Was attention free? No: on a processor PyTorch runs it as one fused operation that its own counter does not know.
# The counter misses the very thing we want to measure, without a word. We ask for the unfused version:

# %%
from torch.nn.attention import SDPBackend, sdpa_kernel

ran, ours = {}, {}
for kind in flops.ATTENTIONS:
    with sdpa_kernel(SDPBackend.MATH):
        ran[kind] = machine(tokens, kind)
    ours[kind] = flops.prompt_flops(small, 256, kind).total
    print(f"{kind}: counted {ours[kind]:,}, ran {ran[kind]:,}")

# %% [markdown]
# Now the machine does *more* than we counted. "About right" is no answer where everything is a whole number, so
# where do the extra FLOP come from?
#
# In dense attention, from the **causal half**: the machine multiplies the whole square and masks the future away.
# In sparse attention from three places. Queries are scored in tiles, and a tile runs to the last key of its last
# query. The sum over index heads, left out by custom, is really computed. And the first tokens have empty
# slots, which are fetched and masked.
#
# Decoding has no half square: the new token sees all keys. What is left is the head sum, and in dense attention
# that values are taken as wide as keys and cut afterwards.

# %%
T, n, pairs = 256, small.num_hidden_layers, flops.causal_pairs(256)
half = n * (T * T - pairs) * flops.mha_pair_flops(small)
claim(
    "dense-prefill-to-the-digit",
    ran["dense"] == ours["dense"] + half,
    f"dense prefill runs our count and the masked half, {half:,} FLOP more",
)

# %%
from dsa.kernels.cpu.scoring import query_tile

size = query_tile(T, small.index_n_heads)  # queries scored at once
tiles = sum(size * seen for seen in range(size, T + 1, size))
rest = n * (tiles - pairs) * flops.index_pair_flops(small)
sums = n * tiles * flops.head_sum_pair_flops(small)
filled = flops.selected_pairs(T, small.index_topk)
slots = T * small.index_topk - filled
empty = n * slots * flops.mqa_pair_flops(small)
claim(
    "sparse-prefill-to-the-digit",
    ran["sparse"] == ours["sparse"] + rest + sums + empty,
    f"sparse prefill runs what we counted, {rest:,} for whole tiles of"
    f" {size}, {sums:,} for sums over heads, {empty:,} for empty slots",
)

# %%
extras = {
    "dense": 2 * small.num_attention_heads * T * small.qk_rope_head_dim,
    "sparse": T * flops.head_sum_pair_flops(small),
}
exact = []
for kind, extra in extras.items():
    cache = model.new_cache(1, T)
    with sdpa_kernel(SDPBackend.MATH):
        machine(tokens[:, : T - 1], kind, cache)
        one = machine(tokens[:, T - 1 :], kind, cache)
    by_count = flops.token_flops(small, T, kind, "decode").total
    exact.append(one == by_count + n * extra)
claim(
    "decode-to-the-digit",
    all(exact),
    "a decoded token runs what we counted and that one extra, to the digit",
)

# %% [markdown]
# ## As published
#
# The report has one figure of costs: dollars per million tokens, by position, on rented H800s at 2 USD an hour. It
# is not ours and cannot be measured here. The batch is not published, nor how the machine was divided. But its
# *shape* can be held against the count. (It is kept as the corners of its curves; between them we interpolate.)

# %%
from dsa.analysis.published import crossing, read_costs

costs = read_costs("../data/published/costs.csv")
show(*flop_counts.draw_published(costs))

# %% [markdown]
# Dotted, because published. Four things are worth a comparison.
#
# **How far apart they end.** We counted that {claim:flop-ratio-at-the-end}. The figure says
# {claim:ratios-near-published}.
#
# **Where they cross.** We counted {claim:crossing-with-indexer-weights} tokens, and the figure crosses at
# {claim:dollars-cross-later}. The new model's curves also start higher. FLOPs are not dollars. The likely reasons:
# the indexer reads memory, launches kernels and sorts, and a FLOP gathered from scattered places is slower than one
# from a neat block.
#
# **Where they bend.** Each sparse curve has one knee. In decoding it is where keys begin to be dropped, near K. In
# prefill it is at {claim:masked-mha-hands-over}, which is no number we have seen. The report says that short prompts
# are read in MHA mode *with a mask*, as this is faster there. It does not say until when. If the mode changes where
# the selected pairs in MQA mode become cheaper than all pairs in MHA mode, the place can be counted: K x MQA / MHA
# keys.
#
# **What was said.** An article about the release, "DeepSeek Cuts Inference Costs", has inputs over 7,000 tokens
# processed two to three times faster. Of position 7,000 the figure says something else.

# %%
old = {p: costs[p, "V3.1-Terminus"] for p in flops.PHASES}
new = {p: costs[p, "V3.2-Exp"] for p in flops.PHASES}
hand_over = K * mqa / mha
knees = [new[p].positions[1] for p in flops.PHASES]
claim(
    "masked-mha-hands-over",
    abs(hand_over / knees[0] - 1) < 0.05 and abs(K / knees[1] - 1) < 0.05,
    f"by count, masked MHA would hand over at {hand_over:,.0f} keys; the"
    f" published knees, at {knees[0]:,} and {knees[1]:,}, are within 5 % of"
    " this and of K",
    value=f"{knees[0]:,}",
)

# %%
apart = {p: old[p].at(131071) / new[p].at(131071) for p in flops.PHASES}
ends = f"{apart['prefill']:.2f} and {apart['decode']:.2f}"
claim(
    "ratios-near-published",
    all(0.8 < ratio[p] / apart[p] < 1.2 for p in flops.PHASES),
    f"the counted ratios at 128 Ki are within 20 % of the published {ends}",
    value=ends,
)
meet = [crossing(old[p], new[p]) for p in flops.PHASES]
later = f"{meet[0] / 1e3:.1f} and {meet[1] / 1e3:.1f} thousand"
claim(
    "dollars-cross-later",
    meet[0] > whole[0] and meet[1] > whole[1],
    f"published dollars cross later than FLOPs, at {later}",
    value=later,
)

# %%
at7k = [old[p].at(7000) / new[p].at(7000) for p in flops.PHASES]
claim(
    "position-7000",
    at7k[0] < 1 and at7k[1] < 1.5,
    f"at position 7,000 dense costs {at7k[0]:.1f} times as much as sparse"
    f" in prefill and {at7k[1]:.1f} times in decode, not 2 to 3 times",
)

# %% [markdown]
# ## Play with it
#
# Be the designer. **length** is counted in units of 1,024 tokens, **top-k** is what each token keeps, **heads** is
# H of the main attention (the indexer stays as it is), **precision** is how the cache is stored. (The report speaks
# of 128 Ki; the published config has positions for 160.) Before you move: what happens to the prefill crossover if
# the model has 16 heads instead of 128?

# %%
from course.figures.context_cost import draw_context_cost, token_gain
from course.ui.panel import Choice, Panel, Slider, static_snapshots

draw = draw_context_cost(real)
panel = Panel(
    draw,
    length=Slider("length in Ki tokens", 1, 160, 128),
    top_k=Slider("top-k", 256, 8192, 2048, step=256),
    heads=Choice("heads", (16, 32, 64, 128), 128),
    precision=Choice("precision", memory.PRECISIONS, "deployed"),
)
panel

# %%
base = {"length": 128, "top_k": 2048, "heads": 128, "precision": "deployed"}
static_snapshots(
    draw, [base | {"heads": 16}, base | {"top_k": 8192}], columns=1
)

# %% [markdown]
# ## Exercises
#
# Write the function, run its cell and the check below it. Nothing happens if you skip one.

# %% [markdown]
# {exercise:attention_flops.my_pairs}

# %% [markdown]
# {exercise:attention_flops.my_cache_bytes}

# %% [markdown]
# {exercise:attention_flops.my_crossover}

# %% [markdown]
# {exercise:attention_flops.my_growth}

# %% [markdown]
# ## Where it fails
#
# **Short texts.** Each token before the crossover is a loss, and so is each prompt of up to
# {claim:whole-prompt-crosses} tokens.

# %%
works = {kind: flops.token_flops(real, 2048, kind, "prefill").total
         for kind in flops.ATTENTIONS}  # fmt: skip
loss = works["sparse"] / works["dense"] - 1
claim(
    "sparse-dearer-at-2048",
    loss > 0.3,
    f"at 2,048 keys sparse prefill costs {loss:.0%} more than dense",
)

# %% [markdown]
# (Masked MHA, as the report describes it for short prompts, escapes the worst of it. It still pays the indexer.)
#
# **Small models.** The indexer is cheap *beside 128 heads*. With fewer heads, the same indexer is not cheap at all:

# %%
meets = {heads: flops.crossover(
             real.replace(num_attention_heads=heads), "prefill")
         for heads in (16, 32, 64, 128)}  # fmt: skip
claim(
    "fewer-heads-never-pay",
    meets[16] == math.inf and meets[32] > 4 * meets[128],
    "with 16 heads this indexer never pays in prefill; with 32 it pays"
    f" above {meets[32]:,.0f} keys",
)

# %% [markdown]
# Copy the method into a small model without shrinking the indexer, and you will "prove" that it does not work.
#
# **FLOPs are not seconds.** Here is one decoded token at a small size with the true proportions, 17 to 1, on this
# very machine, measured on one thread, beside what the count promises:

# %% tags=["nbval-ignore-output"]
gains = {S: token_gain(S) for S in (512, 32768)}
for S, (measured, promised) in gains.items():
    print(f"{S:,} keys: measured {measured:.1f}, counted {promised:.1f}")

# %%
claim(
    "faster-by-the-clock",
    gains[32768][0] > 1.3 and gains[512][0] < 1 < gains[512][1] / 5,
    "on the clock sparse is faster at 32,768 keys, and at 512, where the"
    " count promises more than 5 times, it is slower",
)

# %% [markdown]
# The count is a floor under the work, not a forecast of the time. It leaves out what it costs to start small
# operations at all, top-k, which takes time and makes no FLOP, and rows gathered from memory, which come slower
# than neighbours.
#
# ## What you have proved
#
# A pair takes {claim:mha-pair-flop} FLOP in MHA mode, {claim:mqa-pair-flop} in MQA mode and {claim:index-pair-flop}
# in the indexer. {claim:active-parameters} parameters work on a token, and {claim:indexer-parameters} in the
# indexers. Sparse attention pays for a token that sees more than {claim:crossing-with-indexer-weights} keys, in
# prefill and in decode, and for a whole prompt of more than {claim:whole-prompt-crosses} tokens. At
# {claim:scoring-reaches-most} keys scoring is 79 % of it, and
# {claim:scoring-share-at-128k} of the whole token. Its cache is larger at equal precision, {claim:cache-bytes-bf16} bytes a token in bf16; as deployed,
# {claim:cache-bytes-deployed}, it is smaller than the dense one in bf16, thanks to FP8. A real small model runs what was counted and
# extras that have names, to the digit.
#
# **What the report does not say, and what we chose.** What counts as a FLOP: here products of matrices only, two
# for each multiplication with its addition. Which positions pass the head: here all of them, though a server
# reading a prompt needs the last only. What batch the published dollars were measured with: nobody outside knows,
# so this chapter turns no count into dollars.
#
# **Five questions**, with short answers folded away
# 1. Why does dense prefill run in MHA mode and dense decoding in MQA mode, and sparse attention always in MQA mode?
# 2. An indexer with 32 heads instead of 64: where would the two crossovers go, and where the ceilings 5 and 17?
# 3. K is doubled to 4,096. What does that do to the cost at 4 Ki, at 16 Ki and at 128 Ki?
# 4. Someone reports "sparse attention halves our cache". Which question do you ask first?
# 5. A benchmark of a causal kernel claims 90 % of the machine's peak FLOP/s. What would you check before you
#    believe it?
#
# <details><summary>Answers</summary>
#
# 1. A prompt expands its keys once for many queries, and an expanded pair is 3.4 times cheaper. A single query
#    would have to expand the whole past. Sparse attention fetches other tokens for each query, and in MQA mode one
#    fetched latent serves all heads.
# 2. index becomes 8,192, so MHA and MQA are 10 and 34 of it, and these are the ceilings. Attention alone crosses at
#    K x 34 / (10 - 1) = 7,737 in prefill and K x 34 / (34 - 1) = 2,110 in decode: both come down.
# 3. Attention to 4,096 instead of 2,048 keys costs twice as much at each of the three lengths, and scoring the
#    same: attention and scoring together grow to 1.9 times at 4 Ki, 1.7 times at 16 Ki and 1.2 times at 128 Ki.
# 4. In which precision were the two caches held? At equal precision sparse attention adds to the cache.
# 5. Whether they counted L² pairs. Then the kernel reached 45 %.
#
# </details>
#
# **See also**: [02 Multi-head latent attention](02_latent_attention.ipynb) shows why the two modes are the
# same attention, [03 The lightning indexer](03_lightning_indexer.ipynb) how 16,384 FLOP can rank like 278,528, and
# [04 Token selection](04_token_selection.ipynb) what the K tokens keep. [09 Cost curves](09_cost_curves.ipynb) takes
# the published figure apart and turns it into bills. The [README](../README.md) lists what else is there.
