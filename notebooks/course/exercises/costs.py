"""The exercises of chapter 09: where a promise holds, what another K would do, what a chat costs, what half an indexer
saves.

Each is a calculation that a reader may want for a system of their own, and each has a short cut that is wrong.
"""

import math
from itertools import product

from course.exercises.exercise import Exercise, checker, require
from dsa.analysis import pricing, roofline
from dsa.analysis.published import crossing
from dsa.model.config import Config


def my_reach(dense: tuple, sparse: tuple, times: float) -> float:
    """From which position on does dense cost `times` as much as sparse?

    `dense` and `sparse` are straight lines: (cost at position 0, cost
    added by each position). Return 0 if it does from the start on, and
    math.inf if it never does. (From the start on means: and stays so.)
    """
    start = times * sparse[0] - dense[0]
    slope = dense[1] - times * sparse[1]
    if slope <= 0:
        return 0.0 if start <= 0 and slope == 0 else math.inf
    return max(0.0, start / slope)


def _slopes_alone(dense: tuple, sparse: tuple, times: float) -> float:
    """Compares the slopes and forgets that both lines start above zero."""
    return 0.0 if dense[1] >= times * sparse[1] else math.inf


def _times_once(dense: tuple, sparse: tuple, times: float) -> float:
    """Multiplies the start of the sparse line and not its slope."""
    slope = dense[1] - sparse[1]
    return max(0.0, (times * sparse[0] - dense[0]) / slope) if slope > 0 else math.inf


def _never_never(dense: tuple, sparse: tuple, times: float) -> float:
    """Divides without looking: where the promise is never kept, the answer is a negative position."""
    return (times * sparse[0] - dense[0]) / (dense[1] - times * sparse[1])


def _no_floor(dense: tuple, sparse: tuple, times: float) -> float:
    """Returns a negative position where dense is that dear from the start."""
    slope = dense[1] - times * sparse[1]
    return (times * sparse[0] - dense[0]) / slope if slope > 0 else math.inf


def _check_reach(answer) -> None:
    cases = (
        ((0.0705, 1.59e-5), (0.144, 8.02e-7), 6, 71_563.9),
        ((0.0529, 4.68e-6), (0.0952, 7.01e-7), 6, 1_093_459.9),
        ((0.0529, 4.68e-6), (0.0952, 7.01e-7), 7, math.inf),
        ((5.0, 2.0), (1.0, 0.5), 3, 0.0),
        ((1.0, 2.0), (1.0, 1.0), 3, math.inf),
    )
    for dense, sparse, times, right in cases:
        found = answer(dense, sparse, times)
        fine = found == right if right in (0.0, math.inf) else abs(found - right) < 1e-3 * right
        require(fine, f"dense {dense} and sparse {sparse}: {times} times from {right:,.0f} on, not {found:,.0f}")


def my_chat(turns: int, question: int, answer: int, cache: bool) -> tuple:
    """Tokens that a chat is billed for: (fresh, cached, written).

    Each turn sends the whole chat so far and a new question, and an
    answer is written. With a cache, all that stood there before a turn
    (answers too) is found; without one nothing is.
    """
    each = question + answer
    before = each * turns * (turns - 1) // 2  # 0 + 1 + ... + (turns - 1)
    fresh = turns * question
    written = turns * answer
    if cache:
        return fresh, before, written
    return fresh + before, 0, written


def _only_what_is_new(turns: int, question: int, answer: int, cache: bool) -> tuple:
    """Thinks that the model remembers: the history is never sent."""
    return turns * question, 0, turns * answer


def _questions_only(turns: int, question: int, answer: int, cache: bool) -> tuple:
    """Forgets that answers are part of the history."""
    before = question * turns * (turns - 1) // 2
    return (turns * question, before, turns * answer) if cache else (turns * question + before, 0, turns * answer)


def _one_too_many(turns: int, question: int, answer: int, cache: bool) -> tuple:
    """Counts the last answer as if it were sent once more."""
    before = (question + answer) * turns * (turns + 1) // 2
    return (turns * question, before, turns * answer) if cache else (turns * question + before, 0, turns * answer)


def _hits_are_free(turns: int, question: int, answer: int, cache: bool) -> tuple:
    """Leaves cached tokens off the bill: they are cheap, and so many that they are most of it."""
    before = 0 if cache else (question + answer) * turns * (turns - 1) // 2
    return turns * question + before, 0, turns * answer


