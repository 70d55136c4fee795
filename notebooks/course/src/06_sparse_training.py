# %% [markdown]
# # 06 Sparse training: does the model adapt to what it no longer sees?
#
# The indexer can rank (chapter 05). Now attention obeys it: from one step to the next every token sees K earlier
# ones instead of all. Nobody asked the model. Its heads were trained on sums over everything, and each of them
# has lost most of its terms. So DeepSeek trains on, all weights together, for 943.7 billion tokens, and then
# claims that nothing was lost: fourteen benchmarks, dense against sparse.
#
# This chapter does both at our size. It trains on, with a *twin* beside each model, so that "as good as dense"
# has a meaning. Then it asks of our own fourteen benchmarks, and of the report's, what such a table can show.
#
# **You will be able to**
# 1. say what a switch to sparse attention costs, what training wins back, and prove that it was *adaptation* and
#    not just more training;
# 2. write the sparse stage: two losses, one backward pass, nothing in common;
# 3. read a benchmark table: which differences are chance, which tests cannot fail, and what is missing.
#
# **You need** [05](05_training_the_indexer.ipynb), and [04](04_token_selection.ipynb) for the four choosers:
# indexer, oracle, window, random.
#
# **Afterwards**: the long training (set `FULL`), and `notebooks/course/experiments/matched_runs.py`. Computing: **60 s**.
#
# *The report* is DeepSeek's on V3.2-Exp; this chapter is about its section 2 and its Table 1. `K` is the number
# of tokens kept.

# %%
import inspect
import json
from pathlib import Path
from statistics import mean, stdev

import dsa
import torch
from course.exercises.sparse_training import check
from course.experiments import benchmark_suite
from course.experiments.matched_runs import continue_training
from course.figures import sparse_vs_dense as figures
from course.ui.claims import claim
from course.ui.predict import predict
from course.ui.style import show, style
from dsa.datasets import corpus
from dsa.datasets.recall_tasks import Episodes, Needles
from dsa.model.transformer import Transformer
from dsa.training import evaluate, indexer
from dsa.training.losses import language_loss
from dsa.training.pretrain import MixedNeedles
from torch import Tensor

FULL = False  # True: also the long training, about five minutes
style()

# %% [markdown]
# ## The switch
#
# We start where chapter 05 ended: a dense model with a warmed-up indexer, `data/warmed`. It reads Python's own
# source code, as it did when it was trained, from files that were held out; and it is asked for needles. One
# function for everything that follows: bits per byte of text, and the share of needles recalled.

# %% tags=["nbval-ignore-output"]
text = corpus.load()
print(text)
warmed = dsa.from_pretrained("../data/warmed")
eval_set = list(evaluate.needle_batches(text, 256, 32))


def measure(model, attention, top_k=16):
    """Bits per byte, and recall of needles."""
    with evaluate.set_to(model, attention, top_k):
        bits = evaluate.text_bits(model, text, 256, 32)
    return bits, evaluate.recall(model, eval_set, attention, top_k)["all"]


# %%
guess = predict(
    "Dense, it needs 1.9 bits per byte. By how much does that grow when"
    " each token suddenly sees 16 instead of up to 256?",
    0.3,
    form=".2f",
    unit="bits",
)

# %% tags=["nbval-ignore-output"]
dense, sparse = measure(warmed, "dense"), measure(warmed, "sparse")
print(f"dense      {dense[0]:.2f} bits, recall {dense[1]:.0%}")
print(f"16 of them {sparse[0]:.2f} bits, recall {sparse[1]:.0%}")
cost = sparse[0] - dense[0]
guess.reveal(
    cost,
    "the indexer has learned where attention looks, and 16 keys hold most"
    " of what it saw there.",
)
claim(
    "sparse-untrained",
    cost < 0.1 and sparse[1] > 0.9,
    f"untrained for it, sparse attention with 16 keys costs {cost:.2f} bits"
    f" and recalls {sparse[1]:.0%} of the needles",
    value=f"{cost:.2f}",
)

# %% [markdown]
# {claim:sparse-untrained} bits. That is not a catastrophe, and an honest chapter says so at once: with a good indexer and enough
# keys, there is little to adapt to. (The report does not tell what its switch cost before training.) To *see*
# adaptation we must take away more. **Recorded**, a model for each of three seeds, each switched to K keys by four
# choosers: `{source:sparse_training.command}`, {source:sparse_training.date}.

# %%
path = Path("../data/measurements/sparse_training.json")
record = json.loads(path.read_text())
swept = record["sweep"]
choosers = {
    "indexer": ("warmed", "sparse"),
    "oracle": ("warmed", "oracle"),
    "window": ("warmed", "window"),
    "random": ("warmed", "random"),
}
show(*figures.draw_sweep(swept, choosers, (2, 16), most=5))


