"""GRPO's numbers against hand, enumeration and finite differences; rewards; and that all of it learns."""

import math

import pytest
import torch

from dsa.datasets import rl_domains, rl_symbols, rl_transcripts
from dsa.datasets.rl_symbols import read, write
from dsa.datasets.rl_transcripts import demonstration, run_with_tool
from dsa.training import grpo, rewards, rollout, sft
from dsa.training.grpo import GRPOConfig, Objective, advantages, averaged, divergence, token_losses
from rl import ALL, EXPERTS, says_one, seeded, shift_biases, small

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
        return averaged(
            token_losses(now, old, A, 0.2, 0.28)[0] + beta * divergence(now, old, reference), own, loss_type, 6
        )

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


def plain_k3(now, old, reference):
    """The estimate without the ratio, as GRPO had it first."""
    return (reference - now).exp() - (reference - now) - 1


def enumerated(estimate, moved):
    """Value and gradient of an estimate of KL(now || reference), averaged over what `old` samples, and the exact ones.

    Five tokens, so the average is a sum; `moved` is how far updates have taken the policy from its sampler.
    """
    start, step, home = (torch.randn(5, generator=seeded(n), dtype=torch.float64) for n in (1, 2, 3))
    logits = (start + moved * step).requires_grad_()
    old, now, reference = start.log_softmax(-1), logits.log_softmax(-1), home.log_softmax(-1)
    value, exact = (old.exp() * estimate(now, old, reference)).sum(), (now.exp() * (now - reference)).sum()
    gradient = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (value, exact))
    return value.item(), exact.item(), *gradient


@pytest.mark.parametrize("moved", [0.0, 0.3, 1.5])
def test_the_divergence_and_its_gradient_are_exact_on_average(moved):
    value, exact, gradient, exact_gradient = enumerated(divergence, moved)
    assert value == pytest.approx(exact, abs=1e-12)
    assert torch.allclose(gradient, exact_gradient, atol=1e-12) and exact_gradient.abs().max() > 0.1


def test_without_the_ratio_or_its_gradient_it_is_another_divergence():
    value, exact, gradient, exact_gradient = enumerated(plain_k3, 0.0)
    assert value == pytest.approx(exact), "on its own samples k3 has the right value ..."
    assert (gradient - exact_gradient).abs().max() > 0.05, "... and another gradient,"
    start, home = (torch.randn(5, generator=seeded(n), dtype=torch.float64) for n in (1, 3))
    turned = start.requires_grad_().log_softmax(-1), home.log_softmax(-1)
    (other,) = torch.autograd.grad((turned[1].exp() * (turned[1] - turned[0])).sum(), start)
    assert torch.allclose(gradient, other, atol=1e-12), "that of KL(reference || now)"
    value, exact, gradient, exact_gradient = enumerated(plain_k3, 1.5)
    assert abs(value - exact) > 0.1 and (gradient - exact_gradient).abs().max() > 0.1, "after updates both are wrong"

    def detached(now, old, reference):
        return (now - old).exp().detach() * plain_k3(now, old, reference)

    value, exact, gradient, exact_gradient = enumerated(detached, 1.5)
    assert value == pytest.approx(exact) and (gradient - exact_gradient).abs().max() > 0.05


def test_the_divergence_estimate_is_never_negative():
    now, old, reference = (torch.randn(50, generator=seeded(n)) for n in range(3))
    assert (divergence(now, old, reference) >= 0).all() and divergence(now, old, now).abs().max() == 0


def policy_only(**settings):
    """The objective without rewards or indexers: what is left is the divergence."""
    settings = {"num_prompts": 1, "beta": 1.0, "train_indexer": False} | settings
    draw = lambda g, n: rl_transcripts.sample_problems(g, ["maths"], n)  # noqa: E731
    return Objective(GRPOConfig(**settings), draw, lambda one: 0.0)


@pytest.mark.parametrize("left", [rl_symbols.VOCAB, 9])
def test_the_whole_loss_has_the_exact_divergence_and_gradient(left):
    """One completion of each possible token from a sampler that found all alike: a batch mean is an expectation.

    If a sampling mask has left only some tokens, it is the divergence of what is left of both distributions.
    """
    model, home = small(), small(7)
    prompt = rl_transcripts.prompts(rl_transcripts.sample_problems(seeded(), ["maths"], 1))  # (1, PROMPT)
    tokens = torch.cat([prompt.expand(left, -1), torch.arange(left)[:, None]], dim=1)
    own = torch.zeros_like(tokens, dtype=torch.bool)
    own[:, -1] = True
    mask = (torch.arange(rl_symbols.VOCAB) < left) | ~own[..., None]
    written = rollout.Rollout([None] * left, tokens, own, -math.log(left) * own, mask)
    with torch.no_grad():
        reference = rollout.logprobs_of(home(tokens), tokens, sampling_mask=mask)
    nothing = torch.zeros(len(tokens))
    objective = policy_only(num_generations=len(tokens))
    loss, measures = objective.loss(model, grpo.Graded(written, nothing, nothing, reference))
    now, there = (each(prompt)[0, -1, :left].log_softmax(-1) for each in (model, home))
    exact = (now.exp() * (now - there.detach())).sum()
    assert [loss.item(), measures["kl"]] == pytest.approx([exact.item()] * 2, rel=1e-5)
    for p, found, right in zip(model.parameters(), *(gradients(model, each) for each in (loss, exact)), strict=True):
        assert (found is None) == (right is None), "no indexer is trained"
        assert found is None or torch.allclose(found, right, atol=1e-5 * max(1.0, right.abs().max())), p.shape


