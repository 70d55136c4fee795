"""The bug catalogue: mistakes that were made with index scores, and what one sees of each.

An entry is one of `injected_bugs.BUGS`, switched on while a model reads. What is recorded is what a test could look
at: how far logits move, how many of the chosen tokens are others, and whether needles are still answered. With K >= S
nearly every bug is invisible, since every visible token is chosen whatever its score; the catalogue makes that a
number. For readers who write a test of their own there is a `fixture_model`, small enough to be read many times in a
moment, and a row of `cases`, right and wrong.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from course.bugs.injected_bugs import Bug, Patch, find_bug
from dsa.datasets.recall_tasks import Episodes
from dsa.kernels import ops
from dsa.kernels.loops import EMPTY
from dsa.kernels.reference import selection_mask
from dsa.model.attention import Attention
from dsa.model.config import Config
from dsa.model.transformer import Transformer

INDEXER_BUGS = (
    "neighbours in the indexer",
    "index layout reversed",
    "no ReLU",
    "softmax over head weights",
    "RMSNorm for the index key",
    "LayerNorm with eps 1e-5",
    "unnormalised query latent",
    "Hadamard on the query only",
    "mask after top-k",
    "mask with 0",
    "fillers not masked again",
)
VISIBLE_CHANGE = 1e-3  # a logit that moves by more was moved by the mistake: in fp64 rounding moves them by some 1e-14


@dataclass(frozen=True)
class BugEffect:
    """What a bug did.

    Attributes:
        logits: the largest change of any logit.
        swapped: the share of the chosen tokens that the right model would not have chosen, or the other way round.
        answered: the share of the needles still answered right.
    """

    logits: float
    swapped: float
    answered: float

    @property
    def visible(self) -> bool:
        """Could a test of logits have noticed?"""
        return self.logits > VISIBLE_CHANGE


@dataclass(frozen=True)
class _Run:
    logits: Tensor
    chosen: Tensor  # (layers, B, T, S) booleans
    answered: float


def bug_effects(model: Transformer, episodes: Episodes, top_k: int) -> Callable[[Bug | str], BugEffect]:
    """Let a model read needle episodes with K = `top_k`; the function that is returned applies one bug after another.

    Use fp64: in fp32 rounding alone may make a router choose another expert, and then logits move without a mistake.
    The model's settings are restored. Raises ValueError for a bug of unknown name or a model without indexers.
    """
    right = _run(model, episodes, top_k)

    def effect(bug: Bug | str) -> BugEffect:
        with (find_bug(bug) if isinstance(bug, str) else bug).apply():
            other = _run(model, episodes, top_k)
        common = (right.chosen & other.chosen).sum() / torch.maximum(right.chosen.sum(), other.chosen.sum())
        moved = (right.logits - other.logits).abs().max()
        return BugEffect(float(moved), float(1 - common), other.answered)

    return effect


@torch.no_grad()
def _run(model: Transformer, episodes: Episodes, top_k: int) -> _Run:
    before = model.attention, model.top_k
    try:
        model.attention, model.top_k = "sparse", top_k
        logits, trace = model(episodes.tokens, trace=True)
    finally:
        model.attention, model.top_k = before
    chosen = torch.stack([selection_mask(layer.selected, episodes.tokens.shape[1]) for layer in trace])
    return _Run(logits, chosen, float(episodes.correct(logits).float().mean()))


def draw_bug_effects(found: Mapping[int, Mapping[str, BugEffect]]) -> tuple[Figure, str]:
    """How far each bug moves a logit, for each K in `found`; a change of zero is drawn at the left edge, 1e-16."""
    fig, ax = plt.subplots(figsize=(6.6, 3.2))
    said = []
    for i, (marker, (top_k, effects)) in enumerate(zip("os^D", found.items(), strict=False)):
        moved = [max(one.logits, 1e-16) for one in effects.values()]
        places = [n + 0.25 * (i - (len(found) - 1) / 2) for n in range(len(moved))]  # beside each other
        ax.plot(moved, places, marker, markersize=6, label=f"K = {top_k}")
        said.append(f"with K = {top_k} {sum(one.visible for one in effects.values())} of {len(moved)}")
    names = list(next(iter(found.values())))
    ax.axvline(VISIBLE_CHANGE, color="#888888", linewidth=0.8, marker="")
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(xlabel="largest change of a logit (zero drawn at 1e-16)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(found))
    return fig, f"Exhibits that move a logit by more than {VISIBLE_CHANGE:g}: {', '.join(said)}."


def shrink_keys(model: Transformer, factor: float = 1e-3) -> Transformer:
    """A copy whose index keys are `factor` times as large before their LayerNorm: small enough for its eps to count."""
    small = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in small.named_parameters():
            if name.endswith(".indexer.wk.weight"):
                weight.mul_(factor)
    return small


def chosen_sets(selected: Tensor) -> list[set[int]]:
    """The selection of one sequence as sets, empty slots left out: (T, K) -> T sets."""
    return [{s for s in row if s != EMPTY} for row in selected.tolist()]


# ---- for the reader's own test

TOKENS, TOP_KS = 40, (4, 8, 64)


@dataclass(frozen=True)
class Golden:
    """What a right model gave: logits (1, T, vocab), and the chosen tokens, sets[layer][t]."""

    logits: Tensor
    sets: list[list[set[int]]]


def _another_order(q: Tensor, k: Tensor, w: Tensor, top_k: int, right=ops.index_topk) -> Tensor:
    return right(q, k, w, top_k).flip(-1)


REORDERED = Patch(ops, "index_topk", _another_order)
MASK_BUGS = ("mask after top-k", "mask with 0", "fillers not masked again")
"""Bugs with the future, which the last query does not have. In the last layer alone nothing carries them to it, and
nothing carries them to a logit either: there the fixture model's attention writes nothing."""


