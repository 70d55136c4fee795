"""The exercises of chapter 10: route, balance, divide the work, and count what fits.

The wrong answers run without a complaint. The first of them, dropped groups masked with 0, was in published code for a
year: a biased score may be negative.
"""

import torch
from torch import Tensor

from course.exercises.exercise import Exercise, checker, require
from dsa.model.config import Config
from dsa.model.moe import route


def my_route(scores, bias, groups: int, kept: int, k: int):
    """One token's experts: scores (E,), bias (E,) -> (ids, weights).

    Scores lie in 0 ... 1. The ids ascend; the weights sum to 1.
    """
    biased = (scores + bias).view(groups, -1)
    value = biased.topk(2, dim=-1).values.sum(-1)
    dropped = value.argsort(descending=True)[kept:]
    biased[dropped] = float("-inf")
    chosen = sorted(biased.flatten().topk(k).indices.tolist())
    weights = scores[chosen]
    return chosen, (weights / weights.sum()).tolist()


def _routed(scores, bias, groups, kept, k, fill=float("-inf"), best=2, weigh=None) -> tuple[list[int], list[float]]:
    biased = (scores + bias).view(groups, -1).clone()
    biased[biased.topk(best, dim=-1).values.sum(-1).argsort(descending=True)[kept:]] = fill
    chosen = sorted(biased.flatten().topk(k).indices.tolist())
    weights = (scores if weigh is None else weigh)[chosen]
    return chosen, (weights / weights.sum()).tolist()


def _mask_with_0(scores: Tensor, bias: Tensor, groups: int, kept: int, k: int):
    """Masks dropped groups with 0: where biases are negative, a dropped expert wins."""
    return _routed(scores, bias, groups, kept, k, fill=0.0)


def _best_one(scores: Tensor, bias: Tensor, groups: int, kept: int, k: int):
    """Scores a group by its best expert; it is the sum of the best two."""
    return _routed(scores, bias, groups, kept, k, best=1)


def _bias_weighs(scores: Tensor, bias: Tensor, groups: int, kept: int, k: int):
    """Weighs with the biased scores: the balancing then changes what the layer computes."""
    return _routed(scores, bias, groups, kept, k, weigh=scores + bias)


def _no_groups(scores: Tensor, bias: Tensor, groups: int, kept: int, k: int):
    """Chooses among all experts and forgets the groups."""
    return _routed(scores, bias, groups, groups, k)


def _check_route(answer) -> None:
    sizes = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    config = Config.v32_exp().replace(**sizes, routed_scaling_factor=1.0)
    generator = torch.Generator().manual_seed(9)
    for case in range(40):
        logits = torch.randn(16, generator=generator)
        bias = torch.randn(16, generator=generator) * 0.3 - (1.5 if case % 2 else 0.0)
        chosen, weights = route(logits[None], bias, config)
        order = chosen[0].argsort()
        ids, shares = answer(logits.sigmoid(), bias.clone(), 4, 2, 3)
        ids = [int(i) for i in ids]
        right = chosen[0][order].tolist()
        require(ids == right, f"case {case}: you chose {ids}, the router {right}")
        gap = max(abs(a - float(b)) for a, b in zip(shares, weights[0][order], strict=True))
        require(gap < 1e-4, f"case {case}: the experts are right, and a weight is off by {gap:.3f}")


def my_balance(bias: Tensor, load: Tensor, speed: float) -> Tensor:
    """The bias (E,) after a step in which experts got load (E,) tokens."""
    return bias + speed * (load.double().mean() - load).sign()


def _by_amount(bias: Tensor, load: Tensor, speed: float) -> Tensor:
    """Moves in proportion to the gap: one step with many tokens then throws the bias out of range."""
    return bias + speed * (load.double().mean() - load)


def _reversed(bias: Tensor, load: Tensor, speed: float) -> Tensor:
    """Raises the bias of experts that have too many already."""
    return bias - speed * (load.double().mean() - load).sign()


def _against_the_fullest(bias: Tensor, load: Tensor, speed: float) -> Tensor:
    """Compares with the fullest expert, not with the mean: nobody's bias ever falls."""
    return bias + speed * (load.double().max() - load).sign()


def _check_balance(answer) -> None:
    load = torch.tensor([10.0, 0.0, 4.0, 2.0])  # mean 4
    found = answer(torch.tensor([0.5, -0.5, 0.0, 0.25]), load, 0.1)
    right = [0.4, -0.4, 0.0, 0.35]
    got = [round(float(b), 4) for b in found]
    require(got == right, f"with loads 10, 0, 4, 2 the biases become {right}, yours {got}")


def my_partial(x, experts, chosen, weights, rank, ranks) -> Tensor:
    """What one of `ranks` GPUs adds: x (n, D) -> (n, D).

    `experts` lists all E functions (m, D) -> (m, D). This GPU holds
    numbers rank * E // ranks up to where the next GPU's begin.
    chosen (n, k) and weights (n, k) are whole.
    """
    share = len(experts) // ranks
    out = torch.zeros_like(x)
    for number in range(rank * share, (rank + 1) * share):
        rows, slots = (chosen == number).nonzero(as_tuple=True)
        expert = experts[number]
        found = expert(x[rows])
        out[rows] += weights[rows, slots, None] * found
    return out


