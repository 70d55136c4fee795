"""DeepSeek-V3.2: embedding, layers of attention and feed-forward on a residual stream, norm, head.

Modules bear the names of the published checkpoint, so that this model's `state_dict` *is* the published layout and
reading a file needs no table of names. The residual stream is fp32 whatever the weights are: each norm sees the
unrounded sum. `model.attention`, `model.top_k` and the two precisions may be switched at any time.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dsa.kernels.reference import at_least_fp32
from dsa.model.attention import Attention, ForwardContext, LayerOutput, Trace
from dsa.model.baselines import KINDS
from dsa.model.cache import Cache, LayerCache
from dsa.model.config import Config
from dsa.model.moe import FeedForward, Gate, MoE
from dsa.model.norm import RMSNorm
from dsa.model.precision import FULL_PRECISION, check_index_width
from dsa.model.rope import Rope

TRACE_LIMIT = 2**30  # bytes; a trace holds two T x S matrices a layer


class Layer(nn.Module):
    """Attention, then feed-forward, each on a normed copy and added to the residual stream."""

    def __init__(self, config: Config, number: int):
        super().__init__()
        self.self_attn = Attention(config, number)
        dense = number < config.first_k_dense_replace
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, context: ForwardContext, cache: LayerCache | None) -> LayerOutput:
        """Transform the residual stream (B, T, D), kept in fp32."""
        attended, *collected = self.self_attn(self.input_layernorm(x, context.dtype), context, cache)
        x = x + attended
        return LayerOutput(x + self.mlp(self.post_attention_layernorm(x, context.dtype)), *collected)


@torch.no_grad()
def init_weights(parameters: Iterable[tuple[str, nn.Parameter]], seed: int) -> None:
    """Draw named matrices anew; see `Transformer.reset_parameters`."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in parameters:
        if p.ndim < 2:
            continue  # norms stay at one
        std = 1.0 if "embed_tokens" in name else (3 * p.shape[1]) ** -0.5 * (1.7 if "self_attn" in name else 1)
        p.copy_(torch.randn(p.shape, generator=generator) * std)


@dataclass(frozen=True)
class DecoderOutput:
    """What comes out below the head.

    Attributes:
        hidden: normed hidden states (B, T, D).
        traces: of each layer, if they were collected.
        indexer_losses: each layer's, a scalar, if they were collected.
    """

    hidden: Tensor
    traces: list[Trace]
    indexer_losses: list[Tensor]


class Decoder(nn.Module):
    """Everything below the head."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def head_logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Normed hidden states (B, T, D) -> logits (B, T, vocab) in at least fp32.

    The head is computed in its weights' own precision. That is fp32 in a half-precision model too, as published: in
    bf16 the two likeliest tokens often get the very same number.
    """
    return at_least_fp32(head(hidden.to(head.weight.dtype)))