# %%
def seeds_at(model, who, what, k):
    """The recorded values of all seeds, as a tensor."""
    return torch.tensor(figures.recorded_curve(swept, model, who, what)[k])


# %%
ours, best = ([seeds_at("warmed", who, "bits", k) for k in (1, 2, 4, 16)]
              for who in ("sparse", "oracle"))  # fmt: skip
gap = max((a - b).max() for a, b in zip(ours, best, strict=True))
claim(
    "indexer-near-oracle",
    gap < 0.15,
    f"for every K and seed the indexer is within {gap:.2f} bits of the"
    " oracle",
    kind="recorded",
)

# %%
far = seeds_at("warmed", "window", "recall", 16).max()
claim(
    "window-recall",
    far < 0.25,
    f"a window of 16 recalls {far:.0%} of the needles at most",
    kind="recorded",
)
ours = seeds_at("warmed", "sparse", "recall", 2).min()
best = seeds_at("warmed", "oracle", "recall", 2).min()
claim(
    "two-keys-worst-seed",
    ours < best - 0.1,
    f"with two keys the indexer recalls {ours:.0%} of the needles with"
    f" the worst seed, the oracle {best:.0%}",
    kind="recorded",
)

# %% [markdown]
# Four things to see. In bits the indexer is nearly the oracle: what is lost below 16 keys is lost because there
# are too *few*. In needles it is not, with one key or two: the oracle's two hold nearly every answer, the
# indexer's two often do not. It has the right token among its sixteen, and not always on top. With 16 keys even
# the window is not far behind on text, whose next token depends mostly on the latest few; with one or two it is.
# And so, with 16 keys, only the needles tell a window from an indexer.
#
# So K = 16 for the report's question ("as good as dense?") and K = 2 for ours ("does it adapt?").
#
# ## Two losses, one step
#
# From now on everything learns. The model has its language loss, as always. The indexer has the divergence from
# the attention, now over the chosen tokens alone (report Eq. 4, exercise 6.4). The report trains both at once and
# insists on one thing: the indexer's input is detached, so that neither loss touches the other's weights. By
# hand:

# %%
probe = dsa.from_pretrained("../data/warmed")
probe.attention, probe.top_k = "sparse", 2
task = Needles(text, length=128, pairs=4, queries=4)  # chapter 05
episodes = task.generate(torch.Generator().manual_seed(0), 4)


def gradients(loss):
    """What one backward pass leaves: name -> gradient."""
    probe.zero_grad(set_to_none=True)
    loss.backward()
    named = probe.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None}


# %%
logits, kl = probe(episodes.tokens, indexer_loss=True)
mask = episodes.loss_mask[:, 1:]
right = episodes.tokens[:, 1:][mask]
log_p = logits[:, :-1][mask].log_softmax(-1)
language = -log_p.gather(-1, right[:, None]).mean()
together = gradients(language + kl.sum())

alone = gradients(language_loss(probe(episodes.tokens), episodes))
_, kl = probe(episodes.tokens, indexer_loss=True)
index_only = gradients(kl.sum())
print(len(together), "gradients:", len(alone), "+", len(index_only))
claim(
    "one-loss-per-weight",
    not set(alone) & set(index_only)
    and set(alone) | set(index_only) == set(together),
    "every weight gets its gradient from one of the two losses, and none"
    " from both",
)

# %%
apart = alone | index_only
same = [torch.allclose(together[n], apart[n], atol=1e-6) for n in together]
claim(
    "one-backward-two-losses",
    all(same),
    "one backward pass of the sum leaves the gradients of two of its own",
)

# %% [markdown]
# So one sum and one backward pass serve both. That is all there is to the package's step; `task.score` only
# measures:

# %%
print(inspect.getsource(indexer.joint_objective))

# %%
step = indexer.joint_objective(task, 4)
loss, _ = step(probe, torch.Generator().manual_seed(0))
theirs = gradients(loss)
claim(
    "joint-step-is-packages",
    all(torch.allclose(together[n], theirs[n], atol=1e-6) for n in theirs)
    and len(theirs) == len(together),
    "mine is the package's: the same gradient for every weight",
)

# %% [markdown]
# Where else could the two meet? In the *clipping*. One norm over all gradients would let a large divergence
# shrink the model's steps. So each optimiser's weights are clipped by themselves.
#
# **Attached instead.** What would flow if the `detach` were forgotten? Every number of the forward pass would be
# right:

# %%
from course.experiments.ablations import attach_indexer_loss, clone_model

