"""What notebook 00 and 04 show of a text is true, and no text and no slider can break the page.

The pictures come from plain functions, so they are called here without a browser: at many positions of their
controls, with every kind of bad input, and against the same numbers computed in another way.
"""

import re

import matplotlib.pyplot as plt
import pytest
import torch

import dsa
from course.figures import selection_map
from course.figures.needle import RUNS, ask, draw_needle
from course.figures.selection_map import draw_choices
from course.figures.topk_viewer import draw_topk_viewer, topk_viewer
from course.ui.environment import environment
from course.ui.panel import Choice, Html, Panel, Slider
from course.ui.reading import CHOOSERS, head_weights, read_file, reader
from dsa.datasets import byte_tokenizer
from dsa.datasets.recall_tasks import insert_needle
from project import DATA, NOTEBOOKS

TEXT = "The keeper wrote one line a day.\n    if fog: ring(bell)  # 霧\n" * 3


@pytest.fixture(scope="module")
def model():
    return dsa.from_pretrained(DATA / "sparse")


@pytest.fixture(scope="module")
def draw(model):
    return draw_topk_viewer(model)


def at(draw, **changes):
    return draw(**({"text": TEXT, "top_k": 16, "layer": 2, "token": 0} | changes))


@pytest.mark.parametrize("who", CHOOSERS)
def test_what_is_kept_is_the_attention_on_the_chosen(model, who):
    reading = reader(model)(TEXT)
    chosen, kept = reading.select(who, 2, 5), reading.attention_recall(who, 2, 5)
    for t in (0, 3, 40):
        visible = {int(s) for s in chosen[t] if s >= 0}
        assert len(visible) == min(5, t + 1) and max(visible) <= t
        if who != "random":
            assert kept[t] == pytest.approx(sum(float(reading.attention_probs[2, t, s]) for s in visible), abs=1e-5)
        else:
            assert kept[t] == pytest.approx(min(1, 5 / (t + 1)))


def test_a_reading_is_dense_attention_and_leaves_the_model_as_it_was(model):
    model.attention, model.top_k = "window", 3
    reading = reader(model)(TEXT)
    assert (model.attention, model.top_k) == ("window", 3)
    model.attention, model.top_k = "dense", 16
    _, trace = model(torch.tensor([reading.ids]), trace=True)
    model.attention = "sparse"
    assert torch.equal(reading.attention_probs[1], trace[1].mass[0])


def test_heads_average_to_the_mass(model):
    ids = byte_tokenizer.encode(TEXT)
    assert torch.allclose(head_weights(model, ids).mean(2), reader(model)(TEXT).attention_probs, atol=1e-5)


def test_the_sentence_counts_what_the_colours_show(draw):
    plain = "The keeper wrote one line a day, and a sign. " * 2  # one token a character
    (html, _), sentence = at(draw, text=plain, top_k=7)
    kept, visible = map(int, re.search(r"keeps (\d+) of (\d+) tokens", sentence).groups())
    assert (kept, visible) == (7, len(plain))
    marks = "".join(re.findall(r"<mark.*?><b>(.*?)</b></mark>", html.split("</div>")[0], re.S))
    own = 1  # the looking token may be among the chosen, and is framed rather than coloured
    assert kept - own <= len(marks) <= kept