def _every_expert(x, experts, chosen, weights, rank: int, ranks: int) -> Tensor:
    """Runs every expert on every GPU: the sum is `ranks` times too large."""
    return my_partial(x, experts, chosen, weights, 0, 1)


def _renormalised(x, experts, chosen, weights, rank: int, ranks: int) -> Tensor:
    """Normalises the weights over the experts that are here; the other GPUs' share is lost."""
    share = len(experts) // ranks
    mine = weights * ((chosen >= rank * share) & (chosen < (rank + 1) * share))
    return my_partial(x, experts, chosen, mine / mine.sum(-1, keepdim=True).clamp(min=1e-9), rank, ranks)


def _first_slot(x, experts, chosen, weights, rank: int, ranks: int) -> Tensor:
    """Takes every expert's weight from the first slot."""
    return my_partial(x, experts, chosen, weights[:, :1].expand_as(weights), rank, ranks)


def _check_partial(answer) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12, 4, generator=generator)
    experts = [lambda rows, n=n: (n + 1) * rows.flip(-1) for n in range(8)]
    chosen = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(12)])
    weights = torch.rand(12, 3, generator=generator)
    whole = my_partial(x, experts, chosen, weights, 0, 1)
    for ranks in (1, 2, 4):
        parts = [answer(x.clone(), experts, chosen.clone(), weights.clone(), rank, ranks) for rank in range(ranks)]
        require(all(getattr(part, "shape", None) == x.shape for part in parts), "return a tensor of x's shape")
        gap = float((sum(parts) - whole).abs().max())
        require(gap < 1e-4, f"the sum over {ranks} GPUs is off by {gap:.2f}")
    alone = answer(x, experts, chosen, weights, 1, 4)
    idle = ~((chosen == 2) | (chosen == 3)).any(-1)
    require(bool((alone[idle] == 0).all()), "a token with no expert here gets nothing from here")


def my_bytes(split, whole, token, tokens, sequences, gpus) -> int:
    """Bytes on each GPU under tensor and expert parallelism.

    `split`: bytes of heads, feed-forward and experts together;
    `whole`: of indexers and routers; `token`: of one token's cache in
    all layers. Each of the `sequences` has `tokens` tokens.
    """
    return split // gpus + whole + token * tokens * sequences


def _cache_divided(split: int, whole: int, token: int, tokens: int, sequences: int, gpus: int) -> int:
    """Divides the cache by the GPUs too; one latent serves all heads, so all need it."""
    return (split + token * tokens * sequences) // gpus + whole


def _all_divided(split: int, whole: int, token: int, tokens: int, sequences: int, gpus: int) -> int:
    """Divides the indexers, which every GPU needs to choose the same tokens."""
    return (split + whole) // gpus + token * tokens * sequences


def _one_sequence(split: int, whole: int, token: int, tokens: int, sequences: int, gpus: int) -> int:
    """Counts one sequence's cache."""
    return split // gpus + whole + token * tokens


def _check_bytes(answer) -> None:
    found = answer(8000, 30, 2, 100, 5, 8)
    require(found == 2030, f"8000 split over 8, 30 whole, 5 x 100 tokens of 2 bytes are 2030 on each, yours {found}")
    require(answer(8000, 30, 2, 100, 5, 1) == 9030, "on one GPU everything is in one place: 9030")


EXERCISES = (
    Exercise(
        "Route one token", 2, 15,
        "Sixteen experts in four groups: keep the two best groups, then the three best experts in them. The bias helps "
        "to choose and never weighs. The checker makes half of all biases strongly negative.",
        ("Reshape to (groups, experts a group). A group is worth the sum of its best two biased scores.",
         "What is dropped must lose against everything: `float('-inf')`, since a biased score may be negative.",
         "Weights come from `scores`, without the bias, at the chosen ids; divide by their sum."),
        my_route, (_mask_with_0, _best_one, _bias_weighs, _no_groups), _check_route,
    ),
    Exercise(
        "One step of balancing", 1, 5,
        "After a step each expert's bias moves by `speed`: up if it got fewer tokens than the mean, down if more, not "
        "at all if just as many.",
        ("Only the direction counts, not the amount.", "`torch.sign` gives -1, 0 or 1.",
         "Up for too few: the sign of mean minus load."),
        my_balance, (_by_amount, _reversed, _against_the_fullest), _check_balance,
    ),
    Exercise(
        "One GPU's part of the experts", 2, 15,
        "Every GPU sees every token and the whole routing. It runs its own experts, and what all GPUs have found is "
        "added up. Write one GPU's part, so that the sum is the whole layer.",
        ("With E experts on `ranks` GPUs, this one has E // ranks, beginning at rank times that.",
         "`(chosen == number).nonzero(as_tuple=True)` gives the rows that chose an expert, and in which slot.",
         "Use `weights[rows, slots]` as they are: the other GPUs use the others."),
        my_partial, (_every_expert, _renormalised, _first_slot), _check_partial,
    ),
    Exercise(
        "Bytes on each GPU", 1, 5,
        "Count what lies on each of several GPUs that share a model by heads and experts. One of the three kinds of "
        "bytes is divided.",
        ("Which of the three does one head, or one expert, have for itself?",
         "The latent in the cache serves all 128 heads, and the indexer chooses for all of them.",
         "split / gpus + whole + everything in the cache."),
        my_bytes, (_cache_divided, _all_divided, _one_sequence), _check_bytes,
    ),
)  # fmt: skip
check = checker(*EXERCISES)
