"""The exercises of chapter 09a: count pairs and bytes, and find where one way becomes cheaper.

Each is a count that is easily got wrong: squares for triangles, FP8 without its scales, a crossover without the cost of
choosing, a limit taken for the present.
"""

import math
from itertools import product

from course.exercises.exercise import Exercise, checker, require
from dsa.analysis import flops
from dsa.model.config import Config


def my_pairs(length: int, top_k: int) -> tuple[int, int]:
    """How many pairs (query, key) attend in a prompt: (dense, sparse).

    Token t, counted from 0, sees the tokens 0 to t. Under sparse
    attention it attends to at most top_k of them.
    """
    dense = length * (length + 1) // 2
    few = min(length, top_k)
    sparse = few * (few + 1) // 2 + (length - few) * top_k
    return dense, sparse


def _square(length: int, top_k: int) -> tuple[int, int]:
    """Counts the future: a square and a rectangle where causal attention has a triangle."""
    return length * length, length * min(length, top_k)


def _half_square(length: int, top_k: int) -> tuple[int, int]:
    """Halves the square: the diagonal is lost, and the first tokens are given keys that do not exist."""
    return length * length // 2, length * min(length, top_k)


def _without_itself(length: int, top_k: int) -> tuple[int, int]:
    """Forgets that a token sees itself."""
    few = min(length, top_k)
    return length * (length - 1) // 2, few * (few - 1) // 2 + (length - few) * top_k


def _full_from_the_start(length: int, top_k: int) -> tuple[int, int]:
    """Gives the first tokens top_k keys each, when they see fewer."""
    return length * (length + 1) // 2, length * top_k


def _check_pairs(answer) -> None:
    for length, top_k in ((1, 1), (5, 2), (7, 7), (6, 9), (300, 16)):
        found = answer(length, top_k)
        require(isinstance(found, tuple | list) and len(found) == 2, "return two numbers: dense, sparse")
        dense = sum(t + 1 for t in range(length))
        sparse = sum(min(t + 1, top_k) for t in range(length))
        case = f"with {length} tokens and top-k {top_k}"
        require(found[0] == dense, f"{case} there are {dense} dense pairs, yours are {found[0]}: {_triangle(length)}")
        require(found[1] == sparse, f"{case} there are {sparse} sparse pairs, yours are {found[1]}")


def _triangle(length: int) -> str:
    return "one token sees one key, itself" if length == 1 else "add up 1 + 2 + 3 ..., and mind the last one"


def my_cache_bytes(latent: int, rotary: int, index: int) -> int:
    """Cache bytes of one token in one layer, as deployed.

    `latent` and `index` numbers are FP8, one byte each, and every
    group of 128 of them (the last may be shorter) has an fp32 scale.
    `rotary` numbers are bf16. Latent and index key are stored apart.
    """

    def fp8(count: int) -> int:
        return count + 4 * math.ceil(count / 128)

    return fp8(latent) + 2 * rotary + fp8(index)


def _no_scales(latent: int, rotary: int, index: int) -> int:
    """Forgets that FP8 is of no use without its scales."""
    return latent + 2 * rotary + index


def _rotary_too(latent: int, rotary: int, index: int) -> int:
    """Stores the rotary key in FP8 as well."""
    return latent + rotary + index + 4 * math.ceil((latent + rotary) / 128) + 4 * math.ceil(index / 128)


def _one_scale(latent: int, rotary: int, index: int) -> int:
    """Takes one scale for a whole latent."""
    return latent + 4 + 2 * rotary + index + 4


