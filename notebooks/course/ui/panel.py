"""Sliders that work everywhere: a figure and a sentence, drawn anew whenever a control moves.

`interact` and `Output` widgets, the usual way, lose errors, hang a notebook's execution now and then and
leave nothing on a page without a kernel. This panel needs neither. Its picture is the value of an HTML
widget, so errors surface and a screen reader hears the sentence; and it displays itself together with a
static PNG of the same picture and sentence, which is what GitHub, an HTML export and JupyterLab before the
first run show.

What is drawn comes from one plain function, `draw(**values) -> (picture, sentence)`: it can be called, and
tested, without any widget. `Panel.grid` yields the positions at which a test should call it; `static_snapshots`
shows a few of them side by side for readers who have no kernel to move a slider with.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from math import prod
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from course.ui.output import publish
from course.ui.style import caption, png, png_size, require_description, show_png, tile_pngs


class Html(str):
    """An HTML fragment as a picture. What a reader typed must be escaped in it (`html.escape`)."""


VIEW = "application/vnd.jupyter.widget-view+json"  # shows a widget of ipywidgets 7, which some services have, and of 8

Picture = Figure | Html
Draw = Callable[..., tuple[Picture | list[Picture], str]]


@dataclass(frozen=True)
class Slider:
    """A whole number between `low` and `high`, moved by slider, arrow keys or number box."""

    label: str
    low: int
    high: int
    value: int
    step: int = 1

    def build(self, label_width: float) -> tuple[widgets.Widget, widgets.Widget]:
        """The row to display, and the widget whose value counts; `label_width` is that of the labels' column in em."""
        limits = {"min": self.low, "max": self.high, "step": self.step, "value": self.value}
        box = widgets.BoundedIntText(**limits, **_labelled(self.label, label_width, 8))
        slider = widgets.IntSlider(**limits, readout=False, continuous_update=False, tooltip=self.label)
        widgets.link((box, "value"), (slider, "value"))
        return widgets.HBox([box, slider]), box

    def points(self) -> list[Any]:
        """Every position."""
        return list(range(self.low, self.high + 1, self.step))


@dataclass(frozen=True)
class Choice:
    """One of several options."""

    label: str
    options: Sequence[Any]
    value: Any

    def build(self, label_width: float) -> tuple[widgets.Widget, widgets.Widget]:
        """The row to display, and the widget whose value counts; `label_width` is that of the labels' column in em."""
        box = widgets.Dropdown(options=self.options, value=self.value, **_labelled(self.label, label_width, 16))
        return box, box

    def points(self) -> list[Any]:
        """Every option."""
        return list(self.options)


@dataclass(frozen=True)
class Text:
    """The reader's own text, taken over when the cursor leaves it."""

    label: str
    value: str

    def build(self, label_width: float) -> tuple[widgets.Widget, widgets.Widget]:
        """The row to display, and the widget whose value counts; `label_width` is that of the labels' column in em."""
        box = widgets.Textarea(
            value=self.value, rows=3, continuous_update=False, **_labelled(self.label, label_width, 36)
        )
        return box, box

    def points(self) -> list[Any]:
        """The text it starts with."""
        return [self.value]


Control = Slider | Choice | Text


