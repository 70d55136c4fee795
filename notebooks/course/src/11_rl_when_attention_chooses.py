# %% [markdown]
# # 11 Post-training: what is there to learn when nobody writes the answers?
#
# Until now there was always a text to imitate. After pre-training there is none: nobody has written down how *this
# model* should work out a sum, repair a program or search. What one does have is a way to tell whether it worked.
# DeepSeek's report goes from there in three steps. From one base model a *specialist* is trained in each of five
# domains, by reinforcement learning. What they write becomes the lesson of one *student*. And one last stage of
# reinforcement learning, **GRPO** on everything mixed, replaces the several stages in a row that others use. All of
# it with sparse attention on. We do the same, with a model of 0.2 million weights.
#
# **You will be able to**
# 1. write GRPO's advantage and its clipped objective by hand, and check the gradient;
# 2. train a sparse model by reward alone in half a minute, and prove that it became better and not only luckier;
# 3. recognise the runs that look fine and are not: a leaky checker, groups without variance, a rate too high.
#
# **You need** PyTorch, cross-entropy, and top-k selection ([04](04_token_selection.ipynb)).
# [05](05_training_the_indexer.ipynb) says how an indexer learns, which goes on here.
#
# **Afterwards**: the run on all five domains (set `FULL`), `dsa/training/grpo.py`, and the record's
# `notebooks/course/experiments/post_training.py`. Computing: about **60 s**.
#
# Shape letters: `B` sequences, `T` tokens, `G` answers to one prompt, `K` kept tokens. *The report* is DeepSeek's
# on V3.2-Exp; this chapter is about the second half of its section 2. The names of settings are those of TRL,
# Hugging Face's library for training with rewards.

# %%
import copy
import inspect
import json
from pathlib import Path
from random import Random

import dsa
import torch
from course.exercises.policy_gradient import check
from course.figures import rl_rewards
from course.figures.grpo_groups import block_means, curves_by_seed
from course.ui.claims import claim
from course.ui.predict import predict
from course.ui.style import show, style
from dsa.datasets import rl_domains, rl_transcripts
from dsa.datasets.rl_domains import DOMAINS, LEVELS, generate, solve
from dsa.datasets.rl_symbols import VOCAB, read, write
from dsa.datasets.rl_transcripts import demonstration, run_with_tool
from dsa.training import grpo, rewards, rollout, sft
from dsa.training.grpo import GRPOConfig
from torch import Tensor

FULL = False  # True: also GRPO on all five domains, two to four minutes
torch.set_num_threads(1)
style()

# %% [markdown]
# ## Five domains whose answers can be checked
#
# The report names five: mathematics, competitive programming, logical reasoning, agentic coding, agentic search.
# Ours are the smallest tasks that deserve the comparison. Each has three levels. A prompt begins with the sign of
# its domain, then says whether to think first (T) or to answer directly (D). A symbol is a token; there are 48.

# %%
rng = Random(0)
for name in DOMAINS:
    for thinking in (False, True):
        problem = generate(rng, name, 2, thinking)
        written = read(demonstration(problem).tokens)
        print(f"{name:9} {read(problem.prompt):38} -> {written}")

# %% [markdown]
# `maths` adds digits below five; a thinker writes the running totals first. `sorting` sorts digits; a thinker sorts
# both halves first. `brackets` closes what is open; a thinker lists what is open. These three end in `=`, the
# answer and a full stop.
#
# The other two are **agents**: they take several turns, and some of the tokens are not theirs. In `repair` the
# prompt is a specification, eight lines `name value`. The agent runs the tests (`▸`); the tool names a line that is
# broken; the agent writes what that line must be; the tool names the next one, or says `✓`. One wrong repair, and
# it says `✗`. In `search` the agent asks (`?`) for a name and is given what stands under it, another name or the
# number wanted. In brackets, what the tool said:

# %%
broken = dict(zip(write("b a"), write("2 1"), strict=True))
prompt = write("✎ D a 1 b 2 c 3")
problem = rl_domains.Problem("repair", 2, False, prompt, broken)
for said in ("▸ 2 1 .", "▸ 2 7 ."):
    one = run_with_tool(problem, write(said))
    spoken = zip(one.tokens, one.completion_mask, strict=True)
    line = " ".join(
        read([t]) if own else f"[{read([t])}]" for t, own in spoken
    )
    print(f"{line:20} correct: {one.correct}")

# %% [markdown]
# The checker is the teacher here, and the only one. So it had better be right: it must accept what is right, and
# nothing else. Let us try to fool it with direct answers (thoughts are free): a right one for each domain and level,
# and then each of its tokens exchanged for each of the other 47 symbols.

