"""GRPO: reinforcement learning in which the other answers to the same question are the baseline.

For each prompt the model writes a group of G completions, and rules give each a reward. What is better than the group's
mean is made more likely, what is worse less likely (report section 2.2; Shao et al. 2024, "DeepSeekMath"; written out
in the DeepSeek-V3 report, Eq. 26 to 28):

    A_i  = r_i - mean(r_1 ... r_G)                                          (divided by the group's deviation, if asked)
    L    = - mean over own tokens of  [ min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) M  -  beta KL ]
    rho  = p_now(token) / p_sampled(token)

The usual alternative, PPO, trains a second network to guess the mean. Names, meanings and, where size does not forbid,
defaults are TRL's (``GRPOConfig``): ``beta=0`` keeps no reference model, and the KL term is the one that TRL 1.10 takes
by default (``use_bias_correction_kl=True``), k3 times rho: see :func:`divergence`.

DeepSeek-V3.2's report (arXiv 2512.02556, section 3.1) adds what keeps a large run stable when the samples are not quite
the trained policy's own. M leaves out worse answers that have become too unlikely (:func:`on_policy`, *off-policy
sequence masking*). Experts are chosen again as they were while sampling (*keep routing*), and so is what top-p left to
be drawn (*keep sampling mask*; :mod:`dsa.training.rollout` has both). Here they are options.

A group whose rewards are all equal teaches nothing: its advantages are zero. The share of such groups is measured
(``frac_reward_zero_std``), because a run in which it nears 1 stands still and looks calm.

No reward reaches the sparse model's indexers: selecting passes no gradient. They may *learn on* (``train_indexer``), as
in stage two of training: each from the divergence of its own scores from attention over what was selected (Eq. 4). It
is a loss beside the policy's, with inputs and attention detached, so that neither moves the other's weights. Or they
stay *frozen*: then what is selected changes only as the hidden states do, and a sampler that holds an older copy of the
weights disagrees less about it. The reports do not say which it was; prime-rl and NeMo RL freeze them.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dsa.datasets import rl_domains, rl_transcripts
from dsa.datasets.rl_domains import Problem
from dsa.model.transformer import Transformer
from dsa.training import rewards
from dsa.training.losses import forward_with_indexer_loss
from dsa.training.optimizers import adamw
from dsa.training.rewards import Reward
from dsa.training.rollout import Rollout, logprobs_of, replayed_routing, sample
from dsa.training.trainer import Phase, Run, train

SCALES = ("group", "batch", "none")
LOSSES = ("grpo", "dapo", "dr_grpo")
SAVED_EVERY = 10  # steps, at least


@dataclass(frozen=True)
class GRPOConfig:
    """How to train; names, and defaults except those of size, as in TRL's class of this name.

    - ``num_generations`` G: completions of each prompt; ``num_prompts``: groups a step (TRL gives the product).
    - ``num_iterations``: updates from one batch of samples; the clip acts from the second on.
    - ``epsilon``, ``epsilon_high``: the ratio may fall to 1 - epsilon and rise to 1 + epsilon_high (None: epsilon).
    - ``beta``: weight of the divergence from the model as it was at the start.
    - ``off_policy_mask_threshold``: answers worse than their group's mean whose tokens have become less likely by more
      than so many nats on average push no more (:func:`on_policy`); None: all push.
    - ``top_p``: below 1, samples are drawn from the likeliest tokens that have this probability together;
      ``keep_sampling_mask`` holds policy and reference to those tokens too (nothing changes while ``top_p`` is 1).
    - ``keep_routing``: each update replays the experts that sampling chose; the reference routes for itself.
    - ``train_indexer``: whether the indexers learn on from Eq. 4 or stay as they are.
    - ``scale_rewards``: divide advantages by the deviation in the "group", in the "batch", or by nothing ("none").
    - ``loss_type``: "grpo" averages over a completion and then over completions, "dapo" over all own tokens, "dr_grpo"
      divides their sum by the most tokens there could be, so that length changes no weight.
    - ``learning_rate`` falls linearly to a tenth. TRL's 1e-6 is for models with a thousand times the weights.
    """

    num_generations: int = 8
    num_prompts: int = 32
    num_iterations: int = 1
    max_completion_length: int = rl_transcripts.COMPLETION
    temperature: float = 1.0
    learning_rate: float = 1e-3
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    scale_rewards: str = "group"
    loss_type: str = "dapo"
    max_grad_norm: float = 1.0
    off_policy_mask_threshold: float | None = None
    top_p: float = 1.0
    keep_sampling_mask: bool = True
    keep_routing: bool = False
    train_indexer: bool = True

    def __post_init__(self) -> None:
        _require(self.num_generations >= 2, f"num_generations={self.num_generations} must be at least 2 to compare")
        _require(self.num_prompts >= 1, f"num_prompts={self.num_prompts} must be at least 1")
        _require(self.num_iterations >= 1, f"num_iterations={self.num_iterations} must be at least 1")
        _require(self.temperature > 0, f"temperature={self.temperature} must be above 0: equal samples teach nothing")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p} must be above 0 and at most 1; 1 keeps all tokens")
        _require(0 <= self.epsilon < 1, f"epsilon={self.epsilon} must lie in 0 (nothing may change) to 1")
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        _require(high >= 0, f"epsilon_high={high} must be at least 0; None takes epsilon")
        _require(self.beta >= 0, f"beta={self.beta} must be at least 0; 0 keeps no reference")
        _require(self.scale_rewards in SCALES, f"scale_rewards={self.scale_rewards!r}: use one of {', '.join(SCALES)}")
        delta = self.off_policy_mask_threshold
        _require(delta is None or delta > 0, f"off_policy_mask_threshold={delta} must be above 0; None masks nothing")
        _require(self.loss_type in LOSSES, f"loss_type={self.loss_type!r}: use one of {', '.join(LOSSES)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def advantages(reward: Tensor, num_generations: int, scale_rewards: str = "group") -> Tensor:
    """Reward less its group's mean, scaled: rewards (groups * G,), a group's in a row -> (groups * G,)."""
    groups = reward.unflatten(0, (-1, num_generations))  # (groups, G)
    centred = groups - groups.mean(1, keepdim=True)
    if scale_rewards == "group":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    elif scale_rewards == "batch":
        centred = centred / (reward.std() + 1e-4)
    return centred.flatten()


def token_losses(
    now: Tensor, old: Tensor, advantage: Tensor, epsilon: float = 0.2, epsilon_high: float | None = None
) -> tuple[Tensor, Tensor]:
    """The clipped objective of each token: log-probabilities (B, T), advantage (B,) -> losses, clipped (B, T)."""
    ratio, A = (now - old).exp(), advantage[:, None]
    high = epsilon if epsilon_high is None else epsilon_high
    held = ratio.clamp(1 - epsilon, 1 + high)
    return -torch.minimum(ratio * A, held * A), held * A < ratio * A


def divergence(now: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """KL(now || reference), estimated from tokens that ``old`` sampled: log-probabilities (B, T) each -> (B, T).

    Schulman's k3 times the importance ratio p_now / p_old, as DeepSeek-V3.2 has it (arXiv 2512.02556) and TRL by
    default (``use_bias_correction_kl``). Its mean under ``old`` is the divergence, and so is the mean of its *gradient*
    the divergence's gradient, however far ``now`` has moved. k3 is ``r - 1 - log r`` with ``r = p_ref / p_now``, so

        grad (ratio * k3) = ratio * (k3 + 1 - r) * grad log p_now = ratio * log(p_now / p_ref) * grad log p_now

    Without the ratio the gradient is ``(1 - r) grad log p_now``: on average that of KL(reference || now).
    """
    apart = reference - now
    return (now - old).exp() * (apart.exp() - apart - 1)  # the ratio is not detached: half the gradient comes from it


@torch.no_grad()
def on_policy(now: Tensor, old: Tensor, completion_mask: Tensor, advantage: Tensor, threshold: float) -> Tensor:
    """V3.2's sequence mask M: log-probabilities and own tokens (B, T), advantages (B,) -> (B,) bool, who may push.

    Left out is an answer with a negative advantage whose mean log (p_old / p_now) over its own tokens is above
    ``threshold``. The policy has left it already, so it is not a mistake of the policy's own any more; pushing further
    teaches little and is what derails a run. A better answer is never left out: it says what should be done.
    """
    drift = ((old - now) * completion_mask).sum(1) / completion_mask.sum(1).clamp(min=1)
    return (advantage >= 0) | (drift <= threshold)


def averaged(losses: Tensor, completion_mask: Tensor, loss_type: str, longest: int) -> Tensor:
    """One number from the losses of own tokens: (B, T) -> a scalar; ``longest`` is the most a completion may have."""
    losses, lengths = losses * completion_mask, completion_mask.sum(1)
    if loss_type == "grpo":
        return (losses.sum(1) / lengths.clamp(min=1)).mean()
    return losses.sum() / (lengths.sum().clamp(min=1) if loss_type == "dapo" else len(losses) * longest)


@dataclass(frozen=True)
class Graded:
    """A rollout with its rewards and advantages (B,), and the reference's log-probabilities (B, T) if beta asks."""

    rollout: Rollout
    rewards: Tensor
    advantages: Tensor
    reference: Tensor | None