leaking = attach_indexer_loss(clone_model(probe))
_, kl = leaking(episodes.tokens, indexer_loss=True)
kl.sum().backward()
leaked = {n: p.grad for n, p in leaking.named_parameters()
          if p.grad is not None and n in alone}  # fmt: skip

# %%
share = float(
    figures.gradient_norm(leaked, leaked)
    / figures.gradient_norm(alone, leaked)
)
print(f"reaches {len(leaked)} of the model's {len(alone)} tensors,"
      f" {share:.1f} times as strong as the language loss")  # fmt: skip
claim(
    "attached-moves-model",
    len(leaked) > 20 and share > 0.05,
    "attached, the divergence moves the main model as well, and not by"
    " rounding errors",
)

# %% [markdown]
# Then the model is paid for being easy to imitate. What that does to its quality we look at below, in the
# ablations.
#
# ## Twins
#
# "After sparse training the model is as good as before" means nothing. *Any* training changes a model. So from
# the same weights we train three twins: one that sees everything, one that sees the 16 tokens the indexer
# chooses, and one that sees the latest 16. The same batches in the same order, the same rates,
# {source:sparse_training.options.rate} at first. Each batch is text in which 2 to 16 needles are hidden and asked,
# as in chapter 05. Live: 60 steps of four sequences of 256 tokens, about ten seconds each.

# %% tags=["nbval-ignore-output"]
ways = {"dense": "dense", "sparse 16": "sparse", "window 16": "window"}
models, curves = {}, {}
for name, attention in ways.items():
    models[name] = dsa.from_pretrained("../data/warmed")
    task = MixedNeedles(text, 256)
    run = continue_training(
        models[name], task, attention, 16, steps=60, size=4
    )
    measured = [row.get("language", row["loss"]) for row in run.rows]
    curves[name] = [mean(measured[n : n + 6]) for n in range(0, 60, 6)]
show(*figures.draw_loss_gap(curves, "dense", steps=60))

# %% tags=["nbval-ignore-output"]
after = {name: measure(models[name], ways[name]) for name in ways}
for name, (bits, right) in after.items():
    print(f"{name:10} {bits:.2f} bits, recall {right:.0%}")
cost = after["sparse 16"][0] - after["dense"][0]
claim(
    "equal-steps-equal-bits",
    abs(cost) < 0.1,
    f"after equal steps sparse is {cost:+.2f} bits per byte from dense",
    value=f"{cost:+.2f}",
)
claim(
    "recall-after-equal-steps",
    after["sparse 16"][1] > 0.95 and after["window 16"][1] < 0.25,
    f"sparse recalls {after['sparse 16'][1]:.0%} of the needles, the window"
    f" {after['window 16'][1]:.0%}",
)

# %% [markdown]
# {claim:equal-steps-equal-bits} bits per byte. The window has had the same training, and has not learned to recall: what it may not see,
# it cannot learn to use. (It is further behind in the figure than here, because the batches ask for needles and
# these bits are of text alone. The dense twin itself may read a little *worse* than before: sixty steps of four
# sequences at a high rate are noise as well as training. That is what a twin is for. It has had the same noise.)
#
# ## Does it adapt? With two keys
#
# Now K = 2. Each token sees two tokens: as a rule itself or a neighbour, and one more. The sweep above says what
# that costs before any training. And after 60 steps with two keys?

# %%
guess = predict("What share of the damage does the training repair?", 0.3)

# %% tags=["nbval-ignore-output"]
few = dsa.from_pretrained("../data/warmed")
continue_training(
    few, MixedNeedles(text, 256), "sparse", 2, steps=60, size=4
)
before2 = measure(warmed, "sparse", 2)
after2 = measure(few, "sparse", 2)
control = measure(models["dense"], "sparse", 2)
best = [measure(model, "oracle", 2) for model in (warmed, few)]
rows = {
    "before": before2,
    "twin trained dense": control,
    "trained with 2 keys": after2,
    "before, oracle chooses": best[0],
    "trained, oracle chooses": best[1],
}
for name, (bits, right) in rows.items():
    print(f"{name:23} {bits:.2f} bits, recall {right:.0%}")

# %% tags=["nbval-ignore-output"]
floor = after["dense"][0]
repaired = 1 - (after2[0] - floor) / (before2[0] - floor)
guess.reveal(
    repaired,
    "measured against the dense twin, which has had the same sixty steps.",
)
claim(
    "two-keys-repaired",
    repaired > 0.25 and control[0] > before2[0] - 0.05,
    f"training with 2 keys repairs {repaired:.0%} of their damage; dense"
    " training gains less than 0.05 bits",
    value=f"{repaired:.0%}",
)
claim(
    "two-keys-recall",
    after2[1] > 0.95 > before2[1] and best[1][0] < best[0][0] - 0.1,
    f"recall with 2 keys goes from {before2[1]:.0%} to {after2[1]:.0%}, and"
    " where the oracle chooses, too, more than 0.1 bits are won",
)