# %%
accepted, refused, fooled = 0, 0, 0
for name in DOMAINS:
    for level in LEVELS:
        problem = generate(rng, name, level, thinking=False)
        right = solve(problem)
        accepted += rl_domains.correct(problem, right)
        for place in range(len(right)):
            for other in set(range(VOCAB)) - {right[place]}:
                changed = (*right[:place], other, *right[place + 1 :])
                fooled += rl_domains.correct(problem, changed)
                refused += not rl_domains.correct(problem, changed)
claim(
    "answers-checked",
    accepted == 15 and fooled == 0,
    f"all {accepted} right answers are accepted, all {refused:,} answers"
    " with one token changed are refused",
)

# %% [markdown]
# ## A model that knows, and is careless
#
# `data/novice` was trained like this course's large model: it copied first, then read worked solutions with dense
# attention, then its indexers were warmed up, then it learned to live with K = 8 of up to 34 tokens. But two fifths
# of the solutions it read have one symbol exchanged. A model that imitates them well is *careless*: it learns what
# is right, and it learns to be wrong now and then. (Real base models are careless because people are. Ours was made
# so on purpose, so that there is something to gain.)
#
# Take its likeliest tokens, and it is nearly always right. And if its tokens are *drawn*, as it would say them?

# %%
base = dsa.from_pretrained("../data/novice")
guess = predict("What share of sampled answers is right?", 0.9)

# %%
names = tuple(DOMAINS)
greedy = rollout.accuracy(base, names, 120, temperature=0.0)
sampled = rollout.accuracy(base, names, 120, temperature=1.0)

# %% tags=["nbval-ignore-output"]
ways = {"likeliest tokens": greedy, "sampled": sampled}
show(*rl_rewards.draw_decoding_modes(ways))
best, drawn = (sum(found.values()) / 5 for found in ways.values())
guess.reveal(drawn, "it imitates the mistakes as faithfully as the rest.")
claim(
    "likeliest-against-sampled",
    best > 0.85 and 0.45 < drawn < 0.7,
    f"the likeliest tokens are right in {best:.0%}, sampled ones in"
    f" {drawn:.0%}",
    value=f"{drawn:.0%}",
)

# %% [markdown]
# Does thinking help? The same problems with T and with D:

# %% tags=["nbval-ignore-output"]
helps = {}
for name in names:
    right, spoken = [], []
    for thinking in (False, True):
        ps = [generate(Random(n), name, None, thinking) for n in range(500)]
        done = rollout.sample(base, ps, torch.Generator().manual_seed(0))
        right.append(sum(o.correct for o in done.transcripts()) / 500)
        spoken.append(float(done.lengths.float().mean()))
    helps[name] = right[1] - right[0]
    print(
        f"{name:9} direct {right[0]:.0%}, thinking {right[1]:.0%};"
        f" own tokens {spoken[0]:.1f}, {spoken[1]:.1f}"
    )
claim(
    "thinking-helps",
    helps["maths"] > 0.06,
    "thinking helps at maths by more than chance, for twice the tokens",
)

# %% [markdown]
# With 500 problems each, a single difference below six points may be chance. Thinking helps most at `maths`, where
# the thought, a running total, does part of the work, and it helps at `search`. At `brackets` and `repair`, where it
# repeats what one already sees, it does not: a careless writer has one more occasion to slip.
#
# Back to the gap between likeliest and sampled. It is what reinforcement learning lives on. The right answer is
# among the samples, so it can be rewarded; and so are wrong ones, so there is something to tell it from. Where no
# sample is right there is nothing to learn *from*, and where all are right, nothing to learn.
#
# ## GRPO by hand: the group is the baseline
#
# Ask one question, sample G answers, reward each. How good is an answer that got 1? That depends on how easy the
# question was. The older way, PPO (*proximal policy optimisation*; the *policy* is the model as a writer), trains a
# second network to guess that. GRPO (*group relative policy optimisation*, Shao et al., 2024) looks at the other
# answers of the **group**: what is better than their mean is made likelier, what is worse less likely.
#
# $$A_i = \frac{r_i - \mathrm{mean}(r_1 \dots r_G)}{\mathrm{std}(r_1 \dots r_G)}$$

# %%
hard = torch.tensor([1.0, 0, 0, 0])  # one of four was right
easy = torch.tensor([1.0, 1, 1, 0])


def my_advantage(r):
    return (r - r.mean()) / (r.std() + 1e-4)


for name, r in (("hard", hard), ("easy", easy)):
    print(name, [round(float(a), 2) for a in my_advantage(r)])
both = grpo.advantages(torch.cat([hard, easy]), 4)
mine = torch.cat([my_advantage(hard), my_advantage(easy)])
claim(
    "advantages-by-hand",
    torch.allclose(mine, both) and bool(mine[0] > 2 * mine[4]),
    "by hand and in the package the same; a right answer counts"
    f" {float(mine[0] / mine[4]):.0f} times as much where it is rare",
)

