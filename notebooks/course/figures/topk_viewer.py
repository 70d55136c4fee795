"""What sparse attention keeps of a text: the course's first picture.

One token looks back. Its attention would like to look everywhere; sparse attention lets it look at K tokens. The page
colours these K in the text itself, and draws what share of the attention survives, beside three other ways to choose:
the best possible (`oracle`), the most recent (`window`) and any (`random`).
"""

from html import escape

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course.ui.panel import Draw, Html, Panel, Slider, Text
from course.ui.reading import CHOOSERS, Reading, checked_int, reader
from course.ui.style import COLOURS, MARKERS
from dsa.datasets import byte_tokenizer
from dsa.model.transformer import Transformer

MARKUP = {
    "kept": ('<mark style="background:#56B4E9;color:#000"><b>', "</b></mark>"),
    "looking": ('<b style="outline:2px solid #D55E00">', "</b>"),
    "dropped": ('<span style="opacity:.65">', "</span>"),
    "unread": ('<i style="opacity:.65">', "</i>"),
}
LEGEND = (
    f"{MARKUP['kept'][0]}kept{MARKUP['kept'][1]} · {MARKUP['dropped'][0]}dropped{MARKUP['dropped'][1]} · "
    f"{MARKUP['looking'][0]}the token that looks back{MARKUP['looking'][1]} · "
    f"{MARKUP['unread'][0]}not read yet{MARKUP['unread'][1]}"
)


def topk_viewer(model: Transformer, text: str) -> Panel:
    """Show what sparse attention keeps of `text`, with sliders: the last expression of a cell."""
    longest = model.config.max_position_embeddings
    last = model.config.num_hidden_layers - 1
    return Panel(
        draw_topk_viewer(model),
        text=Text("your text, or file:PATH", text),
        top_k=Slider("top-k", 1, longest, model.top_k),
        layer=Slider("layer", 0, last, last),
        token=Slider("token, counted from the end", 0, longest - 1, 0),
    )


def draw_topk_viewer(model: Transformer) -> Draw:
    """Make the panel's callback: draw(text, top_k, layer, token) -> ([text in colour, figure], sentence)."""
    read = reader(model)
    longest, layers = model.config.max_position_embeddings, model.config.num_hidden_layers

    def draw(text: str, top_k: int, layer: int, token: int) -> tuple[list[Html | Figure], str]:
        checked_int("top-k", top_k, 1, longest, f"the model reads at most {longest} tokens")
        checked_int("layer", layer, 0, layers - 1, f"the model has {layers} layers, the first is 0")
        reading = read(text)
        checked_int("token", token, 0, len(reading.ids) - 1, f"the text has {len(reading.ids)} tokens, 0 is the last")
        t = len(reading.ids) - 1 - token
        kept = sorted({s for s in reading.select("indexer", layer, top_k)[t].tolist() if s >= 0})
        return [highlight_tokens(reading.ids, t, kept), figure(reading, layer, t, top_k, kept)], sentence(
            reading, layer, t, top_k, kept
        )

    return draw


def highlight_tokens(ids: list[int], t: int, kept: list[int]) -> Html:
    """The text itself: kept tokens on blue, in bold; what the looking token has not read yet in pale italics."""
    chosen, parts, state = set(kept), [], ""
    for start, stop, text in byte_tokenizer.characters(ids):
        span = range(start, stop)
        new = "looking" if t in span else "unread" if start > t else "kept" if chosen & {*span} else "dropped"
        if new != state:
            parts += [MARKUP[state][1] if state else "", MARKUP[new][0]]
            state = new
        parts.append(escape(text))
    body = "".join([*parts, MARKUP[state][1]])
    box = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;line-height:1.5"
    return Html(f'<div style="{box}">{body}</div><p>{LEGEND}</p>')


