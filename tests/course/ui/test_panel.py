"""The panel draws what its controls say, survives a reader's mistake, and is readable without a kernel."""

import re

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pytest

from course.ui import panel
from course.ui.panel import Choice, Html, Panel, Slider, Text, static_snapshots

VIEW = "application/vnd.jupyter.widget-view+json"


def draw(top_k, layer="first", text="abc"):
    if top_k > 8:
        raise ValueError(f"top-k is {top_k}; choose at most 8")
    if layer == "broken":
        raise RuntimeError("our own mistake")
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.bar(range(top_k), range(top_k))
    return fig, f"{top_k} bars in the {layer} layer of <{text}>"


@pytest.fixture
def sample():
    return Panel(
        draw,
        top_k=Slider("top-k", 1, 64, 4),
        layer=Choice("layer", ["first", "last", "broken"], "first"),
        text=Text("your text", "abc"),
    )


def inside(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from inside(child)


def test_it_starts_with_a_picture_and_a_sentence(sample):
    assert sample.sentence == "4 bars in the first layer of <abc>"
    assert 'alt="4 bars in the first layer of &lt;abc&gt;"' in sample.output.value
    assert 'role="status" aria-live="polite">4 bars' in sample.output.value


@pytest.mark.parametrize(
    ("name", "value", "says"), [("top_k", 7, "7 bars"), ("layer", "last", "last layer"), ("text", "xyz", "xyz")]
)
def test_each_control_draws_anew(sample, name, value, says):
    before = sample.output.value
    sample.inputs[name].value = value
    assert says in sample.sentence
    assert says in sample.output.value != before


def test_slider_and_number_box_move_together(sample):
    [slider] = [w for w in inside(sample.widget) if isinstance(w, widgets.IntSlider)]
    slider.value = 6
    assert sample.inputs["top_k"].value == 6
    assert sample.sentence.startswith("6 bars")


def test_nothing_is_drawn_while_the_mouse_is_still_moving(sample):
    moving = [w for w in inside(sample.widget) if isinstance(w, widgets.IntSlider | widgets.Textarea)]
    assert [w.continuous_update for w in moving] == [False, False]


def test_every_control_has_a_name_a_screen_reader_says(sample):
    assert [source.description for source in sample.inputs.values()] == ["top-k", "layer", "your text"]
    for widget in inside(sample.widget):
        if isinstance(widget, widgets.IntSlider):
            assert widget.tooltip == "top-k"


def test_a_mistake_is_said_and_the_next_value_draws_again(sample):
    sample.inputs["top_k"].value = 9
    assert sample.sentence == "top-k is 9; choose at most 8"
    assert "<img" not in sample.output.value
    sample.inputs["top_k"].value = 5
    assert sample.sentence.startswith("5 bars")
    assert "<img" in sample.output.value


def test_other_errors_surface(sample):
    with pytest.raises(RuntimeError, match="our own"):
        sample.inputs["layer"].value = "broken"


def test_it_leaves_picture_and_words_for_pages_without_a_kernel(sample):
    bundle, metadata = sample._repr_mimebundle_()
    assert set(bundle) == {VIEW, "image/png", "text/plain"}
    assert bundle["text/plain"] == metadata["image/png"]["alt"] == sample.sentence


def test_what_it_leaves_says_the_same_each_time(sample):
    once, again = sample._repr_mimebundle_()[0], sample._repr_mimebundle_()[0]
    assert once == again


def test_html_is_left_as_html():
    made = Panel(lambda k: ([Html(f"<b>{k}</b>"), draw(k)[0]], f"{k} is bold here"), k=Slider("k", 1, 4, 2))
    bundle, _ = made._repr_mimebundle_()
    assert set(bundle) == {VIEW, "text/html", "text/plain"}
    assert bundle["text/html"].startswith('<b>2</b>\n<img style="display:block;max-width:100%" alt=')


def test_figures_are_closed(sample):
    assert plt.get_fignums() == []


def test_a_picture_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="returned a int"):
        Panel(lambda k: (k, "a whole number k"), k=Slider("k", 1, 4, 2))


@pytest.mark.parametrize("limit", [200, 50, 10])
def test_the_grid_is_small_and_keeps_the_ends(sample, limit):
    grid = list(sample.grid(limit))
    assert 0 < len(grid) <= limit
    assert {"top_k", "layer", "text"} == set(grid[0])
    positions = {values["top_k"] for values in grid}
    assert {1, 64} <= positions
    if limit >= 50:
        assert {values["layer"] for values in grid} == {"first", "last", "broken"}


def test_a_small_grid_is_whole():
    made = Panel(draw, top_k=Slider("top-k", 1, 8, 4, step=3), layer=Choice("layer", ["first", "last"], "last"))
    assert [tuple(values.values()) for values in made.grid()] == [(k, x) for k in (1, 4, 7) for x in ("first", "last")]


def test_snapshots_show_positions_side_by_side(monkeypatch, capsys):
    published = []
    monkeypatch.setattr("course.ui.style.publish", lambda bundle, metadata: published.append((bundle, metadata)))
    static_snapshots(draw, [{"top_k": 2, "layer": "first"}, {"top_k": 8, "layer": "first", "text": "x"}])
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "top_k = 2: 2 bars in the first layer of <abc>",
        "top_k = 8, text = x: 8 bars in the first layer of <x>",
    ]
    [(bundle, metadata)] = published
    assert "image/png" in bundle
    assert metadata["image/png"]["alt"] == "\n".join(said)


def test_snapshots_of_html_stay_html(monkeypatch):
    published = []
    monkeypatch.setattr(panel, "publish", lambda bundle, metadata: published.append(bundle))
    static_snapshots(lambda k: (Html(f"<i>{k}</i>"), f"{k} is slanted here"), [{"k": 1}, {"k": 2}])
    assert [re.findall("<i>.</i>", bundle["text/html"]) for bundle in published] == [["<i>1</i>"], ["<i>2</i>"]]


def test_snapshots_do_not_hide_mistakes():
    with pytest.raises(ValueError, match="choose at most 8"):
        static_snapshots(draw, [{"top_k": 9}])


def test_a_single_snapshot_needs_no_title(monkeypatch, capsys):
    monkeypatch.setattr("course.ui.style.publish", lambda bundle, metadata: None)
    static_snapshots(draw, [{"top_k": 2, "text": "a long text\nin lines"}])
    assert capsys.readouterr().out == "2 bars in the first layer of <a long text\nin lines>\n"