# %% [markdown]
# Every token of an answer gets the advantage of the answer. (Nobody knows which token was to blame.) Large
# systems then use the samples for more than one update, and soon the model is not the one that wrote them. The *ratio*
# $\rho = p_\mathrm{now} / p_\mathrm{sampled}$ corrects for that, and a **clip** sees to it that no token is pushed
# too far on old evidence:
#
# $$J = \min\left(\rho A,\ \mathrm{clip}(\rho,\, 1 - \varepsilon,\, 1 + \varepsilon_\mathrm{high})\, A\right)$$
#
# The two bounds may differ: with a higher upper one, an unlikely token that turned out right may grow faster.

# %%
ratios = torch.tensor([0.5, 0.9, 1.0, 1.2, 1.5])
for A in (1.0, -1.0):
    held = ratios.clamp(0.8, 1.28)
    mine = torch.minimum(ratios * A, held * A)
    now = ratios.log()[None]
    loss, _ = grpo.token_losses(
        now, torch.zeros(1, 5), torch.tensor([A]), 0.2, 0.28
    )
    assert torch.allclose(mine, -loss[0])
    print(f"A {A:+.0f}:", [round(float(x), 2) for x in mine])

# %% [markdown]
# Read the last two lines: with A = +1 it stops growing at 1.28, with A = -1 it stops at 0.8. Beyond, the gradient
# is zero: enough learned from this sample. On the *other* side nothing is clipped. A right token that has become
# half as likely may be pushed back up.
#
# And the gradient? At ratio 1 it is the plain *policy gradient*, the oldest rule for learning from rewards: $A$
# times (one-hot minus softmax), the cross-entropy gradient, with a sign and a weight that the reward decides. By
# hand, by autograd, and by finite differences:

# %%
generator = torch.Generator().manual_seed(0)
logits = torch.randn(1, 4, 6, generator=generator).double()
tokens = torch.tensor([[2, 0, 5, 1]])
A, own = torch.tensor([1.5]).double(), torch.tensor([[0, 0, 1, 1]]).bool()
old = rollout.logprobs_of(logits, tokens)


def policy_loss(z):
    now = rollout.logprobs_of(z, tokens)
    losses, _ = grpo.token_losses(now, old, A, 0.2, 0.28)
    return grpo.averaged(losses, own, "dapo", 4)  # mean over own tokens


wanted = logits.clone().requires_grad_()
(auto,) = torch.autograd.grad(policy_loss(wanted), wanted)

# %%
hand, finite = torch.zeros_like(auto), torch.zeros_like(auto)
for t in (2, 3):  # the two own tokens, predicted one place earlier
    onehot = torch.eye(6)[tokens[0, t]]
    seen = logits[0, t - 1].softmax(-1)
    hand[0, t - 1] = -1.5 * (onehot - seen) / 2
for place in range(logits.numel()):
    step = torch.zeros(logits.numel()).double()
    step[place] = 1e-6
    step = step.view_as(logits)
    rise = policy_loss(logits + step) - policy_loss(logits - step)
    finite.view(-1)[place] = rise / 2e-6
gaps = [float((auto - other).abs().max()) for other in (hand, finite)]
claim(
    "grpo-gradient",
    max(gaps) < 1e-8 and bool((auto[0, 3] == 0).all()),
    "the gradient by hand, by autograd and by finite differences is one",
)

# %% [markdown]
# Two of the four tokens count. The others belong to the prompt or to the tool, and a model that is trained on its
# tool's words learns to make them up. From here on we use the package; its objective is this:

# %%
print(inspect.getsource(grpo.token_losses))

# %% [markdown]
# What does one update do to a group? The left figure shows the advantages of a group of G answers, the right one
# what a token gains when its probability moves, with the free range in grey. `beta` is the weight of one term more,
# the divergence KL(now || start) from the model at the start. It is estimated from the sampled tokens, and because
# these were drawn from the very distribution that is differentiated, a right *value* does not yet make a right
# *gradient*. Both are right if the estimate is multiplied by $\rho$, as DeepSeek-V3.2 does; the last exercise is
# about this. Look for: a group in which all are right; one right among sixteen; a large `beta`. Below the panel are
# three of its positions, for readers without a kernel.

# %%
from course.figures.grpo_groups import RIGHT, draw_objective
from course.ui.panel import Choice, Panel, static_snapshots

Panel(
    draw_objective,
    size=Choice("group size G", [2, 4, 8, 16], 8),
    right=Choice("right answers", list(RIGHT), "half"),
    high=Choice("epsilon_high", [0.2, 0.28, 0.5], 0.28),
    beta=Choice("beta", [0.0, 0.5, 2.0], 0.0),
)

