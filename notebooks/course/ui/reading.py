"""A text as a model reads it: its tokens, and for every layer what attention wants and what the indexer thinks of it.

The model reads once, with dense attention. So all choosers are compared on the same hidden states and against the same
attention, and moving a slider costs nothing: only the choice is made anew. Under sparse attention the states of the
upper layers would differ a little with every top-k; the page that needs that runs the model itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from dsa.datasets import byte_tokenizer
from dsa.kernels import ops, reference
from dsa.model import baselines
from dsa.model.attention import Attention
from dsa.model.transformer import Transformer

CHOOSERS = ("oracle", "indexer", "window", "random")
FILE_PREFIX = "file:"


@dataclass(frozen=True)
class Reading:
    """One text, read once.

    Attributes:
        ids: its T tokens.
        truncated: tokens cut away at the front because the model was trained for shorter texts.
        attention_probs: attention that each token pays to each, mean of all heads (layers, T, T); rows sum to 1.
        scores: what the indexer thinks each is worth (layers, T, T), -inf in the future.
    """

    ids: list[int]
    truncated: int
    attention_probs: Tensor
    scores: Tensor

    def select(self, who: str, layer: int, top_k: int) -> Tensor:
        """Let one of CHOOSERS choose for every token: -> (T, min(K, T)), -1 in empty slots."""
        probs, T = self.attention_probs[layer][None], len(self.ids)
        match who:
            case "oracle":
                return baselines.oracle(probs, top_k)[0]
            case "indexer":
                return ops.select(self.scores[layer][None], top_k)[0]
            case "window":
                return baselines.window(1, T, T, top_k)[0]
            case "random":
                return baselines.random(1, T, T, top_k)[0]
        raise ValueError(f"chooser {who!r} is unknown: use one of {', '.join(CHOOSERS)}")

    def attention_recall(self, who: str, layer: int, top_k: int) -> Tensor:
        """The share of its attention that each token keeps under one chooser: (T,) in 0 ... 1.

        For "random" it is the expectation, K of the visible tokens, rather than one draw.
        """
        if who == "random":
            # one draw would make the panel's curve jump with the seed; its mean is known exactly
            return (top_k / torch.arange(1, len(self.ids) + 1)).clamp(max=1)
        return baselines.attention_recall(self.attention_probs[layer][None], self.select(who, layer, top_k)[None])[0]


def reader(model: Transformer) -> Callable[[str], Reading]:
    """Make a function that reads a text with `model`, and remembers the last few texts.

    The text may also be `file:PATH`. Raises ValueError, with a sentence for the reader, for what cannot be read.
    """
    if model.config.index_topk is None:
        raise ValueError("this model is dense and has no indexer: load 'warmed' or 'sparse' to see one choose")

    @lru_cache(maxsize=8)
    def read(text: str) -> Reading:
        ids = tokenize(text)
        last = byte_tokenizer.last_tokens(ids, model.config.max_position_embeddings)
        return read_ids(model, last, truncated=len(ids) - len(last))

    return read


@torch.no_grad()
def read_ids(model: Transformer, ids: list[int], truncated: int = 0) -> Reading:
    """Read tokens with dense attention, whatever the model is set to; its setting is restored."""
    # dense, so that every chooser is judged on the same hidden states and against the same attention
    before, model.attention = model.attention, "dense"
    try:
        _, trace = model(torch.tensor([ids]), trace=True)
    finally:
        model.attention = before
    probs = torch.cat([layer.mass for layer in trace])
    return Reading(ids, truncated, probs, torch.cat([layer.scores for layer in trace]))


@torch.no_grad()
def head_weights(model: Transformer, ids: list[int]) -> Tensor:
    """Every head's own dense attention over a text: (layers, T, H, T), rows sum to 1.

    Its mean over heads is `Trace.mass`. It takes H times the memory of a trace: use it on short texts.
    """
    found: list[Tensor] = []

    def watch(attention: Attention, inputs: tuple) -> None:
        x, context = inputs[:2]
        q, kv = attention.queries(x, context.rope)[0], attention.compress_kv(x, context.rope)
        logits = reference.attention_logits(attention.absorb_query(q), kv[:, :, None], attention.scale)
        found.append(logits.softmax(-1)[0])

    before, model.attention = model.attention, "dense"
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [attention.register_forward_pre_hook(watch) for attention in layers]
    try:
        model(torch.tensor([ids]))
    finally:
        model.attention = before
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def tokenize(text: str) -> list[int]:
    """Turn the reader's text into tokens, or say what is wrong with it."""
    if not isinstance(text, str):
        raise ValueError(f"the text is a {type(text).__name__}: give a string")
    if text.strip().startswith(FILE_PREFIX):
        text = read_file(text.strip().removeprefix(FILE_PREFIX).strip())
    # a pasted PNG or a UTF-16 file would be read as bytes without a complaint, and mean nothing
    controls = [place for place, sign in enumerate(text) if ord(sign) < 32 and sign not in "\t\n\r\f"]
    if controls:
        raise ValueError(
            f"character {controls[0]} is the control code {ord(text[controls[0]])}: paste text, not binary data"
        )
    ids = byte_tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError(
            f"the text has {len(ids)} of at least 2 tokens: type a few words, so that there is a choice to make"
        )
    return ids


def read_file(path: str | Path) -> str:
    """Read a text file; ValueError says what is wrong: missing, a folder, or not UTF-8."""
    path = Path(path).expanduser()
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"there is no file {str(path)!r} (looked in {Path.cwd().name}/): check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not a text file: byte {error.start} is no UTF-8; save it as UTF-8"
        ) from None
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}; give a text file") from None


def checked_int(name: str, value: object, low: int, high: int, remedy: str) -> int:
    """A whole number in low ... high, or a ValueError that says value, limit and remedy."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} = {value!r} is not a whole number: choose one from {low} to {high}")
    if not low <= value <= high:
        raise ValueError(f"{name} = {value} lies outside {low} to {high}: {remedy}")
    return value
