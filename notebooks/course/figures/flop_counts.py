"""The pictures of what was counted: pairs, parameters, work by length, its shares, bytes, and costs as published.

Each function returns a figure and the sentence that says what it shows, computed from the same numbers, for
`show(*draw_pair(config))`. What is counted is drawn as modelled, what the report says as published.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course.ui.style import COLOURS, provenance
from dsa.analysis import memory
from dsa.analysis.flops import ATTENTIONS, PHASES, crossover, decode_traffic, index_pair_flops, token_flops
from dsa.analysis.published import Curve, crossing
from dsa.model.config import Config

Drawn = tuple[Figure, str]
LENGTHS = tuple(round(2 ** (n / 4)) for n in range(32, 70))  # 256 to 155,000, four to each doubling
CONTEXT = 131_072
CURVES = (("dense, prefill", "dense", "prefill"), ("dense, decode", "dense", "decode"), ("sparse", "sparse", "decode"))
"""Label, attention, phase. Sparse attention costs the same in both phases: it always runs on the latents."""
MODELLED = provenance("modelled")["linestyle"]


def length_axis(ax: Axes, heights: Sequence[float] = ()) -> None:
    """Make x a logarithmic axis of lengths, and y one with ticks at `heights` if there are any."""
    ax.set(xscale="log", xlabel="tokens in view")
    ax.set_xticks([1024, 8192, 65536], ["1 Ki", "8 Ki", "64 Ki"])
    if heights:
        ax.set_yscale("log")
        ax.set_yticks(heights, [f"{height:,g}" for height in heights])
    ax.minorticks_off()


def draw_pair(config: Config) -> Drawn:
    """FLOP of one pair in one layer, scores and values apart, for the indexer and both modes of attention."""
    c, heads = config, 2 * config.num_attention_heads
    rows = {
        "indexer": (index_pair_flops(c), 0),
        "MHA": (heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), heads * c.v_head_dim),
        "MQA": (heads * (c.kv_lora_rank + c.qk_rope_head_dim), heads * c.kv_lora_rank),
    }
    fig, ax = plt.subplots(figsize=(7, 2.3))
    _stacked(ax, rows, ("scores", "values"), (COLOURS[0], COLOURS[1]))
    ax.set(xlabel="FLOP for one pair in one layer")
    ax.legend(loc="lower right")
    words = ", ".join(f"{name} {score:,} + {value:,}" for name, (score, value) in rows.items())
    return fig, f"Work of one pair, scores + values: {words} FLOP."


def draw_parameters(config: Config) -> Drawn:
    """Parameters that work on a token, in billions, by part."""
    parts = sorted(memory.active_parameters(config).items(), key=lambda part: part[1])
    fig, ax = plt.subplots(figsize=(7, 2.5))
    bars = ax.barh([name for name, _ in parts], [count / 1e9 for _, count in parts], color=COLOURS[0])
    ax.bar_label(bars, [f"{count / 1e9:.2f}" for _, count in parts], padding=3)
    ax.set(xlabel="parameters that work on a token, billions")
    ax.margins(x=0.1)
    return fig, f"Active parameters in billions: {', '.join(f'{name} {n / 1e9:.2f}' for name, n in parts)}."


def work_lines(ax: Axes, config: Config) -> None:
    """GFLOP of one token over the tokens it sees: dense prefill, dense decode, sparse."""
    for label, attention, phase in CURVES:
        flops = [token_flops(config, n, attention, phase).total / 1e9 for n in LENGTHS]
        ax.plot(LENGTHS, flops, label=label, markevery=4, linestyle=MODELLED)
    length_axis(ax, [100, 1000])
    ax.set(ylabel="GFLOP for one token")
    ax.legend(loc="upper left", fontsize=8)


def draw_work(config: Config) -> Drawn:
    """Work of a token by length, beside that of the weights alone."""
    weights = token_flops(config, 1, "dense", "prefill").weights / 1e9
    fig, ax = plt.subplots(figsize=(7, 3.2))
    work_lines(ax, config)
    ax.axhline(weights, color="#777777", linewidth=0.8, label="main model's weights")
    ax.legend(loc="upper left", fontsize=8)
    ends = {label: token_flops(config, CONTEXT, *way).total / 1e9 for label, *way in CURVES}
    words = "; ".join(f"{label} {end:,.0f}" for label, end in ends.items())
    line = f"The thin line, {weights:.0f}, is the main model's weights."
    return fig, f"GFLOP of a token that sees {CONTEXT:,}: {words}. {line}"


def draw_gain(config: Config) -> Drawn:
    """Dense work over sparse work of a token, by length, with the crossovers."""
    fig, ax = plt.subplots(figsize=(7, 3))
    words = []
    for phase, place in (("prefill", (1.25, 0.65)), ("decode", (0.75, 1.5))):
        works = [[token_flops(config, n, kind, phase).total for kind in ATTENTIONS] for n in LENGTHS]
        gain = [dense / sparse for dense, sparse in works]
        ax.plot(LENGTHS, gain, label=phase, markevery=4, linestyle=MODELLED)
        meet = crossover(config, phase)
        at = (place[0] * meet, place[1])
        ax.annotate(f"{meet:,.0f}", (meet, 1), at, ha="center", arrowprops={"arrowstyle": "->"})
        words.append(f"{phase} {min(gain):.2f} at worst, 1 at {meet:,.0f} keys, {gain[-1]:.1f} at {LENGTHS[-1]:,}")
    ax.axhline(1, color="#444444", linewidth=0.8)
    length_axis(ax, [0.5, 1, 2, 5, 10])
    ax.set(ylabel="dense / sparse, FLOP", ylim=(0.5, 12))
    ax.legend(loc="upper left")
    return fig, f"Dense over sparse work of a token: {'; '.join(words)}."


def draw_shares(config: Config) -> Drawn:
    """Shares of sparse work by length: of attention alone, and of the whole token."""
    terms = ("scoring", "attending", "weights")
    works = [token_flops(config, n, "sparse", "decode") for n in (*LENGTHS, CONTEXT)]
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3), sharey=True)
    found = []
    for ax, shown, title in zip(axes, (terms[:2], terms), ("sparse attention", "the whole token"), strict=True):
        parts = [(work.scoring, work.attention, work.weights + work.indexer_weights) for work in works]
        rows = [part[: len(shown)] for part in parts]
        shares = [[part / sum(row) for part in row] for row in rows]
        found.append(shares.pop()[0])
        ax.stackplot(LENGTHS, *zip(*shares, strict=True), labels=shown, colors=COLOURS, hatch=["", "//", ".."])
        ax.axvline(CONTEXT, color="black", linewidth=0.8)
        ax.text(CONTEXT * 0.93, 0.02, "128 Ki", rotation=90, ha="right", va="bottom", color="white")
        length_axis(ax)
        ax.set(xlim=(LENGTHS[0], LENGTHS[-1]), title=title)
        ax.grid(False)
        ax.legend(loc="center left", frameon=True)
    axes[0].set(ylabel="share of the work")
    return fig, f"Scoring at {CONTEXT:,} keys: {found[0]:.0%} of sparse attention, {found[1]:.0%} of the whole token."


def draw_cache(config: Config) -> Drawn:
    """Cache bytes of one token in all layers, with and without index keys, deployed and in bf16."""
    rows: dict[str, tuple[int, int]] = {}
    for precision in ("deployed", "bf16"):
        bare, full = (memory.cache_bytes(config, precision, indexer=kind) for kind in (False, True))
        rows |= {f"sparse, {precision}": (bare, full - bare), f"dense, {precision}": (bare, 0)}
    fig, ax = plt.subplots(figsize=(7, 2.4))
    _stacked(ax, rows, ("latents", "index keys"), (COLOURS[2], COLOURS[3]))
    ax.set(xlabel="cache bytes of one token, all layers")
    ax.margins(x=0.3)
    ax.legend(loc="lower right")
    words = [f"{name} {sum(parts):,}" for name, parts in reversed(rows.items())]  # as the bars stand, from above
    return fig, f"Cache bytes of one token: {'; '.join(words)}."


def draw_reads(config: Config) -> Drawn:
    """GB of cache that one decoded token reads, as deployed, by length."""
    fig, ax = plt.subplots(figsize=(7, 2.9))
    words = []
    for kind in ATTENTIONS:
        reads = [decode_traffic(config, n, kind, "deployed").cache / 1e9 for n in (*LENGTHS, CONTEXT)]
        words.append(f"{kind} {reads.pop():.1f}")
        ax.plot(LENGTHS, reads, label=kind, markevery=4, linestyle=MODELLED)
    length_axis(ax, [0.01, 0.1, 1])
    ax.set(ylabel="GB of cache read a token")
    ax.legend()
    return fig, f"GB of cache read to decode a token at {CONTEXT:,}: {', '.join(words)}."


def draw_published(costs: Mapping[tuple[str, str], Curve]) -> Drawn:
    """The report's Figure 3: dollars by position, dense V3.1-Terminus and sparse V3.2-Exp."""
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3))
    words = []
    for ax, phase in zip(axes, PHASES, strict=True):
        dense, sparse = (costs[phase, model] for model in ("V3.1-Terminus", "V3.2-Exp"))
        for label, curve in (("V3.1-Terminus", dense), ("V3.2-Exp", sparse)):
            places = [position / 1024 for position in curve.positions]
            ax.plot(places, curve.dollars, label=label, linestyle=provenance("published")["linestyle"])
        meet = crossing(dense, sparse)
        ax.annotate("they cross", (meet / 1024, dense.at(meet)), (0.5, 0.3), textcoords="axes fraction",
                    va="center", arrowprops={"arrowstyle": "->"})  # fmt: skip
        ax.set(title=phase, xlabel="position, Ki tokens", ylabel="$ per million tokens", ylim=(0, None))
        ax.legend()
        apart = dense.dollars[-1] / sparse.dollars[-1]
        words.append(
            f"{phase} curves cross at {crossing(dense, sparse) / 1e3:.1f} thousand, end {apart:.2f} times apart"
        )
    return fig, f"Published costs: {'; '.join(words)}."


def _stacked(ax: Axes, rows: Mapping[str, tuple[int, int]], labels: tuple[str, str], colours: tuple[str, str]) -> None:
    """Horizontal bars of two parts."""
    first, second = zip(*rows.values(), strict=True)
    ax.barh(list(rows), first, label=labels[0], color=colours[0])
    ax.barh(list(rows), second, left=first, label=labels[1], color=colours[1], hatch="//")
    ax.xaxis.set_major_formatter("{x:,.0f}")