# %% [markdown]
# The second line is the control. The dense twin had as many steps on the same text, and reading through two keys it
# is as bad as before. What helped was not more training, it was training *under the choice*. But the choice has
# been trained on as well: is it only the indexer that chooses better now? The last two lines answer that. There the
# oracle chooses, before and after, and the indexer has no say; the gain is much the same. So yes: **the model
# adapts**. (Of the three seeds recorded above this one's indexer is the best with two keys: it recalls nearly what
# the oracle does. The others recall less, and there the indexer has more to learn as well.)
#
# How? A guess that suggests itself: the heads agree on fewer tokens, so that two keys hold more of the attention.
# That can be looked at. How much do the *best* two keys hold, before and after?

# %% tags=["nbval-ignore-output"]
kept = {
    name: evaluate.selection_metrics(model, eval_set, "sparse", 2)["kept"][
        "oracle"
    ]
    for name, model in (("before", warmed), ("trained with 2", few))
}
show(*figures.draw_attention_recall(kept, "best two keys"))
before, trained = (torch.tensor(shares) for shares in kept.values())
apart = (before - trained).abs().max()
claim(
    "no-concentration",
    apart < 0.1,
    f"in no layer does the share of the best two keys change by more than"
    f" {100 * apart:.0f} points",
)

# %% [markdown]
# The guess was wrong. Attention *wants* as many tokens as before. So what has changed is probably what the model
# makes of the two that it gets: its values, its projections, the layers above. We have not located it. (Whatever
# it is, it should disturb the model when it sees everything again. We shall look.)
#
# ## Three seeds
#
# One seed is an anecdote. **Recorded**, with three seeds, base models and all: the same training for a sparse
# twin with 16 keys, one with 2, one dense, one with a window. First the sweep over K, then text alone. (The text is
# four times as long as in the sweep, so its bits are to be compared with each other and not with the figure's.)

# %%
lines = {
    "before": ("warmed", "sparse"),
    "dense twin": ("dense", "sparse"),
    "trained with 16": ("sparse", "sparse"),
    "trained with 2": ("sparse 2", "sparse"),
}
show(*figures.draw_sweep(swept, lines, (1, 2, 16)))

# %%
bits = {}
for name in ("dense", "sparse", "window"):
    seeds = [r["bits"] for r in record["text"] if r["model"] == name]
    bits[name] = torch.tensor(seeds)
    print(f"{name:6} twin, bits:", *(f"{x:.3f}" for x in seeds))
behind = (bits["sparse"] - bits["dense"]).max()
claim(
    "sparse-within-dense",
    behind < 0.1,
    f"with every seed, sparse with 16 keys is at most {behind:.3f}"
    " bits per byte behind its dense twin",
    kind="recorded",
)

# %%
right = seeds_at("sparse", "sparse", "recall", 16).min()
windowed = seeds_at("window", "window", "recall", 16).max()
claim(
    "recall-every-seed",
    right > 0.95 and windowed < 0.25,
    f"it recalls at least {right:.0%} of the needles, the window at"
    f" most {windowed:.0%}",
    kind="recorded",
)

# %% [markdown]
# The shipped model `data/sparse` had a longer training, 100 steps of 8 sequences of 512 tokens, and two sisters
# with other seeds (`{source:seeds.command}`). Theirs comes
# next, and then what two keys cost each of the twins.

# %%
path = Path("../data/measurements/seeds.json")
whole = json.loads(path.read_text())
recalls = [row["recall_indexer"] for row in whole["rows"]]
blind = [row["recall_window_far"] for row in whole["rows"]]
claim(
    "recall-long-training",
    min(recalls) > 0.95 and max(blind) < 0.25,
    f"after the long training 16 keys recall {min(recalls):.1%} of the"
    f" needles or more, through a window {max(blind):.0%} at most",
    kind="recorded",
)

# %%
floor = seeds_at("dense", "dense", "bits", 256)
damage = {}
for name, pair in lines.items():
    damage[name] = seeds_at(*pair, "bits", 2) - floor
    print(f"{name:16} K = 2 costs", *(f"{x:.2f}" for x in damage[name]))
claim(
    "damage-repaired-every-seed",
    (damage["trained with 2"] < 0.75 * damage["before"]).all()
    and (damage["dense twin"] > 0.75 * damage["before"]).all(),
    "with every seed, training with 2 keys takes away more than a quarter"
    " of what they cost; dense training does not",
    kind="recorded",
)

