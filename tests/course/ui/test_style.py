"""A figure goes with words: printed below it, stored as its alternative text, required."""

import base64

import matplotlib.pyplot as plt
import pytest
from matplotlib import colormaps, rcParams

from course.ui import style

WORDS = "three points rise from 1 to 3"


@pytest.fixture(autouse=True)
def course_style():
    with plt.rc_context():
        style.style()
        yield
    plt.close("all")


@pytest.fixture
def published(monkeypatch):
    outputs = []
    monkeypatch.setattr(style, "publish", lambda bundle, metadata: outputs.append((bundle, metadata)))
    return outputs


def rising():
    fig, ax = plt.subplots()
    ax.plot([1, 2, 3])
    return fig


def test_show_gives_picture_alternative_text_and_words(published, capsys):
    style.show(rising(), WORDS)
    [(bundle, metadata)] = published
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert metadata == {"image/png": {"alt": WORDS}}
    assert capsys.readouterr().out == WORDS + "\n"


def test_show_closes_the_figure_so_that_it_is_not_shown_twice(published):
    style.show(rising(), WORDS)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("words", ["", "   ", "figure", None, 3])
def test_a_figure_without_a_description_is_refused(words, published):
    with pytest.raises(ValueError, match="sentence"):
        style.show(rising(), words)
    assert published == []


def test_twenty_figures_fit_a_notebook():
    assert 20 * len(style.png(rising())) * 4 / 3 < 300_000


def test_the_same_figure_gives_the_same_bytes():
    assert style.png(rising()) == style.png(rising())


def test_curves_differ_in_colour_and_marker():
    cycle = rcParams["axes.prop_cycle"].by_key()
    assert len(set(cycle["color"])) == len(set(cycle["marker"])) == 8
    assert rcParams["figure.facecolor"] == "white"
    assert rcParams["image.cmap"] in colormaps


def test_every_provenance_has_its_own_line():
    lines = [style.provenance(kind)["linestyle"] for kind in ("measured", "recorded", "published", "modelled")]
    assert lines == ["-", "--", ":", "-."]
    with pytest.raises(ValueError, match="'guessed' is unknown: use one of measured"):
        style.provenance("guessed")


@pytest.mark.parametrize(("columns", "size"), [(1, (3, 1)), (2, (2, 2)), (3, (1, 3))])
def test_tiles_are_laid_out_row_by_row(columns, size):
    picture = style.png(rising())
    width, height = style.png_size(picture)
    assert style.png_size(style.tile_pngs([picture] * 3, columns)) == (size[1] * width, size[0] * height)


def test_a_caption_is_as_wide_as_asked_and_grows_with_its_text():
    short, long = style.caption("a few words", 400), style.caption("a few words " * 20, 400)
    assert style.png_size(short)[0] == style.png_size(long)[0] == 400
    assert style.png_size(long)[1] > style.png_size(short)[1]
