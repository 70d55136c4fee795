"""DeepSeek-V3.2: embedding, layers of attention and feed-forward on a residual stream, norm, head.

Modules bear the names of the published checkpoint, so that this model's `state_dict` *is* the published layout and
reading a file needs no table of names. The residual stream is fp32 whatever the weights are: each norm sees the
unrounded sum. `model.attention`, `model.top_k` and the two precisions may be switched at any time.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dsa.model.attention import Attention, Step, Trace
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

    def forward(self, x: Tensor, step: Step, cache: LayerCache | None) -> tuple[Tensor, Trace | Tensor | None]:
        """Transform the residual stream (B, T, D), kept in fp32."""
        attended, record = self.self_attn(self.input_layernorm(x, step.dtype), step, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x, step.dtype)), record


@torch.no_grad()
def draw_weights(parameters: Iterable[tuple[str, nn.Parameter]], seed: int) -> None:
    """Draw named matrices anew; see `Transformer.reset_parameters`."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in parameters:
        if p.ndim < 2:
            continue  # norms stay at one
        std = 1.0 if "embed_tokens" in name else (3 * p.shape[1]) ** -0.5 * (1.7 if "self_attn" in name else 1)
        p.copy_(torch.randn(p.shape, generator=generator) * std)


class Decoder(nn.Module):
    """Everything below the head."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


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
        draw_weights(self.named_parameters(), seed)

    def step(self, start: int, length: int, device: torch.device, record: str | None = None) -> Step:
        """One pass over the positions `start ... start + length - 1`, as the model is now set."""
        rope = Rope.at(self.config, start, length, device)
        return Step(rope, start, self.attention, self.top_k, self.dtype, record, self._precision)

    def hidden(
        self, tokens: Tensor, cache: Cache | None = None, record: str | None = None
    ) -> tuple[Tensor, list[Trace | Tensor | None]]:
        """Run everything below the head: tokens (B, T) -> normed hidden states (B, T, D) and each layer's record."""
        start = 0 if cache is None else cache.length
        self.check_tokens(tokens, start)
        if cache is not None:
            cache.check_room(tokens.shape[0], tokens.shape[1], precision=self._precision)
        step = self.step(start, tokens.shape[1], tokens.device, record)
        x = self.model.embed_tokens(tokens)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        records = []
        for number, layer in enumerate(self.model.layers):
            x, found = layer(x, step, None if cache is None else cache.layers[number])
            records.append(found)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.model.norm(x, self.dtype), records

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
        if trace:
            self._check_trace(tokens, 0 if cache is None else cache.length)
        if indexer_loss and self.config.index_topk is None:
            raise ValueError("this model is dense and has no indexer to compute a loss for")
        if indexer_loss and self._precision != FULL_PRECISION:
            raise ValueError(f"rounding passes no gradient, so {self._precision} cannot train: set both to 'full'")
        record = "trace" if trace else "indexer_loss" if indexer_loss else None
        hidden, records = self.hidden(tokens, cache, record)
        logits = self.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if record is None:
            return logits
        return logits, (records if trace else torch.stack([loss for loss in records if isinstance(loss, Tensor)]))

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
        if tokens.device.type != "meta" and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab):
            raise ValueError(
                f"token ids run from {tokens.min()} to {tokens.max()}, the vocabulary from 0 to {vocab - 1}"
            )

    def _check_trace(self, tokens: Tensor, start: int) -> None:
        B, T = tokens.shape
        S = start + T
        size = self.config.num_hidden_layers * B * T * (2 * 4 * S + 8 * min(self.top_k, S))
        if size > TRACE_LIMIT:
            raise ValueError(
                f"a trace of {T} queries and {S} keys in {self.config.num_hidden_layers} layers takes "
                f"{size / 2**30:.1f} GiB, the limit is {TRACE_LIMIT / 2**30:.0f}: trace a shorter text"
            )