def _check_chat(answer) -> None:
    for turns, question, length, cache in product((1, 2, 7), (0, 50), (10, 200), (True, False)):
        calls = list(pricing.Conversation(0, question, length, turns, float(cache)))
        cached = sum(call.cached for call in calls)
        right = (sum(call.prompt for call in calls) - cached, cached, sum(call.written for call in calls))
        found = answer(turns, question, length, cache)
        require(isinstance(found, tuple | list) and len(found) == 3, "return three numbers: fresh, cached, written")
        case = f"{turns} turns of {question} + {length} tokens {'with' if cache else 'without'} a cache"
        require(tuple(found) == right, f"{case}: {right}, not {tuple(found)}")


def my_crossover(dense: tuple, sparse: tuple, top_k: int) -> float:
    """At which position does a token begin to be cheaper sparse?

    `dense` is (cost at position 0, cost of a key); `sparse` is (cost at
    position 0, cost of scoring a key, cost of attending to a key). The
    sparse start is the higher one. At position p, p keys are scored and
    min(p, top_k) attended to. Return math.inf if it never is cheaper.
    """
    lead = sparse[0] - dense[0]
    gain = dense[1] - sparse[1] - sparse[2]  # before a key is dropped
    if gain * top_k > lead:
        return lead / gain
    gain = dense[1] - sparse[1]
    return (lead + sparse[2] * top_k) / gain if gain > 0 else math.inf


def _same_start(dense: tuple, sparse: tuple, top_k: int) -> float:
    """Counts keys only: the sparse curve begins higher, and that too must be earned back."""
    gain = dense[1] - sparse[1]
    return sparse[2] * top_k / gain if gain > 0 else math.inf


def _always_selecting(dense: tuple, sparse: tuple, top_k: int) -> float:
    """Takes for granted that they cross above top_k."""
    gain = dense[1] - sparse[1]
    return (sparse[0] - dense[0] + sparse[2] * top_k) / gain if gain > 0 else math.inf


def _free_scores(dense: tuple, sparse: tuple, top_k: int) -> float:
    """Forgets that every visible key is scored."""
    return (sparse[0] - dense[0] + sparse[2] * top_k) / dense[1]


def _no_infinity(dense: tuple, sparse: tuple, top_k: int) -> float:
    """Divides by a gain that may be a loss."""
    lead, gain = sparse[0] - dense[0], dense[1] - sparse[1] - sparse[2]
    return lead / gain if gain * top_k > lead else (lead + sparse[2] * top_k) / (dense[1] - sparse[1])


def _check_crossover(answer) -> None:
    starts = {("decode", roofline.DENSE): 0.0705, ("decode", roofline.SPARSE): 0.0952}
    for top_k in (512, 2048, 8192):
        config = Config.v32_exp().replace(index_topk=top_k)
        found = roofline.modelled_curves(config, starts)
        right = crossing(found["decode", roofline.DENSE], found["decode", roofline.SPARSE])
        each = [roofline.H800.dollars(f(config, "decode")) for f in (roofline.scoring_seconds, roofline.sparse_seconds)]
        dense = (0.0705, roofline.H800.dollars(roofline.dense_seconds(config, "decode")))
        mine = answer(dense, (0.0952, *each), top_k)
        require(
            abs(mine - right) < 1e-3 * right, f"decoding with K = {top_k:,} crosses at {right:,.0f}, not {mine:,.0f}"
        )
    mine = answer((1.0, 3.0), (2.0, 0.5, 1.5), 100)
    require(abs(mine - 1) < 1e-3, f"where sparse wins before a key is dropped, here at 1: not {mine:,.2f}")
    for index in (3.0, 4.0):
        mine = answer((1.0, 3.0), (2.0, index, 5.0), 100)
        require(mine == math.inf, "scoring that costs as much as attending is never earned back: return math.inf")


def my_scoring(heads: int, width: int, rate: float, bandwidth: float,
               drafted: int, accepted: float) -> float:  # fmt: skip
    """Seconds of one layer to score one key, for one decoded token.

    A pass scores the key for `drafted` queries, 2 x heads x width FLOP
    each at `rate`, while it reads the key once, width + 4 bytes at
    `bandwidth`: the longer of the two times counts. It yields
    `accepted` tokens, which share it.
    """
    multiply = drafted * 2 * heads * width / rate
    read = (width + 4) / bandwidth
    return max(multiply, read) / accepted