class Transformer(nn.Module):
    """The whole model: `model(tokens)` gives logits.

    Attributes:
        config: its sizes.
        attention: "sparse" (the indexer chooses), "dense", or one of the stand-ins "window", "random", "oracle".
        top_k: K, how many tokens each query keeps; `config.index_topk` at first.
        index_precision: "full" (the model's dtype, at first), "fp8" or "int8": in which numbers the indexer ranks.
        cache_precision: "full" or "fp8": in which numbers attention's latents are kept.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._attention = "dense" if config.index_topk is None else "sparse"
        self._top_k = config.index_topk or config.max_position_embeddings
        self._precision = FULL_PRECISION

    @property
    def attention(self) -> str:
        """Who chooses the keys of a query."""
        return self._attention

    @attention.setter
    def attention(self, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"attention={kind!r} is unknown: use one of {', '.join(KINDS)}")
        if kind == "sparse" and self.config.index_topk is None:
            raise ValueError(
                "this model is dense and has no indexer, so attention='sparse' has nobody to choose: "
                "give it one first (dsa adopt), or use 'window', 'random' or 'oracle'"
            )
        self._attention = kind

    @property
    def top_k(self) -> int:
        """How many tokens each query keeps."""
        return self._top_k

    @top_k.setter
    def top_k(self, top_k: int) -> None:
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k={top_k!r} must be a whole number of at least 1: a query keeps at least one token")
        self._top_k = top_k

    @property
    def index_precision(self) -> str:
        """In which numbers the indexer compares queries with keys."""
        return self._precision.index

    @index_precision.setter
    def index_precision(self, name: str) -> None:
        asked = replace(self._precision, index=name)
        if self.config.index_head_dim is None:
            raise ValueError("this model is dense and has no indexer whose precision could be set")
        check_index_width(asked, self.config.index_head_dim)
        self._precision = asked

    @property
    def cache_precision(self) -> str:
        """In which numbers a token's latent is kept; without a cache it is rounded alike."""
        return self._precision.cache

    @cache_precision.setter
    def cache_precision(self, name: str) -> None:
        self._precision = replace(self._precision, cache=name)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the matrix products."""
        return self.model.embed_tokens.weight.dtype

    def new_cache(self, batch: int, capacity: int, layers: int | None = None) -> Cache:
        """Make room for `batch` sequences of at most `capacity` tokens, in all layers or so many."""
        device = self.model.embed_tokens.weight.device
        return Cache(self.config, batch, capacity, self.dtype, device, self._precision, layers)

    def gates(self) -> list[Gate]:
        """List the routers, one for each layer of experts."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    def indexer_parameters(self) -> list[nn.Parameter]:
        """List what the dense warm-up trains."""
        return [p for name, p in self.named_parameters() if ".indexer." in name]

    def reset_parameters(self, seed: int = 0) -> None:
        """Draw all weights anew: normal, deviation (3 * inputs)^-0.5, in attention 1.7 times that, embedding 1."""
        init_weights(self.named_parameters(), seed)

    def context(self, start: int, length: int, device: torch.device, collect: str | None = None) -> ForwardContext:
        """One pass over the positions `start ... start + length - 1`, as the model is now set."""
        rope = Rope.at(self.config, start, length, device)
        return ForwardContext(rope, start, self.attention, self.top_k, self.dtype, collect, self._precision)

    def run_layers(self, tokens: Tensor, cache: Cache | None = None, collect: str | None = None) -> DecoderOutput:
        """Run everything below the head, on ids (B, T) that `check_tokens` has seen: a check reads them back from the
        device, and a token that the model has just chosen itself needs none.
        """
        batch, length = tokens.shape
        start = 0 if cache is None else cache.length
        if cache is not None:
            cache.check_room(batch, length, precision=self._precision)
        context = self.context(start, length, tokens.device, collect)
        x = at_least_fp32(self.model.embed_tokens(tokens))
        traces, losses = [], []
        for number, layer in enumerate(self.model.layers):
            x, trace, loss = layer(x, context, None if cache is None else cache.layers[number])
            traces += [] if trace is None else [trace]
            losses += [] if loss is None else [loss]
        if cache is not None:
            cache.length += length
        return DecoderOutput(self.model.norm(x, self.dtype), traces, losses)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head makes of normed hidden states: (B, T, D) -> (B, T, vocab), in fp32 at least."""
        return head_logits(self.lm_head, hidden)

    def forward(self, tokens: Tensor, cache: Cache | None = None, *, trace: bool = False, indexer_loss: bool = False):
        """Predict each next token.

        Args:
            tokens: ids (B, T); with a cache, those that come after what it holds: a prompt, a chunk of one, or one.
            cache: from `new_cache`; read and extended.
            trace: also return a list of `Trace`, one a layer.
            indexer_loss: also return each indexer's divergence from its attention (layers,), Eq. 3 or 4.

        Returns:
            logits (B, T, vocab) in at least fp32; with `trace` or `indexer_loss` a pair.

        Raises:
            ValueError: for ids that are not in the vocabulary, too long a sequence, or a trace over 1 GiB.
        """
        start = 0 if cache is None else cache.length
        self.check_tokens(tokens, start)
        if trace:
            self._check_trace(tokens, start)
        if indexer_loss:
            self.check_indexers_can_learn()
        output = self.run_layers(tokens, cache, "trace" if trace else "indexer_loss" if indexer_loss else None)
        logits = self.logits(output.hidden)
        if trace:
            return logits, output.traces
        return (logits, torch.stack(output.indexer_losses)) if indexer_loss else logits

    def check_indexers_can_learn(self) -> None:
        """Refuse, by ValueError, a loss for indexers that are not there, or that rounding would keep it from."""
        if self.config.index_topk is None:
            raise ValueError("this model is dense and has no indexer to compute a loss for")
        if self._precision != FULL_PRECISION:
            raise ValueError(f"rounding passes no gradient, so {self._precision} cannot train: set both to 'full'")

    def check_tokens(self, tokens: Tensor, start: int = 0) -> None:
        """Refuse ids (B, T) that cannot be read from position `start` on: ValueError says why."""
        limit, vocab = self.config.max_position_embeddings, self.config.vocab_size
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be whole numbers (B, T), not {tokens.dtype} of shape {tuple(tokens.shape)}")
        if tokens.numel() == 0:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} are empty: give at least one")
        if start + tokens.shape[1] > limit:
            raise ValueError(
                f"{start + tokens.shape[1]} tokens exceed the model's context of {limit}: shorten the text"
            )
        if tokens.is_meta:
            return
        least, most = torch.stack(tokens.aminmax()).tolist()  # one wait for the device
        if least < 0 or most >= vocab:
            raise ValueError(f"token ids run from {least} to {most}, the vocabulary from 0 to {vocab - 1}")

    def _check_trace(self, tokens: Tensor, start: int) -> None:
        B, T = tokens.shape
        S = start + T
        size = self.config.num_hidden_layers * B * T * (2 * 4 * S + 8 * min(self.top_k, S))
        if size > TRACE_LIMIT:
            raise ValueError(
                f"a trace of {T} queries and {S} keys in {self.config.num_hidden_layers} layers takes "
                f"{size / 2**30:.1f} GiB, the limit is {TRACE_LIMIT / 2**30:.0f}: trace a shorter text"
            )
