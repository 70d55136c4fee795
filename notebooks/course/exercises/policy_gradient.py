"""The exercises of chapter 11: compare answers, push with measure, check without a leak, and stay near home.

Each wrong answer is one that trains: without an error, and towards something else.
"""

import torch
from torch import Tensor

from course.exercises.exercise import Exercise, checker, require
from dsa.training import grpo


def my_advantages(rewards: Tensor) -> Tensor:
    """Rewards (groups, G) -> advantages (groups, G).

    Less the group's mean, over the group's deviation plus 1e-4.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


def _mean_of_all(rewards: Tensor) -> Tensor:
    """Takes the mean over the whole batch: in an easy group even the wrong answers are praised."""
    return (rewards - rewards.mean()) / (rewards.std(1, keepdim=True) + 1e-4)


def _no_floor(rewards: Tensor) -> Tensor:
    """Divides by a deviation that may be zero: one group without variance makes the whole step nan."""
    return (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)


def _only_scaled(rewards: Tensor) -> Tensor:
    """Subtracts nothing: no answer is ever discouraged."""
    return rewards / (rewards.std(1, keepdim=True) + 1e-4)


def _across_groups(rewards: Tensor) -> Tensor:
    """Takes mean and deviation down the columns: answers to different questions are compared."""
    return (rewards - rewards.mean(0)) / (rewards.std(0) + 1e-4)


def _check_advantages(answer) -> None:
    generator = torch.Generator().manual_seed(10)
    given = torch.rand(5, 4, generator=generator)
    given[2] = 1.0
    found = answer(given.clone())
    require(isinstance(found, Tensor), f"return a tensor, not a {type(found).__name__}")
    require(found.shape == (5, 4), f"5 groups of 4 give shape (5, 4), yours is {tuple(found.shape)}")
    require(not found.isnan().any(), "a group whose rewards are all equal gives nan: add 1e-4 to the deviation")
    require(float(found[2].abs().max()) < 1e-3, "a group whose rewards are all equal must get advantages of 0")
    low = [n for n in range(5) if abs(float(found[n].sum())) > 1e-3]
    require(not low, f"the advantages of group {low[:1]} do not sum to 0: subtract that group's own mean")
    right = grpo.advantages(given.flatten(), 4).view(5, 4)
    gap = float((found - right).abs().max())
    require(gap < 1e-3, f"they differ from (reward - mean) / (deviation + 1e-4) by up to {gap:.2f}")


def my_gain(ratio, advantage, low, high) -> Tensor:
    """What each token contributes: ratio (n,), advantage (n,) -> (n,).

    The ratio counts from 1 - low to 1 + high; the smaller one is taken.
    """
    held = ratio.clamp(1 - low, 1 + high)
    return torch.minimum(ratio * advantage, held * advantage)


def _clip_alone(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Clips always: a right answer whose probability has fallen far gets no gradient to come back."""
    return ratio.clamp(1 - low, 1 + high) * advantage