def sentence(reading: Reading, layer: int, t: int, top_k: int, kept: list[int]) -> str:
    """What the picture shows, in words, for those who cannot or need not see it."""
    shares = {who: float(reading.attention_recall(who, layer, top_k)[t]) for who in CHOOSERS}
    notes = []
    if reading.truncated:
        notes.append(f"Only the last {len(reading.ids)} tokens were read, as many as the model was trained for.")
    if top_k > t:
        notes.append(
            f"Only {t + 1} tokens are visible from here and top-k is {top_k}: nothing is dropped until it is smaller."
        )
    piece = byte_tokenizer.token_labels(reading.ids)[t]
    notes.append(
        f"From token {t + 1} of {len(reading.ids)} ({piece}), layer {layer} keeps {len(kept)} of {t + 1} tokens "
        f"and {shares['indexer']:.0%} of the attention; the best {len(kept)} would keep {shares['oracle']:.0%}, "
        f"the last {len(kept)} {shares['window']:.0%}, any {len(kept)} about {shares['random']:.0%}."
    )
    notes.append(f"The farthest kept token is {t - kept[0]} back. In words: {_words(reading, layer, t, kept)}.")
    return " ".join(notes)


def _words(reading: Reading, layer: int, t: int, kept: list[int], most: int = 8) -> str:
    """The words that hold kept tokens, those with most attention first."""
    chosen = set(kept)
    found = {}
    for word in byte_tokenizer.words(reading.ids[: t + 1]):
        inside = chosen & {*range(word.start, word.stop)}
        if inside and word.text.strip():
            found[word] = float(reading.attention_probs[layer, t, sorted(inside)].sum())
    best = sorted(found, key=lambda word: -found[word])
    more = f" and {len(best) - most} more" if len(best) > most else ""
    return ", ".join(f"“{word.text}”" for word in best[:most]) + more if best else "white space only"


def figure(reading: Reading, layer: int, t: int, top_k: int, kept: list[int]) -> Figure:
    """Left: the attention of the looking token by distance, kept and dropped. Right: share kept for every K."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 2.7), width_ratios=[1.25, 1])
    _draw_attention(left, reading, layer, t, kept)
    _draw_shares(right, reading, layer, t, top_k)
    return fig


def _draw_attention(ax: Axes, reading: Reading, layer: int, t: int, kept: list[int]) -> None:
    probs = reading.attention_probs[layer, t, : t + 1]
    dropped = sorted({*range(t + 1)} - {*kept})
    ax.vlines([t - s for s in kept], 0, probs[kept], color=COLOURS[0], linewidth=1)
    ax.plot(
        [t - s for s in dropped], probs[dropped], marker="o", linestyle="", color="#8a8a8a", mfc="none", label="dropped"
    )
    ax.plot([t - s for s in kept], probs[kept], marker="s", linestyle="", color=COLOURS[0], label="kept by the indexer")
    ax.invert_xaxis()
    ax.set(xlabel="tokens back", ylabel="attention", title=f"Layer {layer}: where token {t + 1} wants to look")
    ax.legend(loc="upper left")


def _draw_shares(ax: Axes, reading: Reading, layer: int, t: int, top_k: int) -> None:
    sizes = [2**n for n in range(12) if 2**n < t + 1] + [t + 1]
    for who, marker, colour in zip(CHOOSERS, MARKERS, COLOURS, strict=False):
        ax.plot(
            sizes,
            [float(reading.attention_recall(who, layer, k)[t]) for k in sizes],
            label=who,
            marker=marker,
            color=colour,
        )
    ax.axvline(min(top_k, t + 1), color="#444444", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes[::2], [str(k) for k in sizes[::2]])
    ax.set(xlabel=f"top-k (the line: {top_k})", ylabel="share of attention kept", ylim=(0, 1.04))
    ax.set_title("What each way to choose keeps")
    ax.legend(loc="upper left", fontsize=8, frameon=True, framealpha=0.9, edgecolor="none")  # a line may pass