# %% [markdown]
# Training with 16 keys helps with 2 as well, above all with the needles. (There it is the indexer that has learned:
# the oracle's two keys held nearly every answer before.) And there is a price. Ask each model to read with *all*
# keys again:

# %%
for name, (model, _) in lines.items():
    found = seeds_at(model, "dense", "bits", 256)
    print(f"{name:16} all keys:", *(f"{x:.3f}" for x in found))
lost = (seeds_at("sparse 2", "dense", "bits", 256) - floor).min()
claim(
    "all-keys-read-worse",
    lost > 0.02,
    f"the model trained with 2 keys reads worse with all of them, by"
    f" {lost:.2f} bits or more",
    kind="recorded",
)

# %% [markdown]
# Adaptation goes both ways. A model that has learned to live with two keys is disturbed by the others.
#
# ## Your text
#
# What does *your* text cost with K keys, and where is it paid? A line that climbs pays there for what it does not
# see. Three models: before the training, trained with 16, trained with 2 (the last two of this page). Set K to 2,
# then to 16, then change the chooser. Below the panel, for readers without a kernel, it stands still at two places.

# %%
from course.ui.panel import Choice, Panel, Slider, Text, static_snapshots
from course.ui.reading import read_file

story = read_file("../data/texts/lighthouse.txt").strip()[:700]
draw = figures.draw_extra_bits(
    {"not yet": warmed, "with 16": models["sparse 16"], "with 2": few}
)

# %% tags=["nbval-ignore-output"]
Panel(
    draw,
    text=Text("your text, or file:PATH", story),
    top_k=Slider("top-k", 1, 64, 2),
    who=Choice("chosen by", list(figures.CHOOSERS), "indexer"),
)

# %% tags=["nbval-ignore-output"]
still = [
    {"text": story, "top_k": 2, "who": "indexer"},
    {"text": story, "top_k": 16, "who": "window"},
]
static_snapshots(draw, still, columns=1)

# %% [markdown]
# ## As good as dense? The report's fourteen benchmarks
#
# The report's claim about quality is its Table 1: fourteen benchmarks, one number each, the dense predecessor,
# *V3.1-Terminus*, against the sparse model. Both went through the same post-training. Here it is as **published**, as
# differences. No spread is published with it. But twelve of the sets are public and their sizes known, and so is what
# chance does to a share of n questions. The grey bands: where the difference of two *equally good* models would lie
# 95 times of 100, if each answered every question once. (The generous end: two models fail at the same hard
# questions, and averages of several runs spread less.)

# %%
from dsa.analysis.published import read_benchmarks

table = read_benchmarks("../data/published/benchmarks.csv")
guess = predict(
    "Of the 14, how many lie outside what chance explains?",
    3,
    high=14,
    form=".0f",
    unit="benchmarks",
)

# %%
show(*figures.draw_published(table))

# %%
known = [b for b in table if b.noise_margin() is not None]
outside = [b.name for b in known if abs(b.difference) > b.noise_margin()]
guess.reveal(
    len(outside),
    f"none of the {len(known)} whose size is known. The other two cannot be"
    " judged: a rating, and a set whose months are not stated.",
)
claim(
    "shares-within-chance",
    not outside and len(known) == 12,
    f"all {len(known)} shares of known size lie within chance",
)

# %%
better = sum(b.difference > 0 for b in table)
worse = sum(b.difference < 0 for b in table)
claim(
    "ahead-and-behind",
    (better, worse) == (7, 6),
    f"sparse is ahead on {better}, behind on {worse}, equal on one",
    value=f"ahead on {better}, behind on {worse}",
)

# %%
widest = max(b.noise_margin() for b in known)
claim(
    "chance-on-30-questions",
    widest > 15,
    f"on AIME and HMMT, 30 questions each, chance alone reaches"
    f" ±{widest:.0f} points",
    value=f"±{widest:.0f}",
)

# %% [markdown]
# Read this carefully, in both directions. **It does not show a loss**: {claim:ahead-and-behind}, and nothing stands
# out. **It cannot rule one out** either: a table in which {claim:chance-on-30-questions} points would be chance
# cannot see 2 points. What supports the report's claim is the sum: thirteen small differences and a rating that
# scatter around nought. What would support it better is not given: the number of runs, their spread, the same
# questions compared one by one, and benchmarks that are made to ask far back in long texts. The report itself
# explains three of the losses (GPQA, HLE, HMMT) by shorter reasoning.
#
# ## Our fourteen
#
# A suite of our own, for a model of half a million weights: needles at four distances and three loads, text near
# its beginning and far from it, copying, and *induction*, that is, a passage that stands in the text twice. Dense
# twin against sparse twin, and the window twin as a third. That one is there to test the *tests*: a suite that
# does not notice a window would not notice anything. Every score is a share of right next tokens; these are asked:

