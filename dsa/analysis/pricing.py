"""What a piece of work costs: by the price list, and by the GPU time of a cost curve.

All that people do with a long context is here one thing, a conversation: something long is read first (a document, a
repository, nothing), then turns follow, each a question and an answer. The model keeps nothing between two calls, so
each turn sends everything again. A cache of prompts makes that bearable: what stood there before, at the same place,
is not read a second time. How much of it is found is `hit`; a cache finds beginnings, so half a hit saves the *first*
half, which is the cheap one where a token's cost grows with its position.

Two bills follow from the same calls. The price list asks for fresh, cached and written tokens, the same for each
wherever it stands. The GPU bill adds up a curve of `analysis.roofline` or of the published figure over the very
positions that are computed. It is compute only: to keep a cache and to fetch it is not in the figure, so here it is
free, and neither bill knows the other's margin.

Prices: DeepSeek's own list for V3.2-Exp.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsa.analysis.published import Curve
from dsa.analysis.roofline import DENSE, H800, LAST, SPARSE, Costs, modelled
from dsa.model.config import Config


@dataclass(frozen=True)
class Prices:
    """USD per million tokens."""

    fresh: float = 0.28
    cached: float = 0.028
    written: float = 0.42


LIST = Prices()


@dataclass(frozen=True)
class Call:
    """One call: a prompt, how much of its beginning the cache has, and how much is written."""

    prompt: int
    cached: int
    written: int


@dataclass(frozen=True)
class Work:
    """A conversation, in tokens: `opening` is read, then `turns` times a question comes and an answer is written.

    `hit` is the share of what stood there before that the cache finds. Raises ValueError for what cannot be, and for a
    conversation longer than the context.
    """

    opening: int
    question: int
    answer: int
    turns: int
    hit: float = 1.0

    def __post_init__(self) -> None:
        if min(self.opening, self.question, self.answer) < 0 or self.turns < 1:
            raise ValueError(f"{self}: lengths are 0 or more, turns 1 or more")
        if not 0 <= self.hit <= 1:
            raise ValueError(f"hit={self.hit} is a share: choose 0 to 1")
        if self.length > LAST:
            raise ValueError(f"it grows to {self.length:,} tokens and the context has {LAST:,}: take fewer turns")

    @property
    def length(self) -> int:
        """Tokens of the whole conversation."""
        return self.opening + self.turns * (self.question + self.answer)

    def __iter__(self) -> Iterator[Call]:
        """What is sent and written, turn by turn."""
        before, known = self.opening, 0
        for _ in range(self.turns):
            yield Call(before + self.question, round(self.hit * known), self.answer)
            before += self.question + self.answer
            known = before


DOCUMENT = Work(opening=60_000, question=100, answer=900, turns=5)
CHAT = Work(opening=500, question=50, answer=200, turns=500)
REPOSITORY = Work(opening=40_000, question=1_200, answer=300, turns=50)
"""Ask a book five questions; chat five hundred times; let an agent work fifty steps on a repository."""


@dataclass(frozen=True)
class Bill:
    """USD by what they are paid for. A GPU bill has nothing under `cached`."""

    fresh: float
    cached: float
    written: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.fresh + self.cached + self.written


def priced(calls: Iterable[Call], prices: Prices = LIST) -> Bill:
    """The bill by the list, of a `Work` or of single calls."""
    sent = list(calls)
    fresh, cached = sum(c.prompt - c.cached for c in sent), sum(c.cached for c in sent)
    written = sum(c.written for c in sent)
    return Bill(fresh * prices.fresh / 1e6, cached * prices.cached / 1e6, written * prices.written / 1e6)


def computed(calls: Iterable[Call], prefill: Curve, decode: Curve, scale: float = 1.0) -> Bill:
    """The bill in GPU time, times `scale`: each computed token at its own position."""
    fresh = written = 0.0
    for call in calls:
        fresh += prefill.total(call.cached, call.prompt)
        written += decode.total(call.prompt, call.prompt + call.written)
    return Bill(scale * fresh, 0.0, scale * written)


@dataclass(frozen=True)
class Case:
    """A conversation and the machine it runs on; what a tornado moves, one at a time."""

    work: Work
    model: str = SPARSE
    top_k: int = 2048
    index_heads: int = 64
    dollars_per_hour: float = H800.dollars_per_hour

    def moved(self, **changes: Any) -> "Case":
        """The same case with some fields changed, the conversation's included."""
        own = {name: value for name, value in changes.items() if name not in Work.__dataclass_fields__}
        inner = {name: value for name, value in changes.items() if name in Work.__dataclass_fields__}
        return replace(self, **own, work=replace(self.work, **inner))


def modelled_bill(config: Config, starts: Mapping[tuple[str, str], float], case: Case) -> Bill:
    """The GPU bill of a case by the modelled curves; the price of a GPU scales all of it, starts included."""
    scale = case.dollars_per_hour / H800.dollars_per_hour
    chosen = config.replace(index_topk=case.top_k, index_n_heads=case.index_heads)
    curves = modelled(chosen, starts, H800)
    return computed(case.work, curves["prefill", case.model], curves["decode", case.model], scale)


@dataclass(frozen=True)
class Bar:
    """One bar of a tornado: what was moved to which two values, and the cost there."""

    name: str
    values: tuple[Any, Any]
    costs: tuple[float, float]

    @property
    def spread(self) -> float:
        """How much it matters."""
        return abs(self.costs[1] - self.costs[0])


def tornado(cost: Callable[[Case], float], case: Case, changes: Mapping[str, tuple[Any, Any]]) -> list[Bar]:
    """Move one thing at a time to two values and compute the cost: the bars, the most important first."""
    bars = []
    for name, values in changes.items():
        low, high = (cost(case.moved(**{name: value})) for value in values)
        bars.append(Bar(name, values, (low, high)))
    return sorted(bars, key=lambda bar: -bar.spread)


def break_even(curve: Curve, price: float) -> float | None:
    """Position from which one token costs more GPU time than `price`, USD per million; None if it never does.

    For a curve that rises, as all of them do.
    """
    if curve.dollars[-1] <= price:
        return None
    low, high = 0.0, float(curve.positions[-1])
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if curve.at(middle) <= price else (low, middle)
    return high


def costs_of(published: Costs, work: Work) -> dict[str, Bill]:
    """The GPU bill by the published curves, for both models."""
    return {m: computed(work, published["prefill", m], published["decode", m]) for m in (DENSE, SPARSE)}