def _adds(heads: int, width: int, rate: float, bandwidth: float, drafted: int, accepted: float) -> float:
    """Adds the two times, which run at once."""
    return (drafted * 2 * heads * width / rate + (width + 4) / bandwidth) / accepted


def _reads_again(heads: int, width: int, rate: float, bandwidth: float, drafted: int, accepted: float) -> float:
    """Reads the key once for each draft, which is what a pass over several queries avoids."""
    return drafted * max(2 * heads * width / rate, (width + 4) / bandwidth) / accepted


def _a_key_a_head(heads: int, width: int, rate: float, bandwidth: float, drafted: int, accepted: float) -> float:
    """Reads a key for each head; the index heads share one."""
    return max(drafted * 2 * heads * width / rate, heads * (width + 4) / bandwidth) / accepted


def _flops_only(heads: int, width: int, rate: float, bandwidth: float, drafted: int, accepted: float) -> float:
    """Counts FLOP alone, and finds that half the heads cost half."""
    return drafted * 2 * heads * width / rate / accepted


def _check_scoring(answer) -> None:
    real = answer(64, 128, 1100e12, 3.35e12, 2, 1.85)
    half = answer(32, 128, 1100e12, 3.35e12, 2, 1.85)
    require(
        abs(half / real - 1) < 1e-9, f"half the heads cost the same, as reading takes longer; yours {half / real:.2f}"
    )
    cases = product((16, 64, 256), (64, 128), (400e12,), (1e12, 3e12), (1, 2), (1.0, 1.85))
    for heads, width, rate, bandwidth, drafted, accepted in cases:
        multiply, read = 2 * drafted * heads * width / rate, (width + 4) / bandwidth
        right, found = max(multiply, read) / accepted, answer(heads, width, rate, bandwidth, drafted, accepted)
        case = f"{heads} heads of {width}, {drafted} drafted, {accepted} accepted"
        require(abs(found / right - 1) < 1e-6, f"{case}: {right * 1e12:.1f} picoseconds, not {found * 1e12:.1f}")


EXERCISES = (
    Exercise(
        "Where a promise holds", 1, 10,
        "“6 to 7 times cheaper.” From which position on? Take the published lines beyond the knee, prolonged back to "
        "position 0, and find out. In decoding 6 times must come out near 72 thousand; in prefill 6 times beyond a "
        "million, and 7 times never.",
        ("Write down both lines at position p, and set one equal to `times` the other.",
         "dense[0] + dense[1] p = times (sparse[0] + sparse[1] p). Solve for p.",
         "If dense does not grow faster than `times` sparse, there is no such position."),
        my_reach, (_slopes_alone, _times_once, _never_never, _no_floor), _check_reach,
    ),
    Exercise(
        "A chat of 500 turns", 2, 15,
        "Which tokens is a chat billed for, with a cache and without? Then price 500 turns of 50 + 200 tokens with "
        "`pricing.LIST_PRICES`, per million: which of the three is the bill?",
        ("Before turn n, counted from 0, n questions and n answers stand there.",
         "0 + 1 + ... + (turns - 1) = turns (turns - 1) / 2.",
         "What stood there before is sent again: it is cached, or fresh if there is no cache."),
        my_chat, (_only_what_is_new, _questions_only, _one_too_many, _hits_are_free), _check_chat,
    ),
    Exercise(
        "The crossover for another K", 2, 15,
        "Somebody trains a model with another top-k. Where does sparse attention begin to pay, in dollars? Then try "
        "K = 512 and K = 8,192 with the numbers of this chapter's model.",
        ("Below top_k every key is scored and attended to: two straight lines. Do they cross there?",
         "Above top_k attending has become the constant sparse[2] * top_k.",
         "The lead of the dense curve at position 0 must be earned back in both cases."),
        my_crossover, (_same_start, _always_selecting, _free_scores, _no_infinity), _check_crossover,
    ),
    Exercise(
        "Half an indexer", 3, 20,
        "An indexer with 32 heads instead of 64 has half the FLOP. What would it save in decoding? Write the roofline "
        "of one scored key, and compare 64, 32 and 16 heads; then 128. What would you change instead of the heads?",
        ("Two times: one for multiplying, one for reading. They overlap, so the longer one counts.",
         "Drafted queries multiply each for itself, but share what is read.",
         "At the end divide by the tokens that a pass yields."),
        my_scoring, (_adds, _reads_again, _a_key_a_head, _flops_only), _check_scoring,
    ),
)  # fmt: skip
check = checker(*EXERCISES)