def in_one_layer(layer: int, bug: Bug) -> Patch:
    """Inject the bug only where one layer chooses its tokens."""
    right = Attention.select

    def select(self: Attention, *arguments: Any) -> Tensor | None:
        with bug.apply() if self.layer == layer else nullcontext():
            return right(self, *arguments)

    return Patch(Attention, "select", select)


@lru_cache(maxsize=1)
def fixture_model() -> tuple[Transformer, Tensor, dict[int, Golden]]:
    """A small random model, tokens, and what is right for them.

    Its index keys are small, or an eps would not count. And the output projection of its last layer is still zero, as
    many trainings start it: what that layer selects moves no logit, so that only the selection itself can tell.
    """
    config = Config.mini().replace(index_n_heads=4, max_position_embeddings=64)
    model = Transformer(config)
    model.reset_parameters(35)
    generator = torch.Generator().manual_seed(35)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and "correction" not in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        model.model.layers[-1].get_submodule("self_attn.o_proj").get_parameter("weight").zero_()
    model = shrink_keys(model.eval())
    tokens = torch.randint(256, (1, TOKENS), generator=generator)
    golden = {}
    for top_k in TOP_KS:
        model.top_k = top_k
        logits, trace = model(tokens, trace=True)
        golden[top_k] = Golden(logits.detach(), [chosen_sets(layer.selected[0]) for layer in trace])
    return model, tokens, golden


def cases() -> Iterator[tuple[str, AbstractContextManager[None], bool]]:
    """What the reader's test is given: a name, the circumstance, and whether the model is right in it."""
    yield "the right model", nullcontext(), True
    yield "a right model that lists its tokens in another order", REORDERED(), True
    for name in INDEXER_BUGS:
        yield name, find_bug(name).apply(), False
    last = len(fixture_model()[0].model.layers) - 1
    for name in MASK_BUGS:
        yield f"{name}, in the last layer only", in_one_layer(last, find_bug(name))(), False