# %%
base_case = {"size": 8, "right": "half", "high": 0.28, "beta": 0.0}
static_snapshots(
    draw_objective,
    [base_case, base_case | {"right": "one"}, base_case | {"beta": 2.0}],
    columns=1,
)

# %% [markdown]
# ## The trap: who wrote this?
#
# Samples are written token by token, from a cache. The gradient reads the whole row at once. With sparse attention
# these are two chances to select *other keys*, and then $\rho$ is not 1 where it must be: the gradient belongs to a
# model that did not write the text. In real systems the sampler is another program, in other numbers. Here both run
# the same operations. How often do they choose the same eight keys?

# %%
problems = rl_transcripts.sample_problems(generator, names, 40)
written = rollout.sample(base, problems, generator)
same = rollout.selection_agreement(base, written.tokens)
mismatch = rollout.train_infer_mismatch
claim(
    "sampler-agrees",
    same > 0.999 and mismatch(base, written)["logprob"] < 1e-3,
    "token by token and all at once, more than 99.9% of the queries choose"
    " the same keys, and log-probabilities agree to 0.001",
)

# %% [markdown]
# And if they did not? Let the same text be read with other settings than it was written with, and look at the mean
# of $|\rho - 1|$, which should be 0:

# %% tags=["nbval-ignore-output"]
gaps = {"same": mismatch(base, written)["ratio"]}
for K in (7, 6, 4):
    base.top_k = K
    gaps[f"K = {K}"] = mismatch(base, written)["ratio"]
base.top_k, base.attention = 8, "dense"
gaps["dense"] = mismatch(base, written)["ratio"]
base.attention = "sparse"
print({name: round(gap, 3) for name, gap in gaps.items()})
claim(
    "other-k-ratio",
    gaps["same"] < 1e-4 and min(gaps["K = 4"], gaps["dense"]) > 0.05,
    "written with K = 8 and read with K = 4 or densely, the ratio is off by"
    " more than 5% on average",
)

# %% [markdown]
# A clip at 20% has little left to guard if the ratio is off by that much before anything was learned. The table of a
# training run (`run.rows` below) therefore has a column `logprob_difference`, and `clip_ratio`, the share of tokens
# at which the clip acts.
#
# ## Half a minute of GRPO
#
# Three domains, sparse attention, 30 steps of 16 prompts with 8 answers each. Nothing is shown to the model but its
# own samples, and a 0 or 1 for each. Every batch of samples is used for one update, so $\rho$ stays 1 and the clip
# never acts: it is there for those who set `num_iterations` higher. The indexers go on learning beside it from Eq.
# 4 (chapter 05): no reward reaches them, since selecting passes no gradient. The exam before and after is 120
# freshly drawn problems a domain; chance alone moves such a mean of three by about three points.

# %%
guess = predict("By how much does the share of right answers rise?", 0.1)

# %% tags=["nbval-ignore-output"]
three = ("sorting", "repair", "search")
config = GRPOConfig(num_prompts=16, epsilon_high=0.28)
trained = copy.deepcopy(base)
run = grpo.grpo(trained, three, steps=30, config=config, show=False)
after = rollout.accuracy(trained, three, 120)
rose = sum(after[name] - sampled[name] for name in three) / 3
print(f"{run.seconds:.0f} seconds on this machine")
for name in three:
    print(f"{name:8} {sampled[name]:.0%} -> {after[name]:.0%}")
guess.reveal(
    rose,
    "the right answers were there; they only had to become likelier.",
)
claim(
    "grpo-learns",
    rose > 0.1 and max(row["clip_ratio"] for row in run.rows) < 0.01,
    f"on freshly drawn problems the share of right answers rises by"
    f" {100 * rose:.0f} points",
    value=f"{100 * rose:.0f} points",
)

# %% tags=["nbval-ignore-output"]
show(*rl_rewards.draw_run(run.rows))

# %% [markdown]
# The third picture is worth a habit. The better the model, the more groups are all right, and have nothing to
# teach. A run ends by itself when this share nears 1, whatever the reward.
#
# All five domains at once, 60 steps, two to four minutes: set `FULL = True` above.

# %%
if FULL:
    model = copy.deepcopy(base)
    settings = GRPOConfig(epsilon_high=0.28)
    long = grpo.grpo(model, names, steps=60, config=settings)
    print(f"{long.seconds:.0f} s", rollout.accuracy(model, names, 150))

# %% [markdown]
# ## Look at the answers
#
# A reward curve is a mean over thousands of texts that nobody has read. Read some. Each table is one group: one
# prompt, eight samples, the reward and the advantage of each. Compare *before* with *after*, go to level 3, and
# look for the group that teaches nothing. Below the panel is one group before and after, for readers without a
# kernel.

# %% tags=["nbval-ignore-output"]
from course.figures.grpo_groups import draw_group