# %%
for one in benchmark_suite.eval_sets(text, sequences=8):
    for name, asked in one.asked.items():
        print(f"{name:20} {one.tokens.shape[1]:4} tokens a sequence,",
              f"{asked.sum() / len(asked):5.1f} asked")  # fmt: skip

# %% [markdown]
# Two rules make it an honest comparison. The two models sit the *same* exam, and the difference is taken sequence
# by sequence. And the interval runs over *seeds*, since the training itself is the larger lottery: Student's
# factor for three of them is 4.30, a wide price for a small number. **Recorded**, 24 sequences a benchmark, 48
# for the distances.

# %%
ours = benchmark_suite.differences(record["suite"], "sparse")
theirs = benchmark_suite.differences(record["suite"], "window")
show(*figures.draw_benchmark_suite(ours, theirs))

# %%
quiet = sum(r["noise"] for r in ours)
largest = max(abs(r["difference"]) for r in ours)
claim(
    "our-fourteen-within-chance",
    len(ours) == 14 and quiet >= 12 and largest < 0.03,
    f"{quiet} of our 14 differences lie within chance, and the largest of"
    f" all is {100 * largest:.1f} points",
    value=f"{quiet} of our 14",
    kind="recorded",
)

# %%
needles = [r for r in theirs if "needle" in r["benchmark"]]
claim(
    "suite-convicts-window",
    all(not r["noise"] and r["difference"] < -0.5 for r in needles),
    f"the same suite convicts the window on all {len(needles)} needle"
    " benchmarks, by more than 50 points each",
    kind="recorded",
)

# %%
full = [r["benchmark"] for r in ours if r["dense"] > 0.98]
empty = [r["benchmark"] for r in ours if r["dense"] < 0.05]
claim(
    "ceilings-and-floor",
    len(full) >= 5 and len(empty) >= 1,
    f"{len(full)} of the 14 are at their ceiling and {len(empty)} at the"
    " floor",
    value=f"{len(full)}",
    kind="recorded",
)

# %% [markdown]
# {claim:our-fourteen-within-chance} lie within chance. Three warnings, all of which apply to the report's table too.
#
# **Ceiling and floor.** {claim:ceilings-and-floor} of ours are at 98% or more: there is *no* way to be better, and
# hardly one to be worse. Random bytes are at the floor: neither model copies what is no key and no text, so both fail
# equally, and "equal" means nothing. (The copying that the base model learned first is largely forgotten, in both.)
# **Fourteen tests at 95%** raise 0.7 false alarms on average. One outside is no scandal, and none is no proof.
# **Three seeds** see only what is large. An interval of ±1 point allows a loss of one point. And one of ±0.0 is no
# certainty: three seeds with equal scores have no spread, and the nearest needles are 44 questions a seed.
#
# What it does show: where a model *can* fail, as the window proves, the sparse twin does not.
#
# ## Otherwise: two ablations
#
# Small ones, marked as such. **Recorded**: `{source:sparse_ablations.command}`, {source:sparse_ablations.date}.
#
# **Attached.** The same weights, 60 steps with K = 16, the indexer's input detached (as it should be) or not. Two
# orders of the data.

# %%
path = Path("../data/measurements/sparse_ablations.json")
ablations = json.loads(path.read_text())["runs"]


def ablation(name, kind):
    """The recorded runs of one kind."""
    pair = (name, kind)
    return [r for r in ablations if (r["ablation"], r["kind"]) == pair]


# %%
plain, leaky = (ablation("detach", k) for k in ("detached", "attached"))
for one in plain + leaky:
    print("{kind} {seed}: {bits:.3f} bits, KL {kl:.3f}".format(**one))
gaps = [b["bits"] - a["bits"] for a, b in zip(plain, leaky, strict=True)]
easier = 1 - sum(r["kl"] for r in leaky) / sum(r["kl"] for r in plain)
claim(
    "attached-bits-alike",
    max(map(abs, gaps)) < 0.02 and easier > 0,
    "attached or not, the bits differ by less than 0.02; the divergence is"
    f" {easier:.0%} smaller attached",
    kind="recorded",
)

# %% [markdown]
# The model has become a little easier to imitate, as feared. Harm is not to be seen: the two orders of the data
# do not even agree which reads better. So no benchmark of ours would find a forgotten `detach`. The gradient
# finds it at once, which is why this package tests gradients. What it would do in 943.7 billion tokens,
# nobody has shown.
#
# **From scratch.** Why not train sparse from the first step, and save the dense training? One seed: the copying
# task of the base model, until 95% are right; then needles.