def _rounds_down(latent: int, rotary: int, index: int) -> int:
    """Leaves a group that is not full without a scale."""
    return latent + 4 * (latent // 128) + 2 * rotary + index + 4 * (index // 128)


def _check_cache(answer) -> None:
    real = answer(512, 64, 128)
    require(real == 788, f"the real model takes 788 bytes (656 + 132), yours says {real}")
    for latent, rotary, index in product((256, 300), (0, 32), (128, 64, 0)):
        right = latent + 4 * math.ceil(latent / 128) + 2 * rotary + index + 4 * math.ceil(index / 128)
        found = answer(latent, rotary, index)
        require(found == right, f"latent {latent}, rotary {rotary}, index {index}: {right} bytes, yours says {found}")


def my_crossover(dense: int, sparse: int, index: int, top_k: int) -> float:
    """At how many visible keys do both ways cost the same? Not rounded.

    Per pair: `dense` FLOP to attend to every key; or `index` FLOP to
    score every key and `sparse` FLOP to attend to top_k of them.
    Return math.inf if never. You may take sparse >= dense for granted.
    """
    if index >= dense:
        return math.inf
    return sparse * top_k / (dense - index)


def _choosing_is_free(dense: int, sparse: int, index: int, top_k: int) -> float:
    """Leaves the indexer out: it reads every key, and never stops."""
    return sparse * top_k / dense


def _same_price(dense: int, sparse: int, index: int, top_k: int) -> float:
    """Prices a chosen pair as a dense one, though it is attended to in another mode."""
    return dense * top_k / (dense - index) if dense > index else math.inf


def _at_top_k(dense: int, sparse: int, index: int, top_k: int) -> float:
    """Takes the length from which keys are dropped: nothing is gained there yet."""
    return float(top_k) if dense > index else math.inf


def _never_forgotten(dense: int, sparse: int, index: int, top_k: int) -> float:
    """Forgets that it may never happen: a negative length, or a division by zero."""
    return sparse * top_k / (dense - index)


def _rounded(dense: int, sparse: int, index: int, top_k: int) -> float:
    """Divides without a remainder, which the round numbers of the real model do not show."""
    return sparse * top_k // (dense - index) if dense > index else math.inf


def _check_crossover(answer) -> None:
    for phase, named in (("prefill", "MHA against MQA"), ("decode", "MQA against MQA")):
        config = Config.v32_exp()
        right = flops.crossover(config, phase, weights=False)
        found = answer(flops.dense_pair_flops(config, phase), 278_528, 16_384, 2048)
        require(abs(found - right) < 1, f"the real model's {phase} ({named}) crosses at {right:,.0f}, not {found:,.0f}")
    found = answer(100, 300, 20, 8)
    require(abs(found - 30) < 1e-6, f"100 a key against 20 a key and 300 for each of 8 cross at 30, not {found:.1f}")
    found = answer(100, 300, 20, 9)
    require(abs(found - 33.75) < 1e-6, f"with 300 for each of 9 they cross at 33.75, not {found:.2f}")
    for index in (100, 150):
        found = answer(100, 300, index, 8)
        require(found == math.inf, f"an indexer of {index} a key beside attention of 100 never pays: return math.inf")


def my_growth(sparse: int, index: int, top_k: int, keys: int) -> float:
    """With which power of the length does a token's cost grow here?

    The cost is `index` FLOP for each of `keys` visible keys, and `sparse`
    FLOP for each that is attended to: at most top_k. If the length
    grows by one per cent and the cost by half a per cent, return 0.5.
    At keys = top_k itself, say how it grows from there on.
    """
    if keys < top_k:
        return 1.0
    growing = index * keys
    return growing / (growing + sparse * top_k)


def _linear(sparse: int, index: int, top_k: int, keys: int) -> float:
    """Says 1, which is true in the limit only."""
    return 1.0


def _constant(sparse: int, index: int, top_k: int, keys: int) -> float:
    """Believes that sparse attention costs the same at every length."""
    return 0.0 if keys >= top_k else 1.0


def _attention_share(sparse: int, index: int, top_k: int, keys: int) -> float:
    """Returns the share of what does *not* grow."""
    attention = sparse * min(keys, top_k)
    return attention / (attention + index * keys) if keys >= top_k else 1.0


def _always_long(sparse: int, index: int, top_k: int, keys: int) -> float:
    """Forgets that below top_k keys the attention grows too."""
    return index * keys / (index * keys + sparse * top_k)


def _check_growth(answer) -> None:
    def cost(keys: float, sparse: int, index: int, top_k: int) -> float:
        return index * keys + sparse * min(keys, top_k)

    cases = ((278_528, 16_384, 2048, 131_072), (278_528, 16_384, 2048, 1000), (10, 1, 16, 17), (5, 5, 4, 4))
    for sparse, index, top_k, keys in cases:
        longer = keys * 1.000001
        ratio = cost(longer, sparse, index, top_k) / cost(keys, sparse, index, top_k)
        right = math.log(ratio) / math.log(longer / keys)
        found = answer(sparse, index, top_k, keys)
        require(
            abs(found - right) < 5e-3,  # measured over a step of one per cent is exact enough
            f"top-k {top_k}, {sparse} and {index} FLOP, {keys:,} keys: the power is {right:.3f}, not {found:.3f}",
        )


EXERCISES = (
    Exercise(
        "Half a square", 1, 10,
        "How many pairs of a query and a key does a prompt of L tokens have? Whoever answers L² reports twice the "
        "FLOP/s that a kernel reaches. Count what causal attention needs, dense and with a top-k.",
        ("Token t sees t + 1 tokens. Add up 1 + 2 + ... + L.",
         "Under a top-k, token t attends to min(t + 1, top_k). The first top_k tokens form a small triangle.",
         "After the triangle come length - top_k rows with exactly top_k each, if the prompt is that long."),
        my_pairs, (_square, _half_square, _without_itself, _full_from_the_start), _check_pairs,
    ),
    Exercise(
        "The cache as deployed", 1, 10,
        "A byte for each number would be too simple. Count what a token leaves in one layer's cache when latent and "
        "index key are FP8. For the real model, 512, 64 and 128, it must come to 788.",
        ("FP8 numbers have one byte, bf16 numbers two, an fp32 scale four.",
         "512 numbers are 4 groups, 128 are one. Round up: `math.ceil`.",
         "The rotary part is bf16 and has no scale."),
        my_cache_bytes, (_no_scales, _rotary_too, _one_scale, _rounds_down), _check_cache,
    ),
    Exercise(
        "Where choosing begins to pay", 2, 15,
        "Dense attention pays for every key. Sparse attention pays a little for every key and much for a few. Find the "
        "length at which both cost the same.",
        ("At S keys dense costs dense * S. Write down what sparse costs for S above top_k.",
         "dense * S = index * S + sparse * top_k. Solve for S.",
         "If a key costs as much to score as to attend to, no length helps."),
        my_crossover, (_choosing_is_free, _same_price, _at_top_k, _never_forgotten, _rounded), _check_crossover,
    ),
    Exercise(
        "Is it still O(L²)?", 3, 20,
        "On logarithmic axes the slope of a cost is the power with which it grows. For a sum of terms, that slope is "
        "the mean of the terms' own powers, weighted by their shares of the cost. What is it here?",
        ("A constant term has the power 0, a term that grows in proportion has the power 1.",
         "For a long context one term grows and one does not: the slope is the share of the one that grows.",
         "Below top_k keys every visible key is attended to, so both terms grow."),
        my_growth, (_linear, _constant, _attention_share, _always_long), _check_growth,
    ),
)  # fmt: skip
check = checker(*EXERCISES)