draw = draw_group({"before": base, "after": trained})
Panel(
    draw,
    model=Choice("model", ["before", "after"], "before"),
    domain=Choice("domain", list(names), "repair"),
    level=Choice("level", list(LEVELS), 2),
    mode=Choice("mode", ["direct", "think"], "direct"),
)

# %% tags=["nbval-ignore-output"]
at = {"domain": "repair", "level": 2, "mode": "direct"}
static_snapshots(
    draw, [{"model": who, **at} for who in ("before", "after")]
)

# %% [markdown]
# ## Rewards that are not 0 or 1
#
# A right answer may be too long, or skip the thinking that was asked for. The report adds a *length penalty* and
# *language consistency* (one answer, one language; here: think when asked to, and only then). For general tasks,
# where no rule decides, a generative model grades by a *rubric*, a list of points for each prompt. Ours has three
# points for sorting (digits only, in order, the same items), and rules in the place of the judge. `mode` is 1 if it
# thought exactly when asked to; four tokens and the full stop are free of the penalty. Four answers to one question:

# %%
problem = rl_domains.Problem("sorting", 1, False, write("↓ D 4 8 2"), {})
rubric, penalty = rewards.SORTING_RUBRIC, rewards.LengthPenalty(free=5)
print(f"{'answer':18} right rubric mode length")
for said in ("= 2 4 8 .", "= 4 2 8 .", "= 2 8 .", "4 : 2 8 = 2 4 8 ."):
    one = run_with_tool(problem, write(said))
    print(
        f"{said:18} {rewards.verified(one):5.0f} {rubric(one):6.2f}"
        f" {rewards.mode_kept(one):4.0f} {penalty(one) + 0:6.2f}"
    )

# %% [markdown]
# A rubric pays for the way there. That helps where nothing is ever quite right, since then 0 or 1 is always 0. And
# it is an invitation: every point that can be had without the task will be had without the task. We come to that.
#
# ## Specialists and their student
#
# Now the report's recipe. Each specialist is trained in its domain alone, from the same base. Then each samples, a
# checker throws away what is wrong (*rejection sampling*), and one student, starting from the base again, imitates
# what is left. What passes from teacher to student are texts. No weights, no probabilities: so the teacher may be
# of any size and kind.
#
# First live, with the model above as the teacher; then recorded.

# %%
samples = sft.rejection_sample(
    trained, three, num_prompts=192, num_generations=2
)
claim(
    "student-reads-right",
    all(one.correct for one in samples) and len(samples) > 150,
    "what the student reads is right, all of it",
)
student = copy.deepcopy(base)
read_on = sft.sft(
    student, samples, steps=40, learning_rate=1e-3, show=False
)

# %% tags=["nbval-ignore-output"]
learned = rollout.accuracy(student, three, 120)
print(f"{len(samples)} texts")
for name in three:
    print(
        f"{name:8} teacher {after[name]:.0%}, student {learned[name]:.0%}"
    )
behind = sum(after[name] - learned[name] for name in three) / 3
claim(
    "student-near-teacher",
    abs(behind) < 0.15
    and sum(learned.values()) > sum(sampled[name] for name in three),
    f"the student is within 15 points of its teacher: {-100 * behind:+.0f}",
)

# %% [markdown]
# All five domains, three seeds, are **recorded** (`{source:post_training.command}`, {source:post_training.date}):
# specialists of 25 steps with 16 prompts; a student of 80 steps on their correct samples; *mixed*, 60 steps of 32
# prompts from all domains, straight from the base; *sequential*, the five domains one after the other, 25 steps
# each. Mixed and sequential thus see about equally many samples. Who is how good at what?

# %%
guess = predict(
    "By how many points does the student beat the specialists?",
    -5,
    low=-50,
    high=50,
    form=".0f",
    unit="points",
)

# %%
path = Path("../data/measurements/post_training.json")
record = json.loads(path.read_text())
runs = record["runs"]


def of(pick):
    """What `pick` takes from each run: (seeds, domains)."""
    return torch.tensor([[pick(r)[n] for n in names] for r in runs])


rows = {"base": of(lambda r: r["models"]["base"])}
for who in names:
    rows[f"{who} only"] = of(lambda r, who=who: r["specialists"][who])
rows["student"] = of(lambda r: r["models"]["student"])
rows["student, then mixed"] = of(lambda r: r["models"]["student, mixed"])
rows["mixed"] = of(lambda r: r["models"]["mixed"])
rows["sequential"] = of(lambda r: r["sequential"][-1])
show(*rl_rewards.draw_recipes(rows, names))

# %%
alone = [rows[f"{name} only"][:, n] for n, name in enumerate(names)]
right, best = rows["student"].mean(), torch.stack(alone).mean()
guess.reveal(
    100 * (right - best),
    "imitating right answers is a lesson too: rejection sampling has thrown"
    " the carelessness away.",
)
claim(
    "student-against-specialists",
    right > best - 0.05,
    f"one student has {right:.0%} right, the five specialists, each in its"
    f" own domain, {best:.0%}",
    kind="recorded",
    value=f"{right:.0%}",
)