# %%
scratch = {k: ablation("scratch", k)[0] for k in ("dense", "sparse")}
show(*figures.draw_from_scratch(scratch))
late = scratch["sparse"]["copy_steps"] / scratch["dense"]["copy_steps"]
claim(
    "sparse-from-scratch",
    1 < late < 2,
    f"sparse from scratch, the transition comes after {late:.2f} times as"
    " many steps",
    kind="recorded",
)

# %% [markdown]
# It works, and the transition, the sudden rise, comes a little later, as one would fear: the indexer imitates an
# attention that knows nothing yet, and attention learns from what that indexer shows it. But one seed is one seed,
# and at 16 of 64 tokens chance helps: a quarter of all tokens is seen anyway. With 2,048 of 131,072 it is one of 64.
# The report does not train from scratch; it had a dense model.
#
# ## 943.7 billion tokens
#
# The report's sparse training: 15,000 steps of 480 sequences of 128K tokens. An article about the release
# ([09](09_cost_curves.ipynb) weighs it) speaks of around 100 billion. Both numbers, in what they would cost,
# **modelled**: three forward passes a token, counted for the real configuration at 128K, on GPUs of 990 TFLOP/s in
# bf16 of which 40% are used, at the report's $2 an hour. Then ours, in tokens for each weight that learns.

# %%
from dsa.analysis import flops

real = dsa.Config.v32_exp()
length = 128 * 1024
tokens = {
    "warm-up": 1000 * 16 * length,
    "sparse, report": 15_000 * 480 * length,
    "sparse, article": 100e9,
}
forward = flops.prompt_flops(real, length, "sparse").total / length
for name in ("sparse, report", "sparse, article"):
    hours = 3 * forward * tokens[name] / (990e12 * 0.4) / 3600
    print(
        f"{name:16} {tokens[name] / 1e9:6.1f} billion tokens,"
        f" {hours:9,.0f} GPU hours, ${2 * hours / 1e6:.2f} million"
    )
claim(
    "sparse-stage-tokens",
    abs(tokens["sparse, report"] / 1e9 - 943.7) < 0.05,
    f"15,000 x 480 x 128K are {tokens['sparse, report'] / 1e9:.1f} billion",
    value="943.7 billion",
)

# %%
ours = sum(p.numel() for p in warmed.parameters())
weights = {"report": 671e9 + 0.85e9, "here": ours}
read = {"report": tokens["sparse, report"], "here": 100 * 8 * 512}
for name in read:
    print(f"{name:6} {read[name] / weights[name]:.2f} tokens a weight")
ratio = tokens["sparse, report"] / tokens["warm-up"]
claim(
    "stage-two-against-one",
    440 < ratio < 460,
    f"the sparse stage reads {ratio:.0f} times as much as the warm-up",
    value=f"{ratio:.0f} times",
)

# %% [markdown]
# About one token a weight on both sides. (A coincidence, as in chapter 05, and no law.) Is
# {claim:sparse-stage-tokens} much? A sixteenth of the 14.8 trillion that the V3 report gives for the base model, and
# {claim:stage-two-against-one} the warm-up. We have seen that with enough keys the switch hardly hurts, and that 60
# steps repair much of what two keys cost. So why so many? The report does not say. Two readings: the last traces of a
# difference are the dearest; or it continues a training that would have gone on anyway, this time on long texts.
# Neither can be decided from outside.
#
# ## Exercises
#
# Write the function, run its cell and the check below it. Nothing happens if you skip one.

# %% [markdown]
# {exercise:sparse_training.my_gpu_hours}

# %% [markdown]
# {exercise:sparse_training.my_sparse_loss}

# %% [markdown]
# {exercise:sparse_training.my_interval}

# %% [markdown]
# {exercise:sparse_training.my_longer}

# %% [markdown]
# The package has such a copy, too. With it: the training at 512 tokens, the length of the shipped models, and then at
# one of your choice. Set `FULL = True` and `LENGTH`; at 512 it takes about two minutes (with eight sequences a step,
# as the shipped model had). Above 512, first look what the model can do there before any training. (Recorded for
# 1,024 below.)

# %%
if FULL:
    LENGTH = 512
    for name, attention in {"sparse": "sparse", "dense": "dense"}.items():
        grown = clone_model(warmed, LENGTH)
        task = MixedNeedles(text, LENGTH)
        continue_training(
            grown, task, attention, 16, steps=100, size=8, show=True
        )
        long = list(evaluate.needle_batches(text, LENGTH, 32))
        with evaluate.set_to(grown, attention, 16):
            bits = evaluate.text_bits(grown, text, LENGTH, 32)
        right = evaluate.recall(grown, long, attention, 16)
        print(f"{name} at {LENGTH}: {bits:.3f} bits, recall {right}")

