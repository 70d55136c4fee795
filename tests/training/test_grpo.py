"""GRPO's numbers against hand and finite differences; sampling with tools; rewards; and that all of it learns."""

import math

import pytest
import torch

import dsa
from course.experiments import rl_base_model
from dsa.datasets import rl_domains, rl_symbols, rl_transcripts
from dsa.datasets.rl_domains import DOMAINS
from dsa.datasets.rl_symbols import DIGITS, PAD, read, write
from dsa.datasets.rl_transcripts import LENGTH, PROMPT, demonstration, run_with_tool
from dsa.model.transformer import DecoderOutput
from dsa.training import grpo, rewards, rollout, sft
from dsa.training.grpo import GRPOConfig, Objective, advantages, averaged, divergence, token_losses

ALL = tuple(DOMAINS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(seed=0, sparse=True):
    """A random model of the domains' alphabet."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 2, "intermediate_size": 48}
    indexer = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 6} if sparse else {}
    model = dsa.Transformer(rl_base_model.dense_config().replace(**sizes, **indexer))
    model.reset_parameters(seed)
    return model.eval()


# the objective ------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    reward = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])
    assert advantages(reward, 4, "none").tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    deviation = math.sqrt(4 * 0.25 / 3)  # of the first group, as torch counts it
    assert torch.allclose(advantages(reward, 4)[:2], torch.tensor([0.5, -0.5]) / (deviation + 1e-4))
    assert (advantages(reward, 4)[4:] == 0).all(), "a group without variance teaches nothing"
    whole = reward.std()
    assert torch.allclose(advantages(reward, 4, "batch")[0], 0.5 / (whole + 1e-4))


def test_the_clipped_objective_by_hand():
    ratio = torch.tensor([[1.0, 1.5, 0.5, 1.25], [1.0, 1.5, 0.5, 0.75]])
    losses, clipped = token_losses(ratio.log(), torch.zeros(2, 4), torch.tensor([2.0, -1.0]), 0.2, 0.3)
    assert torch.allclose(losses, torch.tensor([[-2.0, -2.6, -1.0, -2.5], [1.0, 1.5, 0.8, 0.8]]))
    assert clipped.tolist() == [[False, True, False, False], [False, False, True, True]]
    same, _ = token_losses(ratio.log(), torch.zeros(2, 4), torch.tensor([2.0, -1.0]), 0.2)
    assert torch.allclose(same[0, 3], torch.tensor(-2.4)), "without epsilon_high both bounds are epsilon"


def test_the_gradient_is_the_policy_gradient_where_nothing_has_moved():
    logits = torch.randn(2, 5, 7, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(7, (2, 5), generator=seeded(2))
    now = rollout.logprobs_of(logits, tokens)
    A, own = torch.tensor([1.5, -0.5]).double(), torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    loss = averaged(token_losses(now, now.detach(), A, 0.2)[0], own, "dapo", 3)
    (found,) = torch.autograd.grad(loss, logits)
    by_hand = torch.zeros_like(logits)  # d/dz of -A log softmax(z)[token] is A (softmax(z) - onehot)
    for b, t in own.nonzero().tolist():
        by_hand[b, t - 1] = A[b] * (logits[b, t - 1].softmax(-1) - torch.eye(7)[tokens[b, t]]) / 5
    assert torch.allclose(found, by_hand, atol=1e-12)


@pytest.mark.parametrize("loss_type", grpo.LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_gradient_agrees_with_finite_differences(loss_type, beta):
    chance = seeded(3)
    old, reference = (torch.randn(3, 6, generator=chance, dtype=torch.float64) for _ in range(2))
    now = (old + 0.3 * torch.randn(3, 6, generator=chance, dtype=torch.float64)).requires_grad_()
    own = torch.rand(3, 6, generator=chance) < 0.7
    A = torch.tensor([1.0, -2.0, 0.5]).double()

    def loss(now):
        return averaged(token_losses(now, old, A, 0.2, 0.28)[0] + beta * divergence(now, reference), own, loss_type, 6)

    (found,) = torch.autograd.grad(loss(now), now)
    for b in range(3):
        for t in range(6):
            step = torch.zeros(3, 6, dtype=torch.float64)
            step[b, t] = 1e-6
            with torch.no_grad():
                finite = (loss(now + step) - loss(now - step)) / 2e-6
            assert abs(float(finite - found[b, t])) < 1e-8
    assert (found[~own] == 0).all(), "prompt, tool and padding are not the model's"


def test_averages_differ_as_they_say():
    losses, own = torch.ones(2, 4), torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    losses[1] = 3
    assert averaged(losses, own, "grpo", 8) == 2 and averaged(losses, own, "dapo", 8) == 2.5
    assert averaged(losses, own, "dr_grpo", 8) == 10 / 16


def test_the_divergence_estimate_is_right_on_average_and_never_negative():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    estimate = divergence(p.log(), q.log())
    assert (estimate >= 0).all() and divergence(p.log(), p.log()).abs().max() == 0
    assert torch.allclose((p * estimate).sum(), (p * (p / q).log()).sum(), atol=1e-6)


# sampling -----------------------------------------------------------------------------------------------------------


def test_samples_are_what_the_model_and_the_tool_said():
    model = small()
    problems = rl_transcripts.sample_problems(seeded(), ALL, 25)
    found = rollout.sample(model, problems, seeded(4), temperature=1.5)
    assert torch.equal(found.tokens[:, :PROMPT], rl_transcripts.prompts(problems))
    assert not found.own[:, :PROMPT].any() and found.tokens.shape[1] <= LENGTH
    for one, tokens, own in zip(found.transcripts(), found.tokens, found.own, strict=True):
        said = list[int]()
        waiting = list[int]()
        for token, mine in zip(one.tokens, one.own, strict=True):
            assert mine != bool(waiting), "the tool speaks at once, and nobody else meanwhile"
            if mine:
                said.append(token)
                waiting = list(rl_domains.tool_reply(one.problem, tuple(said)))
            else:
                assert token == waiting.pop(0)
        after = PROMPT + len(one.tokens)
        assert (tokens[after:] == PAD).all() and not own[after:].any()
    assert (found.lengths == torch.tensor([len(one.completion) for one in found.transcripts()])).all()


class Scripted(torch.nn.Module):
    """A model that writes worked transcripts by heart, those of the tool's turns included."""

    def __init__(self, problems):
        super().__init__()
        self.rows = [[*demonstration(problem).tokens, *[PAD] * LENGTH] for problem in problems]

    def new_cache(self, batch, capacity):
        self.turn = -1

    def run_layers(self, tokens, cache):
        self.turn += 1
        return DecoderOutput(tokens[:, :, None], [], [])

    def logits(self, x):
        wanted = torch.tensor([row[self.turn] for row in self.rows])
        return 50.0 * torch.nn.functional.one_hot(wanted, rl_symbols.VOCAB)[:, None]


def test_a_right_script_is_recognised_as_right():
    problems = rl_transcripts.sample_problems(seeded(5), ALL, 30)
    found = rollout.sample(Scripted(problems), problems, seeded())
    assert [one.completion for one in found.transcripts()] == [rl_domains.solve(p) for p in problems]
    assert [one.tokens for one in found.transcripts()] == [demonstration(p).tokens for p in problems]
    assert all(one.correct for one in found.transcripts()) and found.ended.all()


def test_sampling_is_repeatable_and_leaves_the_model_as_it_was():
    model = small().train()
    problems = rl_transcripts.sample_problems(seeded(), ALL, 6)
    first, again, other = (rollout.sample(model, problems, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)
    assert model.training
    greedy = [rollout.sample(model, problems, seeded(s), temperature=0).tokens for s in (1, 2)]
    assert torch.equal(*greedy)


@pytest.mark.parametrize("attention", ["sparse", "dense", "window"])
def test_training_reads_what_sampling_wrote(attention):
    """The known trap: the same keys are selected token by token and all at once."""
    model = small()
    model.attention = attention
    found = rollout.sample(model, rl_transcripts.sample_problems(seeded(), ALL, 20), seeded(1))
    same = rollout.gap(model, found)
    assert same["logprob"] < 1e-4 and same["ratio"] < 1e-5
    if attention == "sparse":
        model.top_k = 3
        assert rollout.gap(model, found)["ratio"] > 1e-3, "another K must show"


def test_impossible_settings_are_refused():
    for settings, words in [
        ({"num_generations": 1}, "at least 2"), ({"temperature": 0.0}, "above 0"), ({"epsilon": 1.5}, "epsilon=1.5"),
        ({"scale_rewards": "yes"}, "use one of group"), ({"loss_type": "ppo"}, "use one of grpo"),
        ({"num_iterations": 0}, "at least 1"), ({"epsilon_high": -0.1}, "epsilon_high=-0.1"),
        ({"beta": -1.0}, "beta=-1.0"), ({"num_prompts": 0}, "at least 1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            GRPOConfig(**settings)
    with pytest.raises(ValueError, match="temperature=-1"):
        rollout.sample(small(), rl_transcripts.sample_problems(seeded(), ALL, 1), seeded(), temperature=-1)
    with pytest.raises(ValueError, match="max_completion_length=0"):
        rollout.sample(small(), rl_transcripts.sample_problems(seeded(), ALL, 1), seeded(), max_completion_length=0)
    with pytest.raises(ValueError, match="no transcript"):
        sft.sft(small(), [])


# rewards ------------------------------------------------------------------------------------------------------------


def sorting(text):
    problem = rl_domains.Problem("sorting", 1, False, write("↓ D 4 8 2"), {})
    return run_with_tool(problem, write(text))


def test_rewards_by_hand():
    rubric = rewards.SORTING_RUBRIC
    assert rewards.verified(sorting("= 2 4 8 .")) == rubric(sorting("= 2 4 8 .")) == 1
    assert rubric.grades(sorting("= 4 8 2 .")) == {"digits only": 1, "in order": 0, "same items": 1}
    assert rubric(sorting("= 4 8 2 .")) == pytest.approx(3 / 5)
    assert rubric.grades(sorting("= 2 4 .")) == {"digits only": 1, "in order": 1, "same items": pytest.approx(2 / 3)}
    assert rubric(sorting("= 2 4 8")) == 0, "who does not end has not answered"
    problem = rl_domains.Problem("brackets", 1, False, write("§ D ( [ ]"), {})
    found = [run_with_tool(problem, write(text)) for text in ("= ) .", "= ( .", "= ] .", "= ) ) .")]
    assert [rewards.nothing_closed_wrongly(one) for one in found] == [1, 1, 0, 0]
    assert [rewards.verified(one) for one in found] == [1, 0, 0, 0]
    penalty = rewards.LengthPenalty(free=3, per_token=0.1, most=0.15)
    assert [penalty(sorting(text)) for text in ("= 1 .", "= 1 2 .", "= 1 2 3 .")] == pytest.approx([0, -0.1, -0.15])
    both = rewards.total([rewards.verified, penalty], [2.0, 1.0])
    assert both(sorting("= 2 4 8 .")) == pytest.approx(1.85)
    for functions, weights, words in [((), None, "empty"), ((penalty,), (1.0, 2.0), "2 reward_weights for 1")]:
        with pytest.raises(ValueError, match=words):
            rewards.total(functions, weights)


@pytest.mark.parametrize("name", ALL)
def test_the_mode_is_kept_by_solutions_and_by_no_others(name):
    for problem in rl_transcripts.sample_problems(seeded(), [name], 20):
        assert rewards.mode_kept(demonstration(problem)) == 1
    direct, thinking = (
        rl_domains.Problem("sorting", 1, t, write(f"↓ {m} 4 8 2"), {}) for t, m in ((False, "D"), (True, "T"))
    )
    thought = write("4 : 2 8 = 2 4 8 .")
    assert rewards.mode_kept(run_with_tool(thinking, thought)) == 1
    assert rewards.mode_kept(run_with_tool(direct, thought)) == 0
    assert not run_with_tool(direct, thought).correct and run_with_tool(thinking, write("= 2 4 8 .")).correct


# learning -----------------------------------------------------------------------------------------------------------


def says_one(one):
    """Rewards the digit 1 anywhere: easy to find for a random model."""
    return float(DIGITS[1] in one.completion)


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_a_simple_reward_is_learned(attention):
    model = small()
    model.attention = attention
    config = GRPOConfig(num_prompts=6, num_generations=6, max_completion_length=6, learning_rate=3e-3)
    run = grpo.grpo(model, ["maths"], steps=12, config=config, reward_funcs=[says_one], show=False)
    rows = [row["reward"] for row in run.rows]
    assert sum(rows[-3:]) > sum(rows[:3]) + 0.6
    assert all(row["logprob_difference"] < 1e-4 for row in run.rows), "one update a batch: the ratio is 1"


def test_samples_are_used_as_often_as_asked_and_the_reference_holds_back():
    drawn = []

    def draw(generator, count):
        drawn.append(count)
        return rl_transcripts.sample_problems(generator, ALL, count)

    config = GRPOConfig(num_prompts=3, num_generations=8, num_iterations=3, beta=0.5, epsilon=0.01)
    model = small()
    objective = Objective(config, draw, says_one, small(7))
    found = [objective(model, seeded(n))[1] for n in range(6)]
    assert drawn == [3, 3] and found[0]["kl"] > 0 and found[0]["clip_ratio"] == 0
    objective(model, seeded(9))  # a fresh batch, and the model moves after it
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    moved = objective(model, seeded(10))[1]
    assert len(drawn) == 3 and moved["clip_ratio"] > 0 and moved["kl"] > found[0]["kl"]


def test_a_killed_run_goes_on_between_two_batches_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "SAVED_EVERY", 4)  # batches last three updates: saved after six
    config = GRPOConfig(num_prompts=2, num_generations=4, num_iterations=3, max_completion_length=4, beta=0.1)
    given = {"names": ["maths"], "steps": 9, "config": config, "reward_funcs": [says_one], "show": False}
    whole, stopped, batches = small(), small(), []
    run = grpo.grpo(whole, **given)

    def stop(graded):
        batches.append(graded)
        if len(batches) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grpo.grpo(stopped, **given, work=tmp_path, watch=stop)
    resumed, later = small(), []
    assert grpo.grpo(resumed, **given, work=tmp_path, resume=True, watch=later.append).rows == run.rows
    assert len(later) == 1, "two batches of samples were done before"
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="holds another run"):
        grpo.grpo(small(), **given | {"names": ["code"]}, work=tmp_path, resume=True)


def test_only_the_divergence_teaches_the_indexers():
    model = small()
    objective = Objective(
        GRPOConfig(num_prompts=3, num_generations=3), lambda g, n: rl_transcripts.sample_problems(g, ALL, n), says_one
    )
    graded = objective.collect(model, seeded())
    loss, _ = objective.loss(model, graded)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.indexer_parameters())
    model.zero_grad(set_to_none=True)
    now = rollout.logprobs_of(model(graded.rollout.tokens), graded.rollout.tokens)
    token_losses(now, graded.rollout.logprobs, graded.advantages)[0].sum().backward()
    assert all(p.grad is None for p in model.indexer_parameters())


def test_rejection_keeps_right_answers_only_and_a_student_learns_them():
    problems = rl_transcripts.sample_problems(seeded(2), ["search"], 16)
    written = [demonstration(problem) for problem in problems]
    model = small()
    before = sft.SFTObjective(written)(model, seeded())[1]["language"]
    run = sft.sft(model, written, steps=15, size=16, learning_rate=1e-2, show=False)
    assert run.rows[-1]["language"] < 0.6 * before
    kept = sft.rejection_sample(model, ["search"], num_prompts=8, num_generations=3, keep=lambda one: True)
    assert len(kept) == 8 and not sft.rejection_sample(small(), ["sorting"], num_prompts=4)
    assert read(written[0].problem.prompt).startswith("⌕")
