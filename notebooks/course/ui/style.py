"""Figures: a picture that everybody can read, and the words that say what it shows.

nbval never compares pictures, screen readers cannot see them, and a text terminal does not show them. So a
figure of this course always goes with a sentence computed from the same data: `show(fig, words)` prints it
below the picture, stores it as the picture's alternative text, and it is what the tests compare.

Colours are those of Okabe and Ito (2008), which people with any common colour blindness can tell apart, and
each comes with its own marker. Line *style* is kept for something else: where a number comes from. Measured
here is solid, recorded on named hardware dashed, published dotted, modelled dash-dotted.
"""

import base64
import io
from collections.abc import Sequence
from textwrap import fill
from types import MappingProxyType
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from PIL import Image

from course.ui.output import publish

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = MappingProxyType({"measured": "-", "recorded": "--", "published": ":", "modelled": "-."})
DPI = 100


def style() -> None:
    """Set the course's look for every figure that follows: once, in a notebook's first cell."""
    plt.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=COLOURS, marker=MARKERS),
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.facecolor": "white",
            "figure.figsize": (7.0, 3.4),
            "figure.dpi": DPI,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "axes.axisbelow": True,
            "axes.titlelocation": "left",
            "lines.markersize": 4.5,
            "legend.frameon": False,
            "image.cmap": "cividis",
        }
    )


def provenance(kind: str) -> dict[str, str]:
    """Line style of a number's origin: `ax.plot(x, y, label="report", **provenance("published"))`."""
    if kind not in LINES:
        raise ValueError(f"provenance {kind!r} is unknown: use one of {', '.join(LINES)}")
    return {"linestyle": LINES[kind]}


def show(fig: Figure, words: str) -> None:
    """End a cell with a figure: the picture with `words` as its alternative text, `words` below it, figure closed."""
    show_png(png(fig), words)
    plt.close(fig)


def show_png(picture: bytes, words: str) -> None:
    """The same for a picture that is PNG bytes already."""
    alt = {"image/png": {"alt": require_description(words)}}
    # the plain text is constant: nbval cannot compare pictures, so it compares the words printed below
    publish({"image/png": base64.b64encode(picture).decode(), "text/plain": "[figure]"}, metadata=alt)
    print(wrap_lines(words))


def wrap_lines(words: str, width: int = 96) -> str:
    """Lines short enough that no page breaks them in the middle of a word."""
    return "\n".join(fill(line, width) for line in words.splitlines())


def require_description(words: Any) -> str:
    """`words` if they can serve as a description; a figure without one is an error."""
    if not isinstance(words, str) or len(words.split()) < 3:
        raise ValueError(f"a figure needs a sentence that says what it shows, computed from its data; got {words!r}")
    return words


def png(fig: Figure) -> bytes:
    """The figure as PNG: the same bytes for the same figure, in at most 256 colours, a third of the usual size."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=DPI)
    return _encode_png(Image.open(buffer))


def tile_pngs(pictures: Sequence[bytes], columns: int = 1) -> bytes:
    """Several PNGs as one, row by row on white, each at the upper left of a tile that fits the largest."""
    images = [Image.open(io.BytesIO(picture)) for picture in pictures]
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    width, heights = max(image.width for image in images), [max(image.height for image in row) for row in rows]
    whole = Image.new("RGB", (width * min(columns, len(images)), sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            whole.paste(image.convert("RGB"), (column * width, sum(heights[:number])))
    return _encode_png(whole)


def caption(words: str, width: int) -> bytes:
    """A sentence as a picture `width` pixels wide, for places that show the picture and nothing else."""
    text = fill(words, max(20, width // 8))
    fig = Figure(figsize=(width / DPI, 0.19 * (text.count("\n") + 1) + 0.12), facecolor="white")
    fig.text(0.02, 0.5, text, fontsize=9.5, va="center")
    return png(fig)


def png_size(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    return Image.open(io.BytesIO(picture)).size


def _encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # no dithering: it would speckle flat areas, which PNG then compresses badly
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