def _larger(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Takes the larger of the two: no limit where one is needed."""
    return torch.maximum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def _same_bounds(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Uses `low` on both sides."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + low) * advantage)


def _smaller_ratio(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Takes the smaller ratio before it multiplies: wrong for negative advantages."""
    return torch.minimum(ratio, ratio.clamp(1 - low, 1 + high)) * advantage


def _check_gain(answer) -> None:
    ratio, advantage = (torch.tensor(values) for values in zip(*_CASES, strict=True))
    found = answer(ratio.clone(), advantage.clone(), 0.2, 0.28)
    require(getattr(found, "shape", None) == ratio.shape, f"{len(ratio)} tokens give shape ({len(ratio)},)")
    right = -grpo.token_losses(ratio.log()[None], torch.zeros(1, len(ratio)), torch.ones(1), 0.2, 0.28)[0][0]
    for n, (r, A) in enumerate(_CASES):
        held = min(max(r, 0.8), 1.28)
        wanted = min(r * A, held * A)
        require(
            abs(float(found[n]) - wanted) < 1e-4,
            f"ratio {r}, advantage {A:+}, low 0.2, high 0.28 contributes {wanted:.2f}, yours {float(found[n]):.2f}",
        )
    alone = answer(ratio.clone(), torch.ones_like(ratio), 0.2, 0.28)
    require(torch.allclose(alone, right, atol=1e-4), "with advantage 1 it differs from the package's")


_CASES = ((1.0, 2.0), (1.5, 2.0), (0.5, 2.0), (1.25, 2.0), (1.0, -1.0), (1.5, -1.0), (0.5, -1.0), (0.9, -1.0))


def my_checker(items: list, answer: list) -> bool:
    """Whether `answer` is `items` in order of their last digits.

    Whole numbers; those with the same last digit may come in any order.
    """
    left = list(items)
    for number in answer:
        if number not in left:
            return False
        left.remove(number)
    ends = [number % 10 for number in answer]
    return not left and ends == sorted(ends)


def _one_right_answer(items: list, answer: list) -> bool:
    """Compares with one right answer: refuses the others, which are as right."""
    return answer == sorted(items, key=lambda number: number % 10)


def _only_order(items: list, answer: list) -> bool:
    """Looks at the order alone: one number, or none, is always in order."""
    ends = [number % 10 for number in answer]
    return ends == sorted(ends)


def _same_sum(items: list, answer: list) -> bool:
    """Compares length and sum: other numbers can have them too."""
    return _only_order(items, answer) and len(items) == len(answer) and sum(items) == sum(answer)


def _as_sets(items: list, answer: list) -> bool:
    """Compares sets: a repeated number may be left out, or written ten times."""
    return _only_order(items, answer) and set(items) == set(answer)


def _only_members(items: list, answer: list) -> bool:
    """Asks whether all were there and in order, and never whether any is missing."""
    return _only_order(items, answer) and all(number in items for number in answer)


def _check_checker(answer) -> None:
    items = [41, 12, 12, 71]
    cases = {
        "one right order": (items, [41, 71, 12, 12], True),
        "another right order": (items, [71, 41, 12, 12], True),
        "a list of one": ([30], [30], True),
        "the list as it was": (items, items, False),
        "nothing at all": (items, [], False),
        "one number of the list": (items, [12], False),
        "other numbers with the same sum": (items, [31, 81, 12, 12], False),
        "a repeated number written once": (items, [41, 71, 12], False),
        "a number written too often": ([41, 12, 71], [41, 71, 12, 12], False),
        "a repeated number in another's place": ([41, 12, 71, 71], [41, 71, 12, 12], False),
    }
    for name, (given, said, wanted) in cases.items():
        found = answer(list(given), list(said))
        require(isinstance(found, bool), f"return True or False, not {found!r}")
        verb = "refused" if wanted else "accepted"
        require(found == wanted, f"for {given} the answer {said} ({name}) was {verb}")


def my_divergence(now: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """The estimate k3, times the ratio, for tokens that `old` sampled.

    Log-probabilities (n,), (n,), (n,) -> (n,), none of them negative.
    """
    apart = reference - now
    return (now - old).exp() * (apart.exp() - apart - 1)


def _no_ratio(now: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """Leaves the ratio out: the gradient is another divergence's, and after an update so is the value."""
    apart = reference - now
    return apart.exp() - apart - 1


def _detached(now: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """Treats the ratio as a constant weight: the value is right, and half of the gradient is missing."""
    return (now - old).exp().detach() * _no_ratio(now, old, reference)


def _ratio_turned(now: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """The importance ratio upside down: right only while nothing has moved."""
    return (old - now).exp() * _no_ratio(now, old, reference)


def _difference(now: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """The plain log-ratio: right on average, but negative for half of the tokens, and very noisy."""
    return (now - old).exp() * (now - reference)


def _other_way(now: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """`now` and `reference` exchanged within k3: it estimates something else."""
    apart = now - reference
    return (now - old).exp() * (apart.exp() - apart - 1)


def _square(now: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """Half the squared log-ratio: never negative, and wrong on average once the two are far apart."""
    return (now - old).exp() * (now - reference) ** 2 / 2


def _check_divergence(answer) -> None:
    start, home = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.1, 0.2, 0.7]).log()
    for moved, when in ((0.0, "before any update"), (1.0, "after an update")):
        logits = (start + moved * torch.tensor([0.0, 1.0, -0.5])).requires_grad_()
        now = logits.log_softmax(-1)
        found = answer(now, start, home)
        require(getattr(found, "shape", None) == (3,), "3 tokens give 3 estimates: return a tensor of shape (3,)")
        least = found.min().item()
        require(least > -1e-6, f"an estimate is negative ({least:.2f}): k3 never is")
        exact, mean = (now.exp() * (now - home)).sum(), (start.exp() * found).sum()
        require(
            abs(mean.item() - exact.item()) < 1e-4,
            f"averaged over tokens sampled from `old` it gives {mean.item():.2f} {when}; the divergence is "
            f"{exact.item():.2f}",
        )
        require(found.requires_grad, "no gradient reaches `now`: nothing may be detached")
        slope, right = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (mean, exact))
        require(
            torch.allclose(slope, right, atol=1e-4),
            f"the value is right, its gradient is not: {_listed(slope)} {when}, where the divergence's own is "
            f"{_listed(right)}. Is the ratio there, and may the gradient pass through it?",
        )


def _listed(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:+.2f}" for value in values.tolist()) + ")"


EXERCISES = (
    Exercise(
        "The group is the baseline", 1, 10,
        "Turn the rewards of several groups into advantages, as GRPO does. The deviation is torch's own `std`, which "
        "divides by G - 1. A group in which all rewards are equal must come out as zeros, and must not spoil the "
        "others.",
        ("A row is a group: mean and deviation run along dimension 1.",
         "`keepdim=True` keeps the shape (groups, 1), so that it can be subtracted from each answer.",
         "Add 1e-4 to the deviation *before* you divide."),
        my_advantages, (_mean_of_all, _no_floor, _only_scaled, _across_groups), _check_advantages,
    ),
    Exercise(
        "Push, but not too far", 2, 10,
        "Write GRPO's clipped objective for each token. The limits are not symmetric, and a negative advantage turns "
        "everything round: think about which of the two products is the smaller one.",
        ("Two products: the ratio times the advantage, and the clipped ratio times the advantage.",
         "The minimum is taken of the products, not of the ratios.",
         "`ratio.clamp(1 - low, 1 + high)`, then `torch.minimum`."),
        my_gain, (_clip_alone, _larger, _same_bounds, _smaller_ratio), _check_gain,
    ),
    Exercise(
        "A checker without a leak", 2, 15,
        "Numbers are to be put in order of their last digits. There are several right answers, so you cannot compare "
        "with one: your checker must apply the rule. Ours tries what a policy under training would try, answers that "
        "please a careless checker, and it tries right answers too: a checker that refuses those teaches as badly.",
        ("Two questions: is it in order, and is it the same collection?",
         "The same collection means: each number equally often. Sets forget how often.",
         "Cross out each number of the answer in a copy of `items`; in the end nothing may be left."),
        my_checker, (_one_right_answer, _only_order, _same_sum, _as_sets, _only_members), _check_checker,
    ),
    Exercise(
        "How far from home?", 3, 20,
        "With `beta > 0` the loss holds the model near the one it started from, the `reference`. How far away it is "
        "must be estimated from the sampled tokens alone: KL(now || reference). Write the estimate called k3, never "
        "negative and right on average, and multiply it by the ratio of `now` to `old`, the policy that sampled. The "
        "value needs the ratio once updates have moved `now` away. The gradient needs it always: autograd does not "
        "know that the tokens were drawn from what it differentiates, so k3 alone gets the gradient of KL(reference || "
        "now).",
        ("Call `reference - now` d. The plain estimate is -d: right on average, but half of its values are negative. "
         "What can be added that is 0 on average under `now`? The mean of exp(d) is 1.",
         "exp(d) - 1 - d: exp is above its tangent, so it is never negative.",
         "A mean over tokens of `old` becomes one over tokens of `now` by the weight p_now / p_old, that is "
         "`(now - old).exp()`. Do not detach it: as `now` moves, so does the weight."),
        my_divergence, (_no_ratio, _detached, _ratio_turned, _difference, _other_way, _square), _check_divergence,
    ),
)  # fmt: skip
check = checker(*EXERCISES)