Draw = Callable[[torch.Generator, int], list[Problem]]


class Objective:
    """What the training loop asks for a loss: it samples, grades, and is differentiated ``num_iterations`` times.

    ``watch(graded)``, if given, sees each batch of samples.
    """

    def __init__(
        self, config: GRPOConfig, draw: Draw, reward: Reward, reference: Transformer | None = None,
        watch: Callable[[Graded], None] | None = None,
    ):  # fmt: skip
        self.config, self.draw, self.reward, self.reference, self.watch = config, draw, reward, reference, watch
        self._batch: Graded | None = None
        self._used = 0

    def __call__(self, model: nn.Module, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss of one update, and its measures by TRL's names."""
        assert isinstance(model, Transformer)
        if self._batch is None or self._used == self.config.num_iterations:
            self._batch, self._used = self.collect(model, rng), 0
            if self.watch is not None:
                self.watch(self._batch)
        self._used += 1
        return self.loss(model, self._batch)

    def collect(self, model: Transformer, rng: torch.Generator) -> Graded:
        """Sample ``num_prompts`` groups and grade them."""
        config = self.config
        problems = [p for p in self.draw(rng, config.num_prompts) for _ in range(config.num_generations)]
        rollout = sample(
            model, problems, rng,
            temperature=config.temperature, top_p=config.top_p, max_completion_length=config.max_completion_length,
            keep_sampling_mask=config.keep_sampling_mask, keep_routing=config.keep_routing,
        )  # fmt: skip
        rewards = torch.tensor([self.reward(one) for one in rollout.transcripts()])
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                logits = self.reference(rollout.tokens)
                reference = logprobs_of(logits, rollout.tokens, config.temperature, rollout.sampling_mask)
        return Graded(rollout, rewards, advantages(rewards, config.num_generations, config.scale_rewards), reference)

    def loss(self, model: Transformer, graded: Graded) -> tuple[Tensor, dict[str, float]]:
        """The clipped objective on a graded batch, the indexers' divergence added if they are to learn.

        Rows without an advantage have no part in it and are not read, unless the reference asks for them.
        """
        config, rollout = self.config, graded.rollout
        old, completion_mask = rollout.logprobs, rollout.completion_mask
        rows = (graded.advantages != 0) | (graded.reference is not None)
        rows = rows if rows.any() else ~rows
        part = rollout.rows(rows)
        with replayed_routing(model, part.routing):
            logits, indexer_loss = forward_with_indexer_loss(model, part.tokens, config.train_indexer)
        now = old.index_put((rows,), logprobs_of(logits, part.tokens, config.temperature, part.sampling_mask))
        losses, clipped = token_losses(now, old, graded.advantages, config.epsilon, config.epsilon_high)
        measures = _measures(graded, now.detach(), clipped, config.num_generations)
        if config.off_policy_mask_threshold is not None:
            pushes = on_policy(now, old, completion_mask, graded.advantages, config.off_policy_mask_threshold)
            losses = losses * pushes[:, None]  # the divergence below still holds those that are left out
            measures["off_policy_masked"] = (~pushes).float().mean().item()
        if graded.reference is not None:
            kl = divergence(now, old, graded.reference)
            losses = losses + config.beta * kl
            measures["kl"] = kl.detach()[completion_mask].mean().item()
        loss = averaged(losses, completion_mask, config.loss_type, config.max_completion_length)
        return loss + indexer_loss, measures


def _measures(graded: Graded, now: Tensor, clipped: Tensor, num_generations: int) -> dict[str, float]:
    rollout, own = graded.rollout, graded.rollout.completion_mask
    groups = graded.rewards.unflatten(0, (-1, num_generations))
    return {
        "reward": graded.rewards.mean().item(),
        "completions/mean_length": rollout.lengths.float().mean().item(),
        "frac_reward_zero_std": (groups.std(1) == 0).float().mean().item(),
        "clip_ratio": clipped[own].float().mean().item(),
        "entropy": -rollout.logprobs[own].mean().item(),
        "logprob_difference": (now - rollout.logprobs)[own].abs().max().item(),
    }


def grpo(
    model: Transformer,
    names: Sequence[str] = tuple(rl_domains.DOMAINS),
    *,
    steps: int = 100,
    config: GRPOConfig | None = None,
    reward_funcs: Sequence[Reward] = (rewards.verified,),
    reward_weights: Sequence[float] | None = None,
    level: int | None = None,
    seed: int = 0,
    watch: Callable[[Graded], None] | None = None,
    work: Path | None = None,
    resume: bool = False,
    show: bool = True,
) -> Run:
    """Train ``model``, in place and under the attention it is set to, on problems of the domains ``names``.

    With a ``work`` folder the run's state is saved there now and then, and a run that was killed goes on with
    ``resume``, from the model it began with, and ends with the same bits. What is saved lies between two batches of
    samples, never within the ``num_iterations`` updates from one. Raises ValueError for another run's state.

    Each row of the run's table holds the measures by TRL's names: reward, completions/mean_length and so on.
    """
    config = config or GRPOConfig()
    reference = copy.deepcopy(model).eval().requires_grad_(False) if config.beta else None
    reward = rewards.total(reward_funcs, reward_weights)
    objective = Objective(
        config, lambda g, n: rl_transcripts.sample_problems(g, names, n, level), reward, reference, watch
    )
    model.eval()  # routers keep their biases
    optimizers = adamw(model.parameters(), config.learning_rate)
    plan = [Phase("grpo", steps, objective, rates=(1.0, 0.1), warmup=min(5, steps // 4))]
    every = config.num_iterations * math.ceil(SAVED_EVERY / config.num_iterations)
    label = f"{config}, {', '.join(names)}, level {level}"
    return train(
        model, optimizers, plan,
        seed=seed, clip=config.max_grad_norm, work=work, resume=resume, every=every, label=label, show=show,
    )  # fmt: skip
