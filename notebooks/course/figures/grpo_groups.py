"""Groups of answers, looked at: what each is worth, and how hard its tokens are pushed.

Two panels of the chapter on post-training. :func:`draw_objective` draws GRPO's formula for any group size, clip and
KL weight: the advantages of a group, and what a token gains when its probability moves. :func:`draw_group` shows a real
group: a problem, the answers that a model samples to it, and the reward and advantage of each.
"""

from collections.abc import Mapping, Sequence
from html import escape
from random import Random
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from course.ui.panel import Draw, Html
from course.ui.style import COLOURS
from dsa.datasets import rl_domains
from dsa.datasets.rl_symbols import SYMBOLS, read
from dsa.datasets.rl_transcripts import Transcript
from dsa.model.transformer import Transformer
from dsa.training import grpo, rewards
from dsa.training.rollout import sample

RIGHT = ("none", "one", "half", "all but one", "all")  # of a group's answers
RATIOS = torch.linspace(0.4, 1.8, 281)


def group_rewards(size: int, right: str) -> Tensor:
    """A group of ``size`` rewards, right answers first; ``right`` is one of RIGHT. ValueError for another."""
    if right not in RIGHT:
        raise ValueError(f"right answers: {right!r} is not one of {', '.join(RIGHT)}")
    if size < 2:
        raise ValueError(f"group size = {size}: an answer needs at least one other to be compared with")
    counts = {"none": 0, "one": 1, "half": size // 2, "all but one": size - 1, "all": size}
    return (torch.arange(size) < counts[right]).float()


def gain(advantage: float, epsilon: float, epsilon_high: float, beta: float) -> Tensor:
    """What a token contributes at each of RATIOS, its own sample being the reference: minus its loss."""
    moved = RATIOS.log()[None]
    start = torch.zeros_like(moved)  # sampler and reference
    losses, _ = grpo.token_losses(moved, start, torch.tensor([advantage]), epsilon, epsilon_high)
    return -(losses + beta * grpo.divergence(moved, start, start))[0]


def best_ratio(advantage: float, epsilon: float, epsilon_high: float, beta: float) -> float | None:
    """The ratio at which pushing ends: where the gain is greatest, the one nearest to 1; None if nothing pushes."""
    found = gain(advantage, epsilon, epsilon_high, beta)
    if float(found.max() - found.min()) < 1e-6:
        return None
    best = RATIOS[found > found.max() - 1e-4]
    return float(best[(best - 1).abs().argmin()])


def draw_objective(size: int, right: str, high: float, beta: float) -> tuple[Figure, str]:
    """A group's advantages, and the gain of a right and a wrong answer's token; ``high`` is epsilon_high."""
    if not 0 < high < 0.8 or not beta >= 0:
        raise ValueError(f"epsilon_high = {high}, beta = {beta}: take 0 to 0.8, and at least 0")
    given = group_rewards(size, right)
    found = grpo.advantages(given, size)
    fig, (left, middle) = plt.subplots(1, 2, figsize=(7.6, 2.7), width_ratios=[1, 1.4])
    _draw_advantages(left, given, found)
    _draw_gain(middle, given, found, high, beta)
    return fig, _sentence(given, found, high, beta)


def _draw_advantages(ax: Axes, given: Tensor, found: Tensor) -> None:
    hatches = ["" if reward else "///" for reward in given]
    colours = [COLOURS[2] if reward else COLOURS[3] for reward in given]
    ax.bar(range(len(given)), found.tolist(), color=colours, hatch=hatches, edgecolor="white")
    ax.set(xlabel="answer (right ones first)", ylabel="advantage", ylim=(-4.2, 4.2))
    ax.axhline(0, color="#8a8a8a", linewidth=1)


def _draw_gain(ax: Axes, given: Tensor, found: Tensor, high: float, beta: float) -> None:
    for reward, name, look in ((1, "right", (COLOURS[2], "-", "o")), (0, "wrong", (COLOURS[3], "-", "s"))):
        if (given == reward).any():
            advantage = float(found[given == reward][0])
            curve = gain(advantage, 0.2, high, beta)
            ax.plot(RATIOS, curve, color=look[0], linestyle=look[1], marker=look[2], markevery=40, label=name)
    ax.axvspan(0.8, 1 + high, color="#e6e6e6", zorder=0)
    ax.axvline(1, color="#8a8a8a", linewidth=1)
    ax.set(xlabel="ratio = p now / p sampled", ylabel="gain", xlim=(0.4, 1.8))
    ax.legend(fontsize=8)


def _sentence(given: Tensor, found: Tensor, high: float, beta: float) -> str:
    count, size = int(given.sum()), len(given)
    start = f"{count} of {size} answers are right. "
    if count in (0, size):
        return start + "All rewards are equal, every advantage is 0, and the group teaches nothing."
    ends = {reward: best_ratio(float(found[given == reward][0]), 0.2, high, beta) for reward in (1, 0)}
    words = [
        f"A {name} answer's advantage is {float(found[given == reward][0]):+.2f}; its tokens are pushed until they are "
        f"{ends[reward]:.2f} times as likely"
        for reward, name in ((1, "right"), (0, "wrong"))
    ]
    held = f" (the KL term, weight {beta}, pulls back)" if beta else ""
    return start + ". ".join(words) + held + "."


def group_of(
    model: Transformer, domain: str, level: int, thinking: bool, size: int = 8, seed: int = 0
) -> tuple[list[Transcript], Tensor, Tensor]:
    """One problem's group: ``size`` answers, their rewards and advantages (size,)."""
    problem = rl_domains.generate(Random(f"{domain} {level} {thinking} {seed}"), domain, level, thinking)
    found = sample(model, [problem] * size, torch.Generator().manual_seed(seed)).transcripts()
    given = torch.tensor([rewards.verified(one) for one in found])
    return found, given, grpo.advantages(given, size)


def draw_group(models: Mapping[str, Transformer], size: int = 8) -> Draw:
    """Make a panel's callback: draw(model, domain, level, mode) -> (a table, a sentence)."""

    def draw(model: str, domain: str, level: int, mode: str) -> tuple[Html, str]:
        if model not in models:
            raise ValueError(f"model {model!r} is not among {', '.join(models)}")
        if mode not in ("think", "direct"):
            raise ValueError(f"mode {mode!r}: use think or direct")
        found, given, advantage = group_of(models[model], domain, level, mode == "think", size)
        words = (
            f"{model}, {domain}, level {level}, {mode}: {int(given.sum())} of {size} answers are right, mean length "
            f"{sum(len(one.completion) for one in found) / size:.1f}. The prompt is: {read(found[0].problem.prompt)}."
        )
        return _table(found, given, advantage), words

    return draw


def _table(found: Sequence[Transcript], given: Tensor, advantage: Tensor) -> Html:
    rows = "".join(
        f'<tr><td style="text-align:left;font-family:monospace">{_marked(one)}</td>'
        f"<td>{'✓' if reward else '✗'} {reward:.0f}</td><td>{A:+.2f}</td></tr>"
        for one, reward, A in zip(found, given.tolist(), advantage.tolist(), strict=True)
    )
    prompt = escape(read(found[0].problem.prompt))
    head = "<tr><th style='text-align:left'>answer</th><th>reward</th><th>advantage</th></tr>"
    return Html(
        f'<p>Prompt: <code>{prompt}</code></p><table style="border-spacing:1em 0">{head}{rows}</table>'
        "<p>In brackets and bold: what the tool said.</p>"
    )


def _marked(one: Transcript) -> str:
    said = zip(one.tokens, one.completion_mask, strict=True)
    return " ".join(escape(SYMBOLS[token]) if own else f"<b>⟦{escape(SYMBOLS[token])}⟧</b>" for token, own in said)


def block_means(values: Sequence[float], width: int = 5) -> list[float]:
    """Means of ``width`` values each, what is left over dropped."""
    return [sum(values[n : n + width]) / width for n in range(0, len(values) - width + 1, width)]


def curves_by_seed(runs: Sequence[Mapping[str, Any]], curve: str, measure: str, width: int = 5) -> Tensor:
    """One recorded curve of every seed in means of ``width`` steps: (seeds, steps / width)."""
    return torch.tensor([block_means(run["curves"][curve][measure], width) for run in runs])