# %% [markdown]
# The report says that the student comes out only marginally below the specialists, and that reinforcement learning
# afterwards closes the gap. Ours comes out above them, probably because they were trained briefly and it reads
# nothing but their right answers. So there is no gap to close, and a mixed stage after it, the report's third step,
# changes little:

# %%
more = (rows["student, then mixed"] - rows["student"]).mean(1)  # by seed
claim(
    "mixed-after-student",
    more.abs().max() < 0.05,
    "20 mixed steps after the student change less than 5 points (seeds:"
    f" {', '.join(f'{x:+.2f}' for x in more)})",
    kind="recorded",
)

# %% [markdown]
# ## One mixed stage, or stages in a row?
#
# A stage in a row sees one domain and improves one domain. What happens to the others meanwhile, and to those that
# had their turn? One picture for each domain, a grey line where its own stage ends:

# %%
stages = torch.stack(
    [
        rows["base"],
        *(of(lambda r, n=n: r["sequential"][n]) for n in range(5)),
    ]
)  # (1 + stages, seeds, domains)
show(
    *rl_rewards.draw_sequential_stages(
        stages.transpose(0, 1), rows["mixed"], names
    )
)

# %%
gained = (rows["mixed"] - rows["base"]).mean(1)  # by seed
claim(
    "mixed-raises-base",
    gained.mean() > 0.2,
    f"one mixed stage raises the base by {gained.mean():.2f} (seeds:"
    f" {', '.join(f'{x:.2f}' for x in gained)})",
    kind="recorded",
    value=f"{gained.mean():.2f}",
)

# %%
steps = record["options"]["steps"]
in_a_row = 5 * steps["specialist"]
ahead = (rows["mixed"] - rows["sequential"]).mean(1)
claim(
    "mixed-against-stages",
    ahead.mean() > 0 and in_a_row > 2 * steps["mixed"],
    f"{steps['mixed']} mixed steps end {ahead.mean():.2f} ahead of"
    f" {in_a_row} steps in a row, which read about as many samples (seeds:"
    f" {', '.join(f'{x:+.2f}' for x in ahead)})",
    kind="recorded",
    value=f"{ahead.mean():.2f} ahead",
)

# %% [markdown]
# The mixed stage ends {claim:mixed-against-stages}. That is not thrift: its steps are twice as large, and both have
# written about 16,000 samples. The row lags at `maths` and `brackets`; at `repair` and `search`, its last two stages,
# it is level or a little ahead. (One order was tried, this one.) And in the row something wears off. How much does a
# domain lose between the end of its own stage and the end of the row?

# %%
then = torch.stack([stages[n + 1, :, n] for n in range(4)], dim=1)
worn = (then - rows["sequential"][:, :4]).mean()
claim(
    "domain-loses-after",
    0 < worn < 0.1,
    f"on average a domain loses {100 * worn:.0f} points after its own"
    " stage",
    kind="recorded",
    value=f"{100 * worn:.0f} points",
)

# %% [markdown]
# {claim:domain-loses-after}: no collapse. What the mixed stage buys is plainer than the stories about forgetting: one
# run to watch instead of five, and no order to choose. Stop it halfway, and every domain has had its turn.
#
# ## What is forgotten
#
# A model with much to lose should show it better. The mixed model is better than the base at everything; now 25
# more steps on `maths` alone, as if a customer had asked for it. Once freely, once with `beta = 0.1`, which is to hold
# it near what it was. (The three models below were recorded anew on {source:post_training.renewed.date}, when the KL
# term was put right.)

# %%
found = {
    "mixed": rows["mixed"],
    "then maths alone": of(lambda r: r["models"]["forget"]),
    "the same, beta 0.1": of(lambda r: r["models"]["forget less"]),
}
show(*rl_rewards.draw_domains(found, names))
moved = [100 * (found[name] - found["mixed"]) for name in list(found)[1:]]
free, held = (-each[:, 1:].mean() for each in moved)
claim(
    "maths-alone-costs",
    abs(free) < 5 and abs(held) < 5,
    f"25 steps on maths alone cost the other four domains {free:.1f} points"
    f" on average, with beta 0.1 {held:z.1f}: nothing that could be told"
    " from chance",
    kind="recorded",
)

# %%
freely, with_beta = (
    ", ".join(f"{x:+.0f}" for x in each[:, 0].tolist()) for each in moved
)
claim(
    "maths-itself",
    all(each[:, 0].mean().abs() < 5 for each in moved),
    f"maths itself moves by {freely} points, with beta {with_beta} (seeds)",
    kind="recorded",
    value=f"{freely} points, with beta {with_beta}",
)

