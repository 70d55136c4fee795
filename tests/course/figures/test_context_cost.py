"""Chapter 09a's panel at every position, and its pictures against an independent computation."""

import re

import matplotlib.pyplot as plt
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from course.figures import context_cost, flop_counts
from course.figures.context_cost import draw_context_cost, token_gain
from course.ui.panel import Choice, Panel, Slider
from dsa.analysis import memory
from dsa.analysis.published import read_costs
from dsa.model.config import Config
from project import DATA

REAL = Config.v32_exp()
START = {"length": 128, "top_k": 2048, "heads": 128, "precision": "deployed"}


@pytest.fixture(scope="module")
def draw():
    return draw_context_cost(REAL)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def panel(draw):
    """The panel of the chapter."""
    return Panel(
        draw,
        length=Slider("length in Ki tokens", 1, 160, 128),
        top_k=Slider("top-k", 256, 8192, 2048, step=256),
        heads=Choice("heads", (16, 32, 64, 128), 128),
        precision=Choice("precision", memory.PRECISIONS, "deployed"),
    )


def numbers(sentence):
    """Every number of a sentence, in order."""
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*\.?\d*", sentence)]


def by_hand(length, top_k, heads, precision):
    """What the sentence must say, from the sizes of the published config alone."""
    keys, layers = 1024 * length, 61
    attention = 7168 * 1536 + 1536 * heads * 192 + 7168 * 576 + 512 * heads * 256 + heads * 128 * 7168
    active = 61 * attention + 9 * 7168 * 18432 + 58 * (27 * 7168 * 2048 + 7168 * 256) + 129280 * 7168
    mha, mqa, indexer = 640 * heads, 2176 * heads, 61 * (1536 * 8192 + 7168 * 192)
    dense = [2 * active + layers * keys * pair for pair in (mha, mqa)]
    scoring = layers * keys * 16_384
    sparse = 2 * (active + indexer) + scoring + layers * min(keys, top_k) * mqa
    latent, index = {"fp32": (2304, 512), "bf16": (1152, 256), "deployed": (656, 132)}[precision]
    read = layers * (min(keys, top_k) * latent + keys * index)
    return {
        "work": [keys, dense[0] / 1e9, dense[1] / 1e9, sparse / 1e9, 100 * scoring / sparse],
        "cache": [keys * layers * n / 1e9 for n in (latent + index, latent)]
        + [read / 1e9, keys * layers * latent / 1e9],
    }


def test_every_position_says_what_the_sizes_say(draw):
    made = panel(draw)
    positions = list(made.grid(100))
    assert len(positions) > 40
    for position in positions:
        fig, sentence = draw(**position)
        said, right = numbers(sentence), by_hand(**position)
        assert said[:5] == pytest.approx(right["work"], abs=0.51), position
        assert said[-4:] == pytest.approx(right["cache"], abs=0.0051), position
        assert len(fig.axes) == 2
        plt.close(fig)


def test_bars_are_what_the_sentence_says(draw):
    fig, _ = draw(**START)
    bars = [bar.get_height() for bar in fig.axes[1].patches]
    held, bare, read, _ = by_hand(**START)["cache"]
    index_keys = 61 * 131_072 * 132 / 1e9
    assert bars == pytest.approx([bare, bare, bare, read - index_keys, 0, 0, held - bare, index_keys])


def test_each_control_changes_picture_or_sentence(draw):
    before = draw(**START)[1]
    for change in ({"length": 64}, {"top_k": 4096}, {"heads": 64}, {"precision": "bf16"}):
        assert draw(**START | change)[1] != before


def test_few_heads_never_pay_in_prefill(draw):
    assert "cheaper at no length in prefill" in draw(**START | {"heads": 16})[1]
    assert "cheaper above 9,130 tokens in prefill and above 2,282 tokens in decode" in draw(**START)[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"length": 0}, "length = 0 lies outside 1 to 160"),
        ({"length": 161}, "length = 161 lies outside"),
        ({"length": 1.5}, "not a whole number"),
        ({"top_k": 0}, "top-k = 0"),
        ({"heads": 0}, "heads = 0"),
        ({"precision": "int3"}, "precision='int3'"),
    ],
)
def test_what_the_model_cannot_have_is_refused(draw, change, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        draw(**START | change)


def test_the_gain_of_a_token_is_a_ratio_of_two_clocks_and_of_two_counts(monkeypatch):
    flop = {}

    def counted(calls, repeats):
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                call()
            flop[name] = counter.get_total_flops()
        return flop

    monkeypatch.setattr(context_cost, "cpu_seconds", counted)
    measured, promised = token_gain(4096)
    assert measured == flop["dense"] / flop["sparse"] and promised == 17 * 4096 / (4096 + 17 * 64)
    assert measured == pytest.approx(promised, rel=0.1), "what is timed is what is counted"
    assert token_gain(32)[1] == 17 / 18, "with every key kept, scoring is all in vain"


DRAWN = (
    (flop_counts.draw_pair, "indexer 16,384 + 0, MHA 49,152 + 32,768, MQA 147,456 + 131,072"),
    (flop_counts.draw_parameters, "indexer 0.85, head 0.93, feed-forward 3.74, attention 11.41, experts 20.43"),
    (flop_counts.draw_work, "dense, prefill 728; dense, decode 2,300; sparse 241"),
    (flop_counts.draw_gain, "1 at 9,130 keys"),
    (flop_counts.draw_shares, "79% of sparse attention, 54% of the whole token"),
    (
        flop_counts.draw_cache,
        "dense, bf16 70,272; sparse, bf16 85,888; dense, deployed 40,016; sparse, deployed 48,068",
    ),
    (flop_counts.draw_reads, "dense 5.2, sparse 1.1"),
)


@pytest.mark.parametrize(("drawing", "says"), DRAWN, ids=lambda x: getattr(x, "__name__", ""))
def test_a_picture_says_what_it_shows(drawing, says):
    fig, words = drawing(REAL)
    assert says in words and fig.axes
    fig.draw_without_rendering()


def test_published_costs_are_dotted_and_counts_are_not():
    costs = read_costs(DATA / "published" / "costs.csv")
    fig, words = flop_counts.draw_published(costs)
    assert {line.get_linestyle() for ax in fig.axes for line in ax.lines} == {":"}
    assert "3.56 times apart" in words and "8.65 times apart" in words
    fig, _ = flop_counts.draw_work(REAL)
    assert {line.get_linestyle() for line in fig.axes[0].lines[:3]} == {"-."}
