"""What a conversation costs: by the price list, and by the GPU time of a cost curve.

All that people do with a long context is here one thing, a conversation: something long is read first (a document, a
repository, nothing), then turns follow, each a question and an answer. The model keeps nothing between two requests, so
each turn sends everything again. A cache of prompts makes that bearable: what stood there before, at the same place,
is not read a second time. How much of it is found is `hit_rate`; a cache finds beginnings, so half a hit saves the
*first* half, which is the cheap one where a token's cost grows with its position.

Two bills follow from the same requests. The price list asks for fresh, cached and written tokens, the same for each
wherever it stands. The GPU bill adds up a curve of `analysis.roofline` or of the published figure over the very
positions that are computed. It is compute only: to keep a cache and to fetch it is not in the figure, so here it is
free, and neither bill knows the other's margin.

Prices: DeepSeek's own list for V3.2-Exp.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsa.analysis.published import Curve
from dsa.analysis.roofline import DENSE, H800, MAX_POSITION, SPARSE, Curves, modelled_curves
from dsa.model.config import Config


@dataclass(frozen=True)
class Prices:
    """USD per million tokens."""

    fresh: float = 0.28
    cached: float = 0.028
    written: float = 0.42


LIST_PRICES = Prices()


@dataclass(frozen=True)
class Request:
    """One request: a prompt, how much of its beginning the cache has, and how much is written."""

    prompt: int
    cached: int
    written: int


@dataclass(frozen=True)
class Conversation:
    """A conversation, in tokens: `opening` is read, then `turns` times a question comes and an answer is written.

    `hit_rate` is the share of what stood there before that the cache finds. Raises ValueError for what cannot be, and
    for a conversation longer than the context.
    """

    opening: int
    question: int
    answer: int
    turns: int
    hit_rate: float = 1.0

    def __post_init__(self) -> None:
        if min(self.opening, self.question, self.answer) < 0 or self.turns < 1:
            raise ValueError(f"{self}: lengths are 0 or more, turns 1 or more")
        if not 0 <= self.hit_rate <= 1:
            raise ValueError(f"hit_rate={self.hit_rate} is a share: choose 0 to 1")
        if self.length > MAX_POSITION:
            limit = f"the context has {MAX_POSITION:,}"
            raise ValueError(f"it grows to {self.length:,} tokens and {limit}: take fewer turns")

    @property
    def length(self) -> int:
        """Tokens of the whole conversation."""
        return self.opening + self.turns * (self.question + self.answer)

    def __iter__(self) -> Iterator[Request]:
        """What is sent and written, turn by turn."""
        before, known = self.opening, 0
        for _ in range(self.turns):
            yield Request(before + self.question, round(self.hit_rate * known), self.answer)
            before += self.question + self.answer
            known = before


DOCUMENT = Conversation(opening=60_000, question=100, answer=900, turns=5)
CHAT = Conversation(opening=500, question=50, answer=200, turns=500)
REPOSITORY = Conversation(opening=40_000, question=1_200, answer=300, turns=50)
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


def list_price_bill(requests: Iterable[Request], prices: Prices = LIST_PRICES) -> Bill:
    """The bill by the list, of a `Conversation` or of single requests."""
    sent = list(requests)
    fresh, cached = sum(r.prompt - r.cached for r in sent), sum(r.cached for r in sent)
    written = sum(r.written for r in sent)
    return Bill(fresh * prices.fresh / 1e6, cached * prices.cached / 1e6, written * prices.written / 1e6)


def gpu_time_bill(requests: Iterable[Request], prefill: Curve, decode: Curve, scale: float = 1.0) -> Bill:
    """The bill in GPU time, times `scale`: each computed token at its own position."""
    fresh = written = 0.0
    for request in requests:
        fresh += prefill.total(request.cached, request.prompt)
        written += decode.total(request.prompt, request.prompt + request.written)
    return Bill(scale * fresh, 0.0, scale * written)


@dataclass(frozen=True)
class Scenario:
    """A conversation and the machine it runs on; what a tornado moves, one at a time."""

    conversation: Conversation
    model: str = SPARSE
    top_k: int = 2048
    index_heads: int = 64
    dollars_per_hour: float = H800.dollars_per_hour

    def varied(self, **changes: Any) -> "Scenario":
        """The same scenario with some fields changed, the conversation's included."""
        inner = {name: changes.pop(name) for name in Conversation.__dataclass_fields__ if name in changes}
        return replace(self, **changes, conversation=replace(self.conversation, **inner))


def modelled_gpu_bill(config: Config, base: Mapping[tuple[str, str], float], scenario: Scenario) -> Bill:
    """The GPU bill of a scenario by the modelled curves; the price of a GPU scales all of it, base costs included."""
    scale = scenario.dollars_per_hour / H800.dollars_per_hour
    chosen = config.replace(index_topk=scenario.top_k, index_n_heads=scenario.index_heads)
    curves = modelled_curves(chosen, base, H800)
    prefill, decode = (curves[phase, scenario.model] for phase in ("prefill", "decode"))
    return gpu_time_bill(scenario.conversation, prefill, decode, scale)


@dataclass(frozen=True)
class Bar:
    """One bar of a tornado: what was set to which two values, and the cost there."""

    name: str
    values: tuple[Any, Any]
    costs: tuple[float, float]

    @property
    def spread(self) -> float:
        """How much it matters."""
        return abs(self.costs[1] - self.costs[0])


def tornado(cost: Callable[[Scenario], float], scenario: Scenario, changes: Mapping[str, tuple[Any, Any]]) -> list[Bar]:
    """Move one thing at a time to two values and compute the cost: the bars, the most important first."""
    bars = []
    for name, values in changes.items():
        low, high = (cost(scenario.varied(**{name: value})) for value in values)
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


def published_gpu_bills(published: Curves, conversation: Conversation) -> dict[str, Bill]:
    """The GPU bill by the published curves, for both models."""
    return {m: gpu_time_bill(conversation, published["prefill", m], published["decode", m]) for m in (DENSE, SPARSE)}