# %% [markdown]
# ## Where it fails
#
# **K too small.** Through one key the model that was trained with two reads better than before, and stays poor. A
# token sees itself or another one, never both:

# %%
one = [seeds_at(*lines[n], "bits", 1) for n in ("before", "trained with 2")]
for name, found in zip(("before", "trained with 2"), one, strict=True):
    print(f"{name:16} K = 1:", *(f"{x:.2f}" for x in found))
claim(
    "one-key-after-training",
    (one[1] - floor > 0.5).all(),
    "with one key more than 0.5 bits are missing even after training with"
    " two",
    kind="recorded",
)

# %% [markdown]
# **Local text.** On text without needles the window twin is hardly worse than the sparse one. Whoever judges a
# selection by the loss of ordinary text will find that a window does nearly as well, and will be right until
# somebody asks for something far away.

# %%
apart = (bits["window"] - bits["sparse"]).max()
claim(
    "window-behind-indexer",
    apart < 0.1 and windowed < 0.25,
    f"the window is at most {apart:.3f} bits per byte behind the"
    " indexer, and cannot find a needle",
    kind="recorded",
)

# %% [markdown]
# **Longer than it has learned.** The config says how far a model *may* read (exercise 7.4). At 1,024 tokens,
# twice what all its stages have seen, and after 30 steps there, one seed, **recorded**: the sparse model loses
# needles, and so does the dense one, as many. It is the *model* that has not learned to look back that far, and not
# the choice that fails. A few steps at the new length bring back about half of what was lost.

# %%
far = ablation("longer", "sparse")[0]
dense, sparse = (far["before"][kind] for kind in ("dense", "sparse"))
ways = dense, sparse, far["after"]
names = "dense, as it is", "sparse, as it is", "sparse, trained there"
for name, found in zip(names, ways, strict=True):
    print(
        f"{name:22}", "{bits:.2f} bits, recall {recall:.0%}".format(**found)
    )
claim(
    "longer-context",
    abs(dense["recall"] - sparse["recall"]) < 0.05
    and far["after"]["recall"] > sparse["recall"],
    f"at 1,024 tokens dense recalls {dense['recall']:.0%} and sparse"
    f" {sparse['recall']:.0%}, after 30 steps there"
    f" {far['after']['recall']:.0%}",
    kind="recorded",
)

# %% [markdown]
# ## What you have proved
#
# The switch to 16 keys costs {claim:sparse-untrained} bits before any training, and after it the model is within
# {claim:equal-steps-equal-bits} of its dense twin (with each of three seeds). With two keys the training repairs
# {claim:two-keys-repaired} of the damage, and dense training none of it: the model adapts to what it no longer sees.
# Two losses share one backward pass and no weight. {claim:our-fourteen-within-chance} benchmarks lie within chance,
# and so do all of the report's whose size is known.
#
# **What the report does not say, and what we chose.** What the switch cost before training; whether K was 2,048
# from the first step (ours is constant); the schedule of the rate (ours falls to a tenth); whether the indexer's
# rate differs from the model's (ours is the same, 0.003); the weight of the divergence (ours is 1; as the two losses
# share no weights, it could only change the size of the indexer's own steps); how often each benchmark was run.
#
# **Five questions**
# 1. The model trained with 2 keys reads worse with all keys. What has it come to rely on?
# 2. Eq. 4 teaches the indexer on its own choice. Which mistake can it not learn of, and why did it hardly matter
#    here?
# 3. A colleague compares the sparse model after training with the dense one before it, and finds it better. What
#    is wrong?
# 4. All fourteen differences of a table are negative and within chance. Is that chance?
# 5. Why does a suite need a model that fails?
#
# <details><summary>Answers</summary>
#
# 1. That the other tokens contribute nothing. Their weights were never trained to be harmless when they are seen.
# 2. That a token outside the choice would have been better. The warm-up had taught the order of all tokens
#    before.
# 3. A hundred steps change any model. The dense one must have them, too.
# 4. Hardly: fourteen times the same sign happens once in 8,192 times. Small differences add up to evidence.
# 5. If nothing fails the suite, you do not know whether it can find anything. The window shows which of the tests
#    can.
#
# </details>
#
# **Next**: the model now needs K tokens instead of all. A formula with fewer terms is not yet less work:
# [07](07_fp8.ipynb) is about scores in eight bits, [08](08_kernels.ipynb) about the code that really does less. What
# is saved in the end, [09](09_cost_curves.ipynb) counts.