# %% [markdown]
# So these runs cannot show what the KL term is good for: nothing is lost that it could hold, and whether its gradient
# is the right one makes no difference that could be seen. Not even `maths` gains for certain: seed by seed it moves by
# {claim:maths-itself}; with 150 problems chance alone is good for five.
#
# Reinforcement learning moves weight among texts that the model writes anyway, and only as far as rewards differ.
# At our rate, 0.001, that is gentle. In imitation the texts come from elsewhere, and every token of them counts.
# Live: the model that we trained above on three domains reads right answers to `maths` alone, 40 steps, once at a
# rate of 0.002, once at 0.005.

# %% tags=["nbval-ignore-output"]
sums = sft.rejection_sample(
    base, ["maths"], num_prompts=256, num_generations=3
)
lost = {}
for rate in (0.002, 0.005):
    narrow = copy.deepcopy(trained)
    sft.sft(narrow, sums, steps=40, learning_rate=rate, show=False)
    left = rollout.accuracy(narrow, three, 120)
    each = (
        f"{name} {after[name]:.0%} -> {left[name]:.0%}" for name in three
    )
    print(f"rate {rate}:", "; ".join(each))
    lost[rate] = sum(after[name] - left[name] for name in three) / 3
claim(
    "imitation-forgets",
    lost[0.005] > 0.05 and lost[0.005] > lost[0.002],
    "imitating sums alone at a rate of 0.005 costs the three other domains"
    f" {100 * lost[0.005]:.0f} points, at 0.002 {100 * lost[0.002]:.0f}",
)

# %% [markdown]
# So forgetting is real, and a matter of how hard one pushes: the same texts at the lower rate do far less harm.
# Imitation is not worse in itself: GRPO at ten times its rate ruins the model altogether, as we shall see.
#
# ## Dense and sparse
#
# The report lays the learning curves of V3.1-Terminus and V3.2-Exp on each other: dense and sparse attention learn
# alike. (Its figure 2.) Ours, recorded: the mixed stage from the base with K = 8, and from a dense twin, which has
# gone on reading with dense attention for as long as the base read with K = 8.

# %%
both = {"sparse, K = 8": "mixed", "dense": "mixed, dense"}
show(*rl_rewards.draw_learning(runs, both))
sparse, dense = (
    curves_by_seed(runs, name, "reward") for name in both.values()
)
apart = (sparse - dense).abs().max()  # of (seeds, 12)
claim(
    "dense-sparse-rewards",
    apart < 0.15,
    f"with no seed are the two reward curves more than {apart:.2f} apart",
    kind="recorded",
)

# %% [markdown]
# ## Exercises
#
# Write the function, run its cell and the check below it. Nothing happens if you skip one.

# %% [markdown]
# {exercise:policy_gradient.my_advantages}

# %% [markdown]
# {exercise:policy_gradient.my_gain}

# %% [markdown]
# {exercise:policy_gradient.my_checker}

# %% [markdown]
# {exercise:policy_gradient.my_divergence}

# %% [markdown]
# ## Where it fails
#
# **A checker with a leak.** This one pays for brackets as long as none closes what is not open. It never asks
# whether everything was closed. 25 steps on `brackets`, live:

# %%
print(inspect.getsource(rewards.nothing_closed_wrongly))
guess = predict("Right answers after 25 steps, before: 50%", 0.7)

# %%
hacked, leak = copy.deepcopy(base), [rewards.nothing_closed_wrongly]
hack = grpo.grpo(hacked, ["brackets"], steps=25, config=config,
                 reward_funcs=leak, show=False)  # fmt: skip

# %% tags=["nbval-ignore-output"]
from course.figures.grpo_groups import group_of

paid = block_means([row["reward"] for row in hack.rows])
honest = rollout.accuracy(hacked, ["brackets"], 150)["brackets"]
guess.reveal(honest, "it did what it was paid for.")
claim(
    "leaky-checker",
    paid[-1] > paid[0] + 0.05 and honest < sampled["brackets"] - 0.1,
    f"the reward rises from {paid[0]:.0%} to {paid[-1]:.0%}, the right"
    f" answers fall from {sampled['brackets']:.0%} to {honest:.0%}",
)
found, _, _ = group_of(hacked, "brackets", 2, False)
print("prompt", read(found[0].problem.prompt))
for one in found[:5]:
    pay = rewards.nothing_closed_wrongly(one)
    print(f"paid {pay:.0f}, right {one.correct:d}:", read(one.completion))

# %% [markdown]
# Who stops early closes nothing wrongly, and neither does an opening bracket. So it stops early and writes opening
# brackets. Nobody told it to cheat: careless samples had such things in them, and they paid. The curve alone looks
# like success; only an exam that the reward does not know tells the difference.
#
# **Groups without variance.** Take what the model does nearly without a mistake, at a low temperature: most groups
# are all right, and all their advantages are 0. They move nothing, whatever the rate.

