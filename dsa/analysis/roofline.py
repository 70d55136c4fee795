"""The published cost curves from first principles: a roofline with the rates that kernels were published to reach.

A roofline says that a kernel takes the longer of two times: its FLOP over the rate at which a machine multiplies, and
its bytes over the rate at which memory delivers. Counts come from :mod:`dsa.analysis.flops`; rates are what the authors
of the kernels state for an H800 (FlashMLA: 660 TFLOP/s dense decoding, 640 sparse prefill, 410 sparse decoding with an
FP8 cache) or what users measured (DeepGEMM's index logits: 960 to 1,145). The one rate nobody published is that of MHA
prefill at these widths: 600, which is 61 % of the machine's peak, is assumed.

What is *not* derived is where a curve starts. At position 0 a token pays for weights, communication and everything
else that does not depend on length; that is taken from the figure, one number for each curve. The slopes, the knees
and the crossovers then follow, and `max_relative_error` says how well. A modelled curve is piecewise linear like a
published one, so two of them are farthest apart, as a ratio, at a corner of either: looking there suffices.

A model can fit without being true. `acceptable_range` moves one rate alone until a curve leaves its margin,
`required_utilization` shows that every batch above a smallest one explains the same start, and `PEAK_SHARES` is a
second model that fits better and says something else: nothing but FLOP, at round shares of the peak
(`implied_utilization`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from dsa.analysis import memory
from dsa.analysis.flops import PHASES, dense_pair_flops, index_pair_flops, mqa_pair_flops
from dsa.analysis.published import Curve
from dsa.model.config import Config

DENSE, SPARSE = "V3.1-Terminus", "V3.2-Exp"
MAX_POSITION = 131_071  # the last position of the published figure
Curves = Mapping[tuple[str, str], Curve]


@dataclass(frozen=True)
class Rates:
    """One GPU and what its kernels reach, in FLOP/s and bytes/s; the defaults are an H800's."""

    mha: float = 600e12  # dense prefill, bf16: assumed
    mqa: float = 660e12  # dense decode, bf16: FlashMLA
    sparse_prefill: float = 640e12  # FlashMLA
    sparse_decode: float = 410e12  # FlashMLA, FP8 cache
    index_prefill: float = 1100e12  # FP8 index logits: DeepGEMM
    index_decode: float = 1100e12
    bandwidth: float = 3.35e12
    peak: float = 989.5e12  # the machine's own, bf16; FP8 has twice as much
    logit_bytes: float = 12  # traffic of one fp32 score of a pair: written once, read twice by the top-k: assumed
    drafted: float = 2  # queries that one decoding pass checks for a sequence (MTP)
    accepted: float = 1.85  # tokens that it yields: V3's report has the second accepted in 85 to 90 % of passes
    dollars_per_hour: float = 2.0  # as the figure states

    def dollars(self, seconds: float) -> float:
        """USD per million tokens of a token that takes `seconds` of one GPU."""
        return 1e6 * seconds * self.dollars_per_hour / 3600


H800 = Rates()
NO_MTP = replace(H800, drafted=1, accepted=1)
PEAK_SHARES = replace(
    NO_MTP,
    mha=0.6 * H800.peak,
    mqa=0.6 * H800.peak,
    sparse_prefill=0.573 * H800.peak,  # the one that is not round
    sparse_decode=0.4 * H800.peak,
    index_prefill=0.4 * 2 * H800.peak,
    index_decode=0.35 * 2 * H800.peak,
    bandwidth=math.inf,
)
H200 = replace(
    NO_MTP, mha=790e12, mqa=790e12, sparse_prefill=790e12, sparse_decode=790e12,
    index_prefill=1580e12, index_decode=1580e12, bandwidth=4.3e12,
)  # fmt: skip
"""No kernel's rates but a floor: 80 % of the peak of an H200, and nine tenths of its memory's speed, for everything."""


# seconds of one GPU, one token, all layers ----------------------------------------------------------------------------


def dense_seconds(config: Config, phase: str, rates: Rates = H800) -> float:
    """Dense attention to one key. Decoding drafts several tokens a pass, which share what is read of the cache."""
    flops = config.num_hidden_layers * dense_pair_flops(config, phase)
    if phase == "prefill":
        return flops / rates.mha
    return _per_decoded_token(flops / rates.mqa, config.num_hidden_layers * memory.latent_bytes(config, "bf16"), rates)


def sparse_seconds(config: Config, phase: str, rates: Rates = H800) -> float:
    """Attention to one selected key, on the latents."""
    flops = config.num_hidden_layers * mqa_pair_flops(config)
    if phase == "prefill":
        return flops / rates.sparse_prefill
    selected = config.num_hidden_layers * memory.latent_bytes(config, "deployed") * rates.drafted  # each its own
    return _per_decoded_token(flops / rates.sparse_decode, selected, rates)


def scoring_seconds(config: Config, phase: str, rates: Rates = H800) -> float:
    """Score one key, and move its score to the top-k and through it."""
    layers = config.num_hidden_layers
    flops, logits = layers * index_pair_flops(config), layers * rates.logit_bytes / rates.bandwidth
    if phase == "prefill":
        return flops / rates.index_prefill + logits  # a tile of queries shares the keys that are read
    scored = _per_decoded_token(flops / rates.index_decode, layers * memory.index_key_bytes(config, "deployed"), rates)
    return scored + logits * rates.drafted / rates.accepted


def _per_decoded_token(seconds: float, cache_bytes: float, rates: Rates) -> float:
    """A decoded token's part of a pass that multiplies for each draft and reads `cache_bytes` once."""
    return max(seconds * rates.drafted, cache_bytes / rates.bandwidth) / rates.accepted


