"""The exercises of chapter 05: the teacher's distribution, the loss, its gradient, and the teacher of the sparse stage.

All are about one query, so that nothing but the idea is left. The wrong answers are those that run, look reasonable and
teach the indexer something else.
"""

import torch
from torch import Tensor

from course.exercises.exercise import Exercise, checker, require
from dsa.kernels import ops, reference

HIDDEN = float("-inf")


def _logits(H: int, S: int, seed: int, hidden: int = 2) -> Tensor:
    """Attention logits of H unlike heads for one query, the last keys in its future: (H, S)."""
    logits = 2.5 * torch.randn(H, S, generator=torch.Generator().manual_seed(seed))
    logits[:, S - hidden :] = HIDDEN
    return logits


def _near(found: Tensor, right: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Refuse numbers that are not the right ones, with the worst place."""
    require(isinstance(found, Tensor), f"return a tensor, not a {type(found).__name__}")
    require(found.shape == right.shape, f"{what} has shape {tuple(right.shape)}, yours {tuple(found.shape)}")
    require(not found.isnan().any(), f"{what} holds nan: -inf or 0 went into a product or a logarithm somewhere")
    gap = (found - right).abs()
    worst = int(gap.argmax())
    require(
        float(gap.max()) < tolerance,
        f"{what} is off: place {worst} should be {right.flatten()[worst]:.3f}, yours is {found.flatten()[worst]:.3f}",
    )


def my_target(logits: Tensor) -> Tensor:
    """What the indexer is to imitate: logits (H, S) of one query -> p (S,).

    Scaled attention logits, -inf in the future. p sums to 1 (report Eq. 3).
    """
    heads = logits.softmax(-1)  # each head's attention
    summed = heads.sum(0)
    return summed / summed.sum()


def _mean_of_logits(logits: Tensor) -> Tensor:
    """Averages before the softmax: a key that one head alone wants gets next to nothing."""
    return logits.mean(0).softmax(-1)


def _not_normalised(logits: Tensor) -> Tensor:
    """Leaves the sum at H."""
    return logits.softmax(-1).sum(0)


def _first_head(logits: Tensor) -> Tensor:
    """Listens to one head."""
    return logits[0].softmax(-1)


def _loudest_head(logits: Tensor) -> Tensor:
    """Takes the largest head for each key instead of the sum."""
    loudest = logits.softmax(-1).amax(0)
    return loudest / loudest.sum()


def _softmax_again(logits: Tensor) -> Tensor:
    """Normalises with a second softmax, which flattens everything."""
    return logits.softmax(-1).sum(0).softmax(-1)


def _check_target(answer) -> None:
    for H, S, seed in ((4, 9, 1), (2, 5, 2), (16, 30, 3)):
        logits = _logits(H, S, seed)
        found = answer(logits.clone())
        require(isinstance(found, Tensor), f"return a tensor, not a {type(found).__name__}")
        total = float(found.sum())
        require(abs(total - 1) < 1e-4, f"with {H} heads p should sum to 1; yours sums to {total:.2f}")
        _near(found, logits.softmax(-1).mean(0), "p")


def my_safe_kl(p: Tensor, scores: Tensor) -> Tensor:
    """KL(p || softmax(scores)) of one query, a scalar: p (S,), scores (S,).

    p sums to 1 and may be exactly 0; scores are -inf in the future, where
    p is 0. Neither may turn the result into nan.
    """
    log_q = scores.log_softmax(-1)
    counts = p > 0
    return (p[counts] * (p[counts].log() - log_q[counts])).sum()


def _naive(p: Tensor, scores: Tensor) -> Tensor:
    """Multiplies 0 with -inf."""
    return (p * (p.log() - scores.log_softmax(-1))).sum()


def _other_way_round(p: Tensor, scores: Tensor) -> Tensor:
    """Swaps the two: KL(softmax(scores) || p)."""
    q, counts = scores.softmax(-1), p > 0
    return (q[counts] * (q[counts].log() - p[counts].log())).sum()


def _cross_entropy(p: Tensor, scores: Tensor) -> Tensor:
    """Leaves out the entropy of p: a perfect indexer would not be at 0."""
    counts = p > 0
    return -(p[counts] * scores.log_softmax(-1)[counts]).sum()


def _scores_as_shares(p: Tensor, scores: Tensor) -> Tensor:
    """Forgets the softmax over the scores."""
    counts = p > 0
    return (p[counts] * (p[counts].log() - scores[counts])).sum()


def _clipped(p: Tensor, scores: Tensor) -> Tensor:
    """Adds 1e-9 before both logarithms, against nan: a key that the indexer overlooks costs 21 nats at most."""
    return (p * ((p + 1e-9).log() - (scores.softmax(-1) + 1e-9).log())).sum()


def _shifted(p: Tensor, scores: Tensor) -> Tensor:
    """Adds 1e-9 to p alone, which each of many keys pays for: a perfect indexer would not be at 0."""
    log_q = scores.log_softmax(-1).masked_fill(scores == HIDDEN, 0)
    return (p * ((p + 1e-9).log() - log_q)).sum()


def _check_kl(answer) -> None:
    generator = torch.Generator().manual_seed(7)
    for S, zeros in ((8, 0), (8, 3), (40, 9)):
        scores = torch.randn(S, generator=generator).double()
        p = 2 * torch.randn(S, generator=generator).double()
        scores[S - 2 :] = p[S - 2 :] = HIDDEN
        p[:zeros] = HIDDEN  # attention that is exactly 0 where the scores are not
        p = p.softmax(-1)
        for guess, name in ((p.log().nan_to_num(neginf=-60.0), "of a perfect indexer"), (scores, "")):
            right = reference.kl_divergence(p, guess)
            found = torch.as_tensor(answer(p.clone(), guess.clone())).double()
            _near(found, right, f"the divergence {name}".strip())
    _check_tails(answer)


def _check_tails(answer) -> None:
    """Where a logarithm shows that it was clipped: p large and q tiny, and many tiny p."""
    p, scores = torch.zeros(8).double(), torch.zeros(8).double()
    p[:2], scores[1], scores[7] = 0.5, -200.0, HIDDEN
    right, found = float(reference.kl_divergence(p, scores)), float(answer(p.clone(), scores.clone()))
    require(
        abs(found - right) < 0.01,
        f"p is one half on each of two keys, and the second one's score is -200, the others' 0: the divergence is "
        f"{right:.1f}, yours is {found:.1f}. A softmax that was clipped has no such logarithm; log_softmax has",
    )
    keys = 163_840  # the longest context of V3.2
    p = torch.full((keys,), 3.7e-10).double()
    p[-1] -= p.sum() - 1
    found = float(answer(p.clone(), p.log()))
    require(
        abs(found) < 2e-5,  # in fp32 they round to about 4e-6
        f"one of {keys:,} keys has nearly all attention, every other 3.7e-10, and the indexer is perfect: the "
        f"divergence is 0, yours is {found:.1e}. What clips p, or is added to it, adds up over all keys",
    )


def my_head_gradient(p, q, k, w) -> Tensor:
    """d KL(p || softmax(I)) / d w, without autograd -> (J,).

    One query: p (S,) sums to 1; q (J, W), k (S, W), w (J,) make the scores
    I of Eq. 1. All S keys are visible.
    """
    found = (q @ k.T).relu()  # (J, S): each head's part, unweighted
    scores = w @ found  # (S,)
    return found @ (scores.softmax(-1) - p)


def _uphill(p: Tensor, q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Has the sign reversed: following it downwards unlearns."""
    found = (q @ k.T).relu()
    return found @ (p - (w @ found).softmax(-1))


def _no_activation(p: Tensor, q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Forgets the ReLU on the way back: a shut head would still be moved."""
    found = q @ k.T
    return found @ ((w @ found.relu()).softmax(-1) - p)


def _weighted_twice(p: Tensor, q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Multiplies by the weight again: that is the gradient of something else."""
    found = (q @ k.T).relu()
    return w * (found @ ((w @ found).softmax(-1) - p))


def _ratio(p: Tensor, q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Differentiates the logarithm and forgets the softmax below it."""
    found = (q @ k.T).relu()
    return found @ (-p / (w @ found).softmax(-1))


def _check_head_gradient(answer) -> None:
    generator = torch.Generator().manual_seed(8)
    for J, W, S in ((2, 4, 6), (3, 8, 20), (2, 4, 1)):
        q, k, w = (torch.randn(*shape, generator=generator).double() for shape in ((J, W), (S, W), (J,)))
        if S > 1:
            k = k.abs()
            q[0] = -q[0].abs()  # a head that is shut for every key
        p = torch.randn(S, generator=generator).double().softmax(-1)
        learned = w.clone().requires_grad_()
        scores = ops.index_scores(q[None, None], k[None], learned[None, None], backend="reference")
        (right,) = torch.autograd.grad(reference.kl_divergence(p, scores[0, 0]), learned)
        with torch.inference_mode():  # where autograd records nothing
            found = answer(p.clone(), q.clone(), k.clone(), w.clone())
        _near(found, right, "the gradient of the weights")


def my_sparse_target(logits: Tensor, selected: Tensor) -> Tensor:
    """The teacher of the sparse stage (report Eq. 4): -> p (K,).

    logits (H, S) of one query; selected (K,) keys, -1 in empty slots,
    where p is 0. At least one slot is filled.
    """
    own = logits[:, selected.clamp(min=0)]  # (H, K)
    own = own.masked_fill(selected < 0, float("-inf"))
    heads = own.softmax(-1)  # each head over the selected keys only
    return heads.sum(0) / len(heads)


def _renormalised(logits: Tensor, selected: Tensor) -> Tensor:
    """Renormalises the dense distribution: a head that looks elsewhere loses its voice."""
    p = logits.softmax(-1).mean(0)[selected.clamp(min=0)] * (selected >= 0)
    return p / p.sum()


def _dense_share(logits: Tensor, selected: Tensor) -> Tensor:
    """Cuts the dense distribution and does not normalise at all."""
    return logits.softmax(-1).mean(0)[selected.clamp(min=0)] * (selected >= 0)


def _empty_as_last(logits: Tensor, selected: Tensor) -> Tensor:
    """Reads -1 as the last key."""
    return logits[:, selected].softmax(-1).mean(0)


def _empty_as_first(logits: Tensor, selected: Tensor) -> Tensor:
    """Clamps -1 to key 0 and leaves it in."""
    return logits[:, selected.clamp(min=0)].softmax(-1).mean(0)


def _check_sparse_target(answer) -> None:
    for H, S, seed in ((2, 12, 4), (4, 30, 5)):
        logits = _logits(H, S, seed, hidden=0)
        q, k = torch.eye(H)[None, None], logits.T[None, :, None, :]  # products of these are the logits themselves
        for selected in (torch.tensor([3, 0, 7, 11]), torch.tensor([5, 2, -1, -1]), torch.tensor([S - 1, -1, -1, -1])):
            right = ops.attention_mass(q, k, 1.0, selected[None, None], backend="loops")[0, 0]
            _near(answer(logits.clone(), selected.clone()), right, f"p over the keys {selected.tolist()}")


EXERCISES = (
    Exercise(
        "The teacher", 1, 5,
        "From the attention logits of all heads to the one distribution that the indexer is to imitate.",
        ("Each head is normalised on its own first: a softmax along the keys.",
         "Then the heads are added: a sum over the first dimension.",
         "L1 normalisation of positive numbers is a division by their sum."),
        my_target, (_mean_of_logits, _not_normalised, _first_head, _loudest_head, _softmax_again), _check_target,
    ),
    Exercise(
        "The divergence, without nan", 1, 10,
        "Write the loss of one query. The formula is one line; the zeros make it three. (A small "
        "number in the logarithm would avoid nan too, and be another loss.)",
        ("KL(p || q) is the sum of p (log p - log q).",
         "`log_softmax` of the scores is better than the logarithm of their softmax.",
         "A key with p = 0 contributes nothing: leave it out before anything is multiplied."),
        my_safe_kl, (_naive, _other_way_round, _cross_entropy, _scores_as_shares, _clipped, _shifted), _check_kl,
    ),
    Exercise(
        "The gradient of a head's weight", 2, 15,
        "The chapter has shown how the loss moves a *score*. Go one step further back, without autograd (the checker "
        "switches it off): how does it move the weight of an index head? One head of the checker's is shut for every "
        "key; look at what your formula says about it.",
        ("The scores are linear in w: dI[s] / dw[j] is ReLU(q[j] . k[s]).",
         "The chain rule is a sum over the keys, that is, a matrix with a vector.",
         "The vector is what the chapter found for a score: softmax(I) - p."),
        my_head_gradient, (_uphill, _no_activation, _weighted_twice, _ratio), _check_head_gradient,
    ),
    Exercise(
        "The teacher of the sparse stage", 2, 15,
        "Once attention runs over the selected keys only, so does the teacher: *each head* has its softmax over the "
        "selected set, then the heads are added. The tempting short cut, renormalising the dense distribution, is "
        "something else.",
        ("Fetch the logits of the selected keys first: `logits[:, selected]`, after something about the -1.",
         "An empty slot must not take part in the softmax: give it -inf.",
         "After the softmax every head sums to 1, whatever it wanted outside: so the mean over heads does too."),
        my_sparse_target, (_renormalised, _dense_share, _empty_as_last, _empty_as_first), _check_sparse_target,
    ),
)  # fmt: skip
check = checker(*EXERCISES)
