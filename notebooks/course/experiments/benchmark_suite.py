"""Fourteen small benchmarks: does a sparse model do everything that its dense baseline does?

The report holds V3.2-Exp against its dense predecessor on fourteen public benchmarks, one number each. These are ours,
made for a model of half a million weights: needles by distance and by load, text near its beginning and far from it,
copying, and induction (what has stood in the text before is to be continued). Each asks for tokens and counts how many
are the likeliest one of the whole vocabulary. None is about text alone, where a window is as good as an indexer.

Every number has an error here. Two models answer the *same* questions, so what counts is the difference on each
sequence: a hard one is hard for both, and most of the chance in the questions cancels. What is left is the chance in
the training, which only more seeds can show; :func:`differences` takes the spread over them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from dsa.datasets.corpus import Corpus
from dsa.datasets.recall_tasks import Copy, Episodes, Needles
from dsa.model.transformer import Transformer
from dsa.training import evaluate

LENGTH, SEQUENCES = 512, 24
DISTANCES = {"1-64": (1, 64), "65-128": (65, 128), "129-256": (129, 256), "over 256": (257, 1 << 30)}
LOADS = (2, 16, 32)  # pairs in a sequence; no training has seen 32
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}  # 95 %, by the number of seeds
Row = dict[str, Any]


@dataclass(frozen=True)
class EvalSet:
    """Sequences ``tokens`` (n, T) and, by benchmark, which of their tokens are to be predicted: (n, T) bool each."""

    tokens: Tensor
    asked: Mapping[str, Tensor]


def eval_sets(
    corpus: Corpus, length: int = LENGTH, sequences: int = SEQUENCES, seed: int = evaluate.SEED
) -> list[EvalSet]:
    """The whole suite, drawn from the seed and from held-out text. ValueError for a length under 256."""
    if length < 256:
        raise ValueError(f"length={length}: the needles of the suite need 256 tokens or more")
    rng = torch.Generator().manual_seed(seed)
    parts = (_distances, _loads, _text, _copies, _induction)
    return [eval_set for part in parts for eval_set in part(corpus, length, sequences, rng)]


def names(suite: Sequence[EvalSet]) -> list[str]:
    """The benchmarks, in order."""
    return [name for eval_set in suite for name in eval_set.asked]


def _answers(episodes: Episodes) -> Tensor:
    """Where the answers stand, right after their questions: (n, T) bool."""
    return torch.zeros_like(episodes.tokens, dtype=torch.bool).scatter(1, episodes.query + 1, True)


def _distances(corpus: Corpus, length: int, sequences: int, rng: torch.Generator) -> Iterator[EvalSet]:
    found = Needles(corpus, length, 8, 8, "held_out").generate(rng, 2 * sequences)
    back = torch.zeros_like(found.tokens).scatter(1, found.query + 1, found.distance)
    masks = {f"needle {name} back": (back >= least) & (back <= most) for name, (least, most) in DISTANCES.items()}
    yield EvalSet(found.tokens, masks)


def _loads(corpus: Corpus, length: int, sequences: int, rng: torch.Generator) -> Iterator[EvalSet]:
    for pairs in LOADS:
        found = Needles(corpus, length, pairs, pairs, "held_out").generate(rng, sequences)
        yield EvalSet(found.tokens, {f"{pairs} needles": _answers(found)})


def _text(corpus: Corpus, length: int, sequences: int, rng: torch.Generator) -> Iterator[EvalSet]:
    tokens = corpus.batch(rng, sequences, length, "held_out")
    place = torch.arange(length).expand(sequences, -1)
    yield EvalSet(tokens, {"text, first 64": (place > 0) & (place < 64), "text, last half": place >= length // 2})


def _copies(corpus: Corpus, length: int, sequences: int, rng: torch.Generator) -> Iterator[EvalSet]:
    for size in (64, 96):
        found = Copy(size).generate(rng, sequences)
        yield EvalSet(found.tokens, {f"copy {size}": found.loss_mask})


def _induction(corpus: Corpus, length: int, sequences: int, rng: torch.Generator) -> Iterator[EvalSet]:
    passage, between = length // 8, length // 2
    text = corpus.batch(rng, sequences, passage + between, "held_out")
    noise = torch.randint(32, 127, (sequences, passage), generator=rng)  # printable bytes, no text
    yield _repeated(text[:, :passage], text[:, :0], "text, again at once")
    yield _repeated(text[:, :passage], text[:, passage:], "text, again far on")
    yield _repeated(noise, noise[:, :0], "random bytes, again")


def _repeated(passage: Tensor, between: Tensor, name: str, lead: int = 8) -> EvalSet:
    """A passage twice; of the second time all but the first ``lead`` tokens, which say what is coming, are asked."""
    tokens = torch.cat([passage, between, passage], 1)
    asked = torch.arange(tokens.shape[1]) >= passage.shape[1] + between.shape[1] + lead
    return EvalSet(tokens, {name: asked.expand(len(tokens), -1)})


def evaluate_suite(model: Transformer, suite: Sequence[EvalSet], attention: str, top_k: int) -> dict[str, Tensor]:
    """Each benchmark's share right by sequence: (n,), nan where a sequence asks nothing."""
    found: dict[str, list[Tensor]] = {name: [] for name in names(suite)}
    with evaluate.set_to(model, attention, top_k):
        for eval_set in suite:
            for part in torch.arange(len(eval_set.tokens)).split(evaluate.BATCH):
                tokens = eval_set.tokens[part]
                # logits at t are about the token at t + 1, and so are the masks
                hit = model(tokens)[:, :-1].argmax(-1) == tokens[:, 1:]
                for name, mask in eval_set.asked.items():
                    asked = mask[part, 1:]
                    found[name].append((hit & asked).sum(1) / asked.sum(1))  # 0 / 0 = nan: it asked nothing
    return {name: torch.cat(parts) for name, parts in found.items()}


def rows(right: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> list[Row]:
    """One row a benchmark: the mean, and what is missing to the dense baseline with its error over paired sequences."""
    found = []
    for name, own in right.items():
        gap = own - dense[name]
        gap = gap[~gap.isnan()]  # paired by sequence, so a hard one is hard for both
        measures = {"right": own.nanmean(), "over_dense": gap.mean(), "error": gap.std() / len(gap) ** 0.5}
        found.append({"benchmark": name} | {key: round(value.item(), 5) for key, value in measures.items()})
    return found


def differences(found: Sequence[Row], model: str) -> list[Row]:
    """Over the seeds of a record: dense, model, their difference and the half width of its 95 % interval (Student).

    ``noise`` says whether that interval holds 0. Raises ValueError for fewer than two seeds, or a number without a
    factor in STUDENT.
    """
    table = []
    for name in dict.fromkeys(row["benchmark"] for row in found):
        own, dense = ([r for r in found if (r["benchmark"], r["model"]) == (name, who)] for who in (model, "dense"))
        gaps = [row["over_dense"] for row in own]
        if len(gaps) not in STUDENT:
            raise ValueError(f"{len(gaps)} seeds of {model!r}: an interval needs one of {list(STUDENT)}")
        half = STUDENT[len(gaps)] * stdev(gaps) / len(gaps) ** 0.5
        line = {"benchmark": name, "dense": mean(r["right"] for r in dense), "model": mean(r["right"] for r in own)}
        table.append(line | {"difference": mean(gaps), "half": half, "noise": abs(mean(gaps)) <= half})
    return table