def knee_position(config: Config, phase: str, rates: Rates = H800) -> float:
    """Position of a sparse curve's knee: from here on attention costs the same at every length.

    In decode, K. In prefill, where masked MHA over all keys becomes dearer than K selected keys on the latents.
    """
    if phase == "decode":
        return float(config.indexer.top_k)
    return config.indexer.top_k * sparse_seconds(config, phase, rates) / dense_seconds(config, phase, rates)


# curves ---------------------------------------------------------------------------------------------------------------


def modelled_curves(
    config: Config, base: Mapping[tuple[str, str], float], rates: Rates = H800, last: int = MAX_POSITION
) -> dict[tuple[str, str], Curve]:
    """All four curves, (phase, model) -> Curve, from the dollars at position 0 and the rates.

    A sparse curve gets a knee at `knee_position`; if that lies beyond `last`, K is too large to matter.
    """
    curves = {}
    for (phase, model), start in base.items():
        dense, scoring = dense_seconds(config, phase, rates), scoring_seconds(config, phase, rates)
        if model == DENSE:
            places, seconds = [0, last], [0.0, dense * last]
        else:
            knee = min(round(knee_position(config, phase, rates)), last - 1)
            before = dense if phase == "prefill" else sparse_seconds(config, phase, rates)
            places = [0, knee, last]
            seconds = [0.0, (before + scoring) * knee, before * knee + scoring * last]
        curves[phase, model] = Curve(tuple(places), tuple(start + rates.dollars(s) for s in seconds))
    return curves


def base_costs(published: Curves) -> dict[tuple[str, str], float]:
    """Dollars at position 0 of each published curve: the four numbers that the model takes over."""
    return {key: curve.dollars[0] for key, curve in published.items()}


def relative_error(ours: Curve, theirs: Curve) -> float:
    """Largest relative distance of two piecewise linear curves, with its sign: +0.1 where ours is 10 % too high."""
    corners = {*ours.positions, *theirs.positions}
    return max((ours.at(place) / theirs.at(place) - 1 for place in corners), key=abs)


def max_relative_error(config: Config, published: Curves, rates: Rates = H800) -> float:
    """The largest distance of any of the four curves at any position, without sign."""
    ours = modelled_curves(config, base_costs(published), rates)
    return max(abs(relative_error(ours[key], published[key])) for key in ours)


def slope(curve: Curve) -> float:
    """USD per million tokens that a position adds on the curve's last piece."""
    return (curve.dollars[-1] - curve.dollars[-2]) / (curve.positions[-1] - curve.positions[-2])


def seconds_per_position(curve: Curve, rates: Rates = H800) -> float:
    """GPU seconds that one more visible token costs a token, by a curve's last piece."""
    return slope(curve) / rates.dollars(1.0)


# what a fit can and cannot tell ---------------------------------------------------------------------------------------


def acceptable_range(
    config: Config, published: Curves, name: str, margin: float = 0.10, rates: Rates = H800, reach: float = 8.0
) -> tuple[float, float]:
    """Lowest and highest value of one rate, all others kept, with which every curve stays within `margin`.

    Searched up to `reach` times either way; an end that is never found is the end of the search. Raises ValueError if
    the rates as they are do not fit.
    """
    value = getattr(rates, name)

    def fits(factor: float) -> bool:
        return max_relative_error(config, published, replace(rates, **{name: value * factor})) <= margin

    if not fits(1.0):
        raise ValueError(
            f"the curves are {max_relative_error(config, published, rates):.0%} off with these rates, over {margin:.0%}"
        )
    return value / _largest_factor(lambda x: fits(1 / x), reach), value * _largest_factor(fits, reach)


def _largest_factor(fits: Callable[[float], bool], reach: float) -> float:
    """The largest factor from 1 to `reach` that fits, by bisection."""
    if fits(reach):
        return reach
    low, high = 1.0, reach
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def implied_utilization(config: Config, published: Curves, rates: Rates = H800) -> dict[str, float]:
    """What share of the peak each part of the published curves implies, if it is FLOP alone and one token a pass.

    Slopes give dense attention (bf16 peak) and scoring (FP8 peak); what a sparse curve's last piece, prolonged to
    position 0, lies above its start is attention to K keys (bf16).
    """
    layers, shares = config.num_hidden_layers, {}
    for phase in PHASES:
        dense, sparse = published[phase, DENSE], published[phase, SPARSE]
        rate = layers * dense_pair_flops(config, phase) / seconds_per_position(dense, rates)
        shares[f"dense, {phase}"] = rate / rates.peak
        rate = layers * index_pair_flops(config) / seconds_per_position(sparse, rates)
        shares[f"scoring, {phase}"] = rate / (2 * rates.peak)
        above = sparse.dollars[-1] - slope(sparse) * sparse.positions[-1] - sparse.dollars[0]
        flops = layers * config.indexer.top_k * mqa_pair_flops(config)
        shares[f"selected keys, {phase}"] = flops / (above / rates.dollars(1.0)) / rates.peak
    return shares


def required_utilization(config: Config, start: float, sequences: float, rates: Rates = H800) -> float:
    """The share of the FP8 peak with which a batch explains what decoding costs at position 0, in USD per million.

    A pass over `sequences` sequences reads all weights once, wherever they lie, and multiplies; what reading leaves of
    the cost must be enough for multiplying. Above 1 the batch is impossible: it is too small to pay for the reading.
    """
    tokens = sequences * rates.accepted
    read = memory.weight_bytes_read(config, "deployed", round(sequences * rates.drafted), False) / rates.bandwidth
    left = start / rates.dollars(1.0) - read / tokens
    active = sum(n for part, n in memory.active_parameters(config).items() if part != "indexer")
    needed = 2 * active * rates.drafted / rates.accepted / (2 * rates.peak)
    return needed / left if left > 0 else float("inf")