def gradients(model, loss):
    """Of each parameter, or None."""
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("kept", [True, False])
def test_policy_and_reference_keep_the_sampling_mask(kept):
    settings = {"num_prompts": 3, "num_generations": 4, "top_p": 0.7, "keep_sampling_mask": kept, "beta": 0.1}
    model = small()
    draw = lambda g, n: rl_transcripts.sample_problems(g, ALL, n)  # noqa: E731
    objective = Objective(GRPOConfig(**settings), draw, says_one, small())
    graded = objective.collect(model, seeded())
    _, measures = objective.loss(model, graded)
    if kept:
        assert measures["logprob_difference"] < 1e-4 and measures["kl"] < 1e-6 and measures["clip_ratio"] == 0
    else:
        assert measures["logprob_difference"] > 0.2, "the policy is held to have drawn from everything"


@pytest.mark.parametrize("kept", [True, False])
def test_experts_are_replayed_in_each_update(kept):
    """The same experts give the same probabilities again, though the routers would choose others now."""
    model = small(**EXPERTS)
    settings = GRPOConfig(num_prompts=3, num_generations=4, keep_routing=kept, beta=0.1)
    objective = Objective(settings, lambda g, n: rl_transcripts.sample_problems(g, ALL, n), says_one, small(**EXPERTS))
    graded = objective.collect(model, seeded())
    assert (graded.rollout.routing is not None) == kept
    shift_biases(model)
    loss, measures = objective.loss(model, graded)
    assert (measures["logprob_difference"] < 1e-4) == kept
    loss.backward()
    for gate in model.gates():
        assert gate.replay is None and gate.weight.grad.abs().max() > 0, "routers still learn how much experts count"


def test_answers_that_were_bad_and_have_been_left_push_no_more():
    own = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 1, 0], [0, 1, 1]]).bool()
    old = torch.zeros(4, 3)
    now = torch.tensor([[-9, -0.6, -0.2], [-9, -0.8, -0.4], [0, -0.6, -9], [0, -0.8, -0.4]])
    advantage = torch.tensor([-1.0, -1, -1, 1])
    assert grpo.on_policy(now, old, own, advantage, 0.5).tolist() == [True, False, False, True]
    assert grpo.on_policy(-now, old, own, advantage, 0.5).all(), "what became likelier pushes on"


def test_masked_answers_leave_the_loss_and_the_divergence_stays():
    model = small()
    model.attention = "dense"
    off = {"num_prompts": 3, "num_generations": 6, "max_completion_length": 6}
    plain, masking = (
        Objective(GRPOConfig(**off, **also), lambda g, n: rl_transcripts.sample_problems(g, ALL, n), says_one, small(7))
        for also in ({}, {"off_policy_mask_threshold": 0.3})
    )
    graded = plain.collect(model, seeded())
    fresh, measures = masking.loss(model, graded)
    assert torch.equal(fresh, plain.loss(model, graded)[0]) and measures["off_policy_masked"] == 0
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    now = rollout.logprobs_of(model(graded.rollout.tokens), graded.rollout.tokens)
    own, A = graded.rollout.completion_mask, graded.advantages
    kept = grpo.on_policy(now, graded.rollout.logprobs, own, A, 0.3)
    assert 0 < (~kept).sum() < (A < 0).sum(), "the test wants some of each"
    losses = token_losses(now, graded.rollout.logprobs, A)[0]
    gone = (losses * own)[~kept].sum() / own.sum()
    moved, measures = masking.loss(model, graded)
    assert torch.allclose(plain.loss(model, graded)[0] - moved, gone, atol=1e-6)
    assert measures["off_policy_masked"] == pytest.approx((~kept).float().mean().item())
    with_reference = Objective(
        GRPOConfig(**off, off_policy_mask_threshold=0.3, beta=0.5), masking.draw, says_one, small(7)
    )
    held = with_reference.loss(model, graded)[0] - moved
    every = divergence(now, graded.rollout.logprobs, graded.reference)[own].mean()
    assert torch.allclose(held, 0.5 * every, rtol=1e-4), "the divergence holds masked answers too"


def test_impossible_settings_are_refused():
    for settings, words in [
        ({"num_generations": 1}, "at least 2"), ({"temperature": 0.0}, "above 0"), ({"epsilon": 1.5}, "epsilon=1.5"),
        ({"scale_rewards": "yes"}, "use one of group"), ({"loss_type": "ppo"}, "use one of grpo"),
        ({"num_iterations": 0}, "at least 1"), ({"epsilon_high": -0.1}, "epsilon_high=-0.1"),
        ({"beta": -1.0}, "beta=-1.0"), ({"num_prompts": 0}, "at least 1"),
        ({"off_policy_mask_threshold": 0.0}, "off_policy_mask_threshold=0.0"), ({"top_p": 0.0}, "top_p=0.0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            GRPOConfig(**settings)
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


@pytest.mark.parametrize("learning", [True, False])
def test_indexers_learn_beside_the_policy_or_stay_frozen(learning):
    """Learning is Eq. 4 with its inputs detached: the policy takes the same first step either way."""
    settings = {"num_prompts": 3, "num_generations": 4, "max_completion_length": 4}
    given = {"reward_funcs": [says_one], "show": False, "steps": 1}
    trained, frozen = small(), small()
    grpo.grpo(trained, config=GRPOConfig(**settings, train_indexer=learning), **given)
    grpo.grpo(frozen, config=GRPOConfig(**settings, train_indexer=False), **given)
    started = dict(small().named_parameters())
    for name, p in trained.named_parameters():
        if ".indexer." in name:
            assert torch.equal(p, started[name]) != learning, name
        else:
            assert torch.allclose(p, dict(frozen.named_parameters())[name], atol=1e-6), name
    assert any(not torch.equal(p, started[name]) for name, p in frozen.named_parameters())


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