# %%
calm = copy.deepcopy(base)
settings = GRPOConfig(num_prompts=16, temperature=0.2)
still = grpo.grpo(calm, ["search"], steps=3, config=settings, show=False)
share = [row["frac_reward_zero_std"] for row in still.rows]
high = [row["reward"] for row in still.rows]
claim(
    "groups-teach-nothing",
    sum(share) / 3 > 0.75 and min(high) > 0.85,
    "the reward is above 85%, and more than three quarters of the groups"
    " teach nothing",
)

# %% [markdown]
# **A rate too high.** Ten times ours, twelve steps. There is no text to hold on to: the model learns from its own
# samples, and once these are rubbish, all rewards are 0, all groups are without variance, and there is no way back.

# %% tags=["nbval-ignore-output"]
broken = copy.deepcopy(base)
wild = GRPOConfig(num_prompts=16, learning_rate=1e-2)
crash = grpo.grpo(broken, ["sorting"], steps=12, config=wild, show=False)
fast, calm = ([row["reward"] for row in one.rows] for one in (crash, run))
labels = "rate 0.01", "rate 0.001, three domains"
show(
    *rl_rewards.draw_rates(
        dict(zip(labels, (fast, calm[:12]), strict=True))
    )
)
claim(
    "ten-times-the-rate",
    fast[-1] < 0.1 < 0.4 < fast[0],
    f"at ten times the rate the reward falls to {fast[-1]:.0%}",
)

# %% [markdown]
# ## What you have proved
#
# GRPO's advantage and gradient by hand are the package's. Sampling and training select the same keys. Half a minute
# of reward on three domains gives {claim:grpo-learns} more right answers, on freshly drawn problems; one mixed stage
# on five raises their share by {claim:mixed-raises-base}, with three seeds. A student of the specialists' right
# answers has {claim:student-against-specialists} right, and is no worse than they are. Dense and sparse learn alike.
# And a rising reward proves nothing by itself.
#
# **What the report does not say, and what we chose.** Group size, clip, divergence, rates: 8, 0.2 and 0.28, none,
# and 0.001 falling to a tenth. Updates from one batch of samples: one, so that the clip never acts. Whether
# advantages are divided by the deviation: yes, as in DeepSeek's first paper on GRPO. Whether the indexers go on
# learning in this phase, and from what: we train them on, by Eq. 4 (`train_indexer=False` freezes them, as prime-rl
# and NeMo RL do). How many samples a specialist gives: what is right of 128 prompts with four answers each, one for
# each prompt. What we could not show: that stages in a row collapse. At this size they lose
# {claim:domain-loses-after}.
#
# **What its successor says.** The report on V3.2, two months younger, fills some of the gaps. Advantages are *not*
# divided by the deviation. The KL term is the one above, k3 times $\rho$; TRL 1.10 has it by default
# (`use_bias_correction_kl=True`). An answer worse than its group's mean pushes no more once the policy has left it
# (`off_policy_mask_threshold`). And what the sampler chose, training repeats: the experts (`keep_routing`) and the
# tokens that top-p left over (`keep_sampling_mask`). All are settings of `GRPOConfig`.
#
# **Five questions**
# 1. A prompt is so hard that one answer in a hundred is right. What does GRPO learn from it with G = 8, what with G
#    = 64, and what would a rubric change?
# 2. Why must the tool's tokens be left out of the loss, and why may they not be left out of the sequence?
# 3. The student beats its teachers though it has only seen their texts. Where does that come from?
# 4. Sampler and trainer select different keys. The clip is at 0.2. What do you see in the table of measures, and
#    what do you do?
# 5. A colleague shows you a reward curve that rises to 1. Which three things do you ask for?
#
# <details><summary>Answers</summary>
#
# 1. With G = 8 twelve groups of thirteen have no right answer and teach nothing; with 64 about half have one. A
#    rubric gives rewards to what is nearly right, so groups have variance, and opens a door to cheating.
# 2. The model did not choose them, so making them likelier teaches it to invent results. But its own next tokens
#    depend on them, so they must be read.
# 3. Rejection sampling: the teachers' mistakes are gone. It imitates what they are when they are right, in all
#    domains, and what one domain teaches (be careful) helps in the others.
# 4. `logprob_difference` is large in the first update of every batch, and `clip_ratio` is not 0 there. Make the
#    sampler select as the trainer does: same numbers, same K, or hand the selection over.
# 5. Samples to read; an exam by another checker than the one that pays; and the share of groups without variance.
#
# </details>
#
# **Next**: [12](12_one_year_later.ipynb) leaves DSA behind and sets it beside other ways of making attention cheaper.