def test_colours_leave_the_text_as_it_is(draw):
    (html, _), _ = at(draw, text="a < b & c\n    <script>", token=3)
    body = re.sub(r"<[^>]*>", "", html.split("</div>")[0])
    assert body.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == "a < b & c\n    <script>"
    assert "<script>" not in html


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"text": ""}, "0 of at least 2 tokens"),
        ({"text": "a"}, "1 of at least 2 tokens"),
        ({"text": "a\0b"}, "character 1 is the control code 0"),
        ({"text": "file:no/such/file"}, "no file 'no/such/file'"),
        ({"text": f"file:{DATA}"}, "cannot be read"),
        ({"text": f"file:{DATA / 'sparse/model.safetensors'}"}, "not a text file"),
        ({"text": "\ud800"}, "lone surrogate"),
        ({"top_k": 0}, "top-k = 0 lies outside 1 to 512"),
        ({"top_k": -3}, "top-k = -3 lies outside 1 to 512"),
        ({"top_k": 5000}, "top-k = 5000 lies outside 1 to 512"),
        ({"top_k": "many"}, "top-k = 'many' is not a whole number"),
        ({"top_k": 2.5}, "top-k = 2.5 is not a whole number"),
        ({"layer": 3}, "layer = 3 lies outside 0 to 2"),
        ({"token": 9999}, "token = 9999 lies outside 0 to"),
    ],
)
def test_bad_input_gets_one_sentence_with_value_and_limit(draw, bad, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        at(draw, **bad)


def test_a_top_k_above_the_text_keeps_all_and_says_so(draw):
    _, sentence = at(draw, text="fog", top_k=64)
    assert "nothing is dropped until it is smaller" in sentence
    assert "keeps 3 of 3 tokens and 100% of the attention" in sentence


def test_a_long_text_is_cut_to_what_the_model_was_trained_for(draw):
    _, sentence = at(draw, text="fog and lamp. " * 7200)  # 100,800 characters
    assert sentence.startswith("Only the last 512 tokens were read")


def test_any_script_is_read(draw):
    for text in ("Ο φάρος ανάβει.", "灯台の明かり", "🌫️🔔", "مصباح", "e\u0301"):
        at(draw, text=text)


def test_a_file_is_read_like_its_text(draw, tmp_path):
    (tmp_path / "fog.txt").write_text(TEXT, encoding="utf-8")
    assert at(draw, text=f"file:{tmp_path / 'fog.txt'}")[1] == at(draw)[1]
    assert read_file(tmp_path / "fog.txt") == TEXT


def test_the_panel_stays_usable_after_a_mistake(model):
    panel = topk_viewer(model, TEXT)
    assert "keeps 16" in panel.sentence
    panel.inputs["text"].value = ""
    assert "0 of at least 2 tokens" in panel.output.value
    panel.inputs["text"].value = "fog and a lamp, a lamp and fog"
    assert "keeps 16" in panel.sentence and isinstance(panel.pictures[0], Html)


@pytest.mark.parametrize("kind", ["kept", "needle", "choices"])
def test_every_callback_draws_over_its_grid(model, kind):
    if kind == "kept":
        panel = topk_viewer(model, TEXT)
    elif kind == "needle":
        panel = Panel(draw_needle(model, TEXT), depth=Slider("depth", 0, 100, 25), top_k=Slider("top-k", 1, 64, 16))
    else:
        layers, who = Slider("layer", 0, 2, 2), Choice("who", CHOOSERS, "indexer")
        panel = Panel(draw_choices(reader(model)(TEXT)), top_k=Slider("top-k", 1, 128, 16), layer=layers, who=who)
    for values in panel.grid(limit=24):
        try:
            _, sentence = panel.draw(**values)
        except ValueError as mistake:
            assert "lies outside" in str(mistake)
        else:
            assert sentence.endswith(".")
            plt.close("all")


def test_a_needle_is_asked_in_every_run_and_found_by_those_who_see_it(model):
    text = read_file(DATA / "texts/lighthouse.txt")
    answers = ask(model, insert_needle(text, 256, 0.25, key=7, value=11), top_k=16)
    assert list(answers) == list(RUNS)
    assert answers["dense"].right and answers["indexer"].right and answers["indexer"].found
    assert not answers["window"].found and not answers["window"].right
    assert (model.attention, model.top_k) == ("sparse", 16)


def test_a_dense_model_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match="has no indexer: load 'warmed' or 'sparse'"):
        reader(dsa.from_pretrained(DATA / "base"))


def test_the_environment_is_one_line_and_names_the_models():
    line = environment(DATA)
    assert "\n" not in line and "base, novice, sparse, warmed" in line
    with pytest.raises(ValueError, match="no models under"):
        environment(NOTEBOOKS)


def test_curves_are_said_for_one_k():
    curve = {(who, n): [0.25, 0.5 + n / 4] for who in ("oracle", "window") for n in (0, 1)}
    fig, words = selection_map.draw_curves(curve, [8, 16], at=16)
    assert (
        words
        == "Share of attention kept with 16 tokens. layer 0: oracle 50%, window 50%; layer 1: oracle 75%, window 75%."
    )
    assert [len(ax.lines) for ax in fig.axes] == [3, 3]
    plt.close(fig)


def test_the_unluckiest_head_is_said_layer_by_layer():
    kept, best = torch.tensor([[0.5, 0.75], [0.25, 1.0]]), torch.tensor([[0.75, 0.75], [0.75, 1.0]])
    fig, words = selection_map.draw_own(kept, best)
    assert words.endswith("loses: layer 0: 25; layer 1: 50.") and len(fig.axes[0].lines) == 4
    plt.close(fig)


def test_hits_go_from_near_to_far():
    fig, words = selection_map.draw_hits(["1-64", "65-128"], {"oracle": [1.0, 0.5], "window": [0.25, 0.0]})
    assert words.endswith("oracle 100%, 50%; window 25%, 0%.")
    assert fig.axes[0].lines[0].get_linestyle() == "--"
    plt.close(fig)


def test_growth_is_last_over_first():
    fig, words = selection_map.draw_growth([128, 1024], {"masked": [100, 800], "gathered": [50, 50]})
    assert words == "From 128 to 1,024 tokens the cost grows: masked 8-fold, gathered not at all."
    assert fig.axes[0].get_xscale() == fig.axes[0].get_yscale() == "log"
    plt.close(fig)