class Panel:
    """Controls above a picture and a sentence. End a cell with it: `Panel(draw, k=Slider("top-k", 1, 64,
    16))`.

    A `ValueError` of `draw` is the reader's mistake: its message stands in the sentence's place, and the next
    valid value draws again. Every other error is ours and surfaces.
    """

    def __init__(self, draw: Draw, **controls: Control) -> None:
        self.draw, self.controls = draw, controls
        self.pictures: list[bytes | Html] = []
        self.sentence = ""
        # a proportional font's letters are a good half of an em wide; labels of one width align the controls
        label_width = 0.55 * max(len(control.label) for control in controls.values()) + 0.5
        built = {name: control.build(label_width) for name, control in controls.items()}
        self.inputs = {name: source for name, (_, source) in built.items()}
        self.output = widgets.HTML(layout=widgets.Layout(width="100%"))
        self.widget = widgets.VBox([*(row for row, _ in built.values()), self.output])
        for source in self.inputs.values():
            source.observe(lambda change: self.update(), names="value")
        self.update()

    @property
    def values(self) -> dict[str, Any]:
        """Where the controls stand."""
        return {name: source.value for name, source in self.inputs.items()}

    def update(self) -> None:
        """Draw what the controls say."""
        try:
            self.pictures, self.sentence = _render(self.draw, self.values)
        except ValueError as mistake:
            self.pictures, self.sentence = [], str(mistake)
        self.output.value = _html(self.pictures, self.sentence)

    def grid(self, limit: int = 200) -> Iterator[dict[str, Any]]:
        """At most `limit` combinations of control values, ends included, to test `draw` at."""
        points = [control.points() for control in self.controls.values()]
        while prod(map(len, points)) > limit:  # thin out the control with most positions, first and last kept
            longest = max(points, key=len)
            longest[:] = [*longest[:-1:2], longest[-1]] if len(longest) > 3 else longest[:1]
        for values in product(*points):
            yield dict(zip(self.controls, values, strict=True))

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The live panel for a page with a kernel, the picture with its sentence for every other."""
        bundle, metadata = _static_bundle(self.pictures, self.sentence)
        return {VIEW: {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}, **bundle}, metadata


def static_snapshots(draw: Draw, positions: Sequence[Mapping[str, Any]], columns: int = 2) -> None:
    """A panel's pictures for pages without a kernel: `draw` at several positions, side by side, and in words."""
    rendered = [_render(draw, position) for position in positions]
    varied = {name for at in positions for name in at if any(p.get(name) != at[name] for p in positions)}
    titles = [", ".join(f"{name} = {value}" for name, value in at.items() if name in varied) for at in positions]
    lines = [
        f"{title}: {sentence}" if title else sentence for title, (_, sentence) in zip(titles, rendered, strict=True)
    ]
    if all(isinstance(picture, bytes) for pictures, _ in rendered for picture in pictures):
        tiles = [_with_title(title, pictures) for title, (pictures, _) in zip(titles, rendered, strict=True)]
        show_png(tile_pngs(tiles, columns), "\n".join(lines))
        return
    for line, (pictures, _) in zip(lines, rendered, strict=True):
        publish(*_static_bundle(pictures, line))


def _render(draw: Draw, values: Mapping[str, Any]) -> tuple[list[bytes | Html], str]:
    """Pictures, figures among them as PNG, and sentence at one position."""
    drawn, sentence = draw(**values)
    pictures: list[bytes | Html] = []
    for picture in drawn if isinstance(drawn, list) else [drawn]:
        if isinstance(picture, Html):
            pictures.append(picture)
        elif isinstance(picture, Figure):
            pictures.append(png(picture))
            plt.close(picture)  # or Jupyter shows it a second time below the cell
        else:
            raise TypeError(
                f"draw returned a {type(picture).__name__} as picture: use a Figure, Html or a list of them"
            )
    return pictures, require_description(sentence)


def _html(pictures: list[bytes | Html], sentence: str) -> str:
    """Pictures above their sentence. The sentence is announced when it changes, and describes the figures."""
    alt, shown = escape(sentence), []
    for picture in pictures:
        if isinstance(picture, bytes):
            source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
            fits = "display:block;max-width:100%"  # a narrow window shrinks the picture instead of cutting it
            shown.append(f'<img style="{fits}" alt="{alt}" src="{source}">')
        else:
            shown.append(picture)
    return "\n".join([*shown, f'<p role="status" aria-live="polite">{alt}</p>'])


def _static_bundle(pictures: list[bytes | Html], sentence: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What stays on the page without a kernel: one PNG with the sentence below it, or HTML if any picture is."""
    if not pictures or any(isinstance(picture, Html) for picture in pictures):
        return {"text/html": _html(pictures, sentence), "text/plain": sentence}, {}
    whole = _with_title(sentence, pictures, below=True)
    bundle = {"image/png": base64.b64encode(whole).decode(), "text/plain": sentence}
    return bundle, {"image/png": {"alt": sentence}}


def _with_title(title: str, pictures: list[bytes | Html], below: bool = False) -> bytes:
    """The PNGs among some pictures as one, with a line of text above or below."""
    images = [picture for picture in pictures if isinstance(picture, bytes)]
    if not title:
        return tile_pngs(images)
    line = caption(title, max(png_size(image)[0] for image in images))
    return tile_pngs([*images, line] if below else [line, *images])


def _labelled(label: str, label_width: float, room: float) -> dict[str, Any]:
    """How a control is laid out: its label in a column `label_width` em wide, then `room` em for itself."""
    style, layout = {"description_width": f"{label_width:.1f}em"}, {"width": f"{label_width + room:.1f}em"}
    return {"description": label, "style": style, "layout": layout}
