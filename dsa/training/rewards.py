"""What a completion is worth: rules that give numbers, added up.

A reward function takes a :class:`Transcript` and returns a float; several are added, each with a weight, as TRL's
``reward_funcs`` and ``reward_weights`` are. The report names the kinds: a rule for the outcome where an outcome can be
checked, a length penalty, consistency of language (here: of mode), and for general tasks a rubric by which a generative
model grades an answer on several points (here the points are rules).

:func:`nothing_closed_wrongly` pays for less than was asked. It is here to be found out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsa.datasets import rl_domains
from dsa.datasets.rl_symbols import ANSWER, DIGITS, END, Ids
from dsa.datasets.rl_transcripts import Transcript

Reward = Callable[[Transcript], float]


def verified(one: Transcript) -> float:
    """1 for a correct completion, else 0: the rule-based outcome."""
    return float(one.correct)


@dataclass(frozen=True)
class LengthPenalty:
    """Minus ``per_token`` for each own token beyond ``free``, and never more than ``most``."""

    free: int = 8
    per_token: float = 0.05
    most: float = 0.5

    def __call__(self, one: Transcript) -> float:
        """The penalty, 0 or negative."""
        return -min(self.most, self.per_token * max(0, len(one.completion) - self.free))


def mode_kept(one: Transcript) -> float:
    """1 if it thought exactly when it was asked to, else 0."""
    return float(rl_domains.contains_thought(one.problem, one.completion) == one.problem.thinking)


@dataclass(frozen=True)
class Rubric:
    """Several points, each a reward between 0 and 1 with a weight: the weighted mean of what was earned."""

    points: dict[str, tuple[float, Reward]]

    def grades(self, one: Transcript) -> dict[str, float]:
        """What each point earned."""
        return {name: judge(one) for name, (_, judge) in self.points.items()}

    def __call__(self, one: Transcript) -> float:
        """The weighted mean."""
        total = sum(weight for weight, _ in self.points.values())
        return sum(weight * judge(one) for weight, judge in self.points.values()) / total


def answer_of(one: Transcript) -> Ids:
    """What stands between ``=`` and END; nothing if either is missing."""
    said = one.completion
    return said[said.index(ANSWER) + 1 : -1] if ANSWER in said and said[-1] == END else ()


def ordered(one: Transcript) -> float:
    """1 if the answer is in order, whatever is in it."""
    answer = answer_of(one)
    return float(bool(answer) and rl_domains.in_order(answer))


def complete(one: Transcript) -> float:
    """Share of the prompt's items that the answer has, less what it has too often or from elsewhere."""
    items, answer = one.problem.body, answer_of(one)
    shared = sum(min(items.count(token), answer.count(token)) for token in set(items))
    return shared / max(len(items), len(answer), 1)


def plain(one: Transcript) -> float:
    """1 if the answer is digits and nothing else."""
    answer = answer_of(one)
    return float(bool(answer) and all(token in DIGITS for token in answer))


SORTING_RUBRIC = Rubric({"digits only": (1, plain), "in order": (2, ordered), "same items": (2, complete)})


def nothing_closed_wrongly(one: Transcript) -> float:
    """1 if no bracket closes what is not open. Leaky: it never asks whether everything was closed."""
    answer = answer_of(one)
    return float(bool(answer) and rl_domains.still_open(one.problem.body + answer) is not None)


def total(functions: Sequence[Reward], weights: Sequence[float] | None = None) -> Reward:
    """The weighted sum of several rewards. ValueError for no function, or for not as many weights as functions."""
    if not functions:
        raise ValueError("reward_funcs is empty: give at least one, such as dsa.training.rewards.verified")
    given = list(weights) if weights is not None else [1.0] * len(functions)
    if len(given) != len(functions):
        raise ValueError(f"{len(given)} reward_weights for {len(functions)} reward_funcs: give one for each")
    return lambda one: sum(weight * function(one) for weight, function in zip(given, functions, strict=True))
