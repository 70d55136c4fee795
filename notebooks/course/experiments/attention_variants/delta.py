"""No keys at all: Gated DeltaNet (arXiv 2412.06464), with a full attention layer in four, as Qwen3-Next has it.

Every head keeps a matrix M (key width x value width), a memory of fixed size. A token first lets it fade, then asks
what the memory holds for its key, and writes the *difference* to what it should hold (the delta rule):

    M <- a M                          forget: a in (0, 1), for each token and head
    M <- M + b k (v - k^T M)^T        correct: b in (0, 1), k of length one
    o =  M^T q                        read

Nothing grows with the text: no cache, no proxy, no top-k, and each token costs the same for ever. The price is the
size: keys of width W span W directions, and what is written beyond that disturbs what is there. So such models keep a
full attention layer here and there, whose cache does grow.

`recurrent` is the definition, token by token. `chunked` computes the same in blocks of matrix products: within a chunk
the corrections depend on each other through a triangular system, which is solved at once. There are no rotations: order
comes from the fading and from a short convolution in front.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa.model.attention import ForwardContext, LayerOutput
from dsa.model.cache import LayerCache
from dsa.model.config import Config
from dsa.model.norm import RMSNorm
from dsa.model.transformer import Layer, Transformer

CHUNK = 32
TAPS = 4  # of the short convolution
FULL_EVERY = 4  # one layer in so many keeps its attention
REPLACED = 2  # layers whose attention `hybrid` replaces: the first ones
_DENSE = {"index_n_heads": None, "index_head_dim": None, "index_topk": None}


def recurrent(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor) -> Tensor:
    """The definition: q, k (B, T, H, W), v (B, T, H, V), log_a <= 0 and b (B, T, H) -> (B, T, H, V)."""
    memory = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])  # (B, H, W, V)
    out = []
    for t in range(q.shape[1]):
        memory = log_a[:, t].exp()[..., None, None] * memory
        held = torch.einsum("bhw,bhwv->bhv", k[:, t], memory)
        correction = b[:, t, :, None] * (v[:, t] - held)
        memory = memory + torch.einsum("bhw,bhv->bhwv", k[:, t], correction)
        out.append(torch.einsum("bhw,bhwv->bhv", q[:, t], memory))
    return torch.stack(out, 1)


def chunked(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, chunk: int = CHUNK) -> Tensor:
    """The same, chunk by chunk: see `recurrent`."""
    T = q.shape[1]
    missing = -T % chunk
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)).transpose(1, 2) for x in (q, k, v))  # (B, H, T, *)
    log_a, b = (F.pad(x, (0, 0, 0, missing)).transpose(1, 2) for x in (log_a, b))  # (B, H, T)
    memory, out = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for start in range(0, T, chunk):
        here = slice(start, start + chunk)
        result, memory = _one_chunk(q[:, :, here], k[:, :, here], v[:, :, here], log_a[..., here], b[..., here], memory)
        out.append(result)
    return torch.cat(out, 2).transpose(1, 2)[:, :T]


def _one_chunk(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Read and write one chunk (B, H, c, *): its outputs and the memory after it."""
    fade = log_a.cumsum(-1)  # from the chunk's start up to each token
    between = (fade[..., :, None] - fade[..., None, :]).tril().exp().tril()  # from token j to token i, 0 for j > i
    system = b[..., None] * (k @ k.mT) * between  # its diagonal is taken to be one
    found = fade.exp()[..., None] * (k @ memory)  # what the memory of before holds
    corrections = torch.linalg.solve_triangular(system, b[..., None] * (v - found), upper=False, unitriangular=True)
    out = fade.exp()[..., None] * (q @ memory) + ((q @ k.mT) * between) @ corrections
    to_end = (fade[..., -1:] - fade).exp()[..., None]
    return out, fade[..., -1].exp()[..., None, None] * memory + (to_end * k).mT @ corrections


class GatedDeltaNet(nn.Module):
    """One layer's mixing of tokens in the place of attention: x (B, T, D) -> (B, T, D). H heads, keys of `width`."""

    def __init__(self, config: Config, width: int, seed: int = 0):
        super().__init__()
        self.heads, self.width, self.value = config.num_attention_heads, width, config.v_head_dim
        D, keys, values = config.hidden_size, self.heads * width, self.heads * self.value
        self.qkv = nn.Linear(D, 2 * keys + values, bias=False)
        self.rates = nn.Linear(D, 2 * self.heads, bias=False)  # how much to forget, how much to write
        self.out_gate = nn.Linear(D, values, bias=False)
        self.taps = nn.Parameter(torch.empty(2 * keys + values, 1, TAPS))
        self.log_speed = nn.Parameter(torch.zeros(self.heads))
        self.forget = nn.Parameter(torch.full((self.heads,), -4.0))
        self.norm = RMSNorm(self.value, config.rms_norm_eps)
        self.o_proj = nn.Linear(values, D, bias=False)
        self._start(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _start(self, generator: torch.Generator) -> None:
        """Matrices as the model draws its own; the convolution passes the token itself, with some noise."""
        for p in (self.qkv.weight, self.rates.weight, self.out_gate.weight, self.o_proj.weight):
            p.copy_(torch.randn(p.shape, generator=generator) * 1.7 * (3 * p.shape[1]) ** -0.5)
        self.taps.copy_(torch.randn(self.taps.shape, generator=generator) * 0.3)
        self.taps[..., -1] += 1.0

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Make q, k (B, T, H, W), v (B, T, H, V), log_a and b (B, T, H) of the rule."""
        mixed = F.conv1d(F.pad(self.qkv(x).mT, (TAPS - 1, 0)), self.taps, groups=len(self.taps))  # sees only the past
        keys = self.heads * self.width
        q, k, v = (
            y.unflatten(-1, (self.heads, -1))
            for y in F.silu(mixed).mT.split([keys, keys, mixed.shape[1] - 2 * keys], -1)
        )
        q, k = F.normalize(q, dim=-1) * self.width**-0.5, F.normalize(k, dim=-1)
        a, b = self.rates(x).unflatten(-1, (2, self.heads)).unbind(-2)
        return q, k, v, -self.log_speed.exp() * F.softplus(a + self.forget), b.sigmoid()

    def forward(self, x: Tensor, context: ForwardContext, cache: LayerCache | None = None) -> LayerOutput:
        """Mix tokens. Raises ValueError for a cache: it holds latents, and this layer keeps a matrix."""
        if cache is not None:
            raise ValueError("the cache keeps latents and a Gated DeltaNet layer has none: run it without a cache")
        read = self.norm(chunked(*self.factors(x)))  # (B, T, H, V)
        return LayerOutput(self.o_proj(F.silu(self.out_gate(x)) * read.flatten(-2)))


def hybrid(model: Transformer, width: int = 24, seed: int = 0) -> Transformer:
    """Gated DeltaNet in three layers of four, made from a dense model of three: the last layer keeps its attention.

    The other two get a Gated DeltaNet for it and keep their feed-forward; between them and the last one stands
    a new layer, which adds nothing at first. Raises ValueError for a model that has not three layers.
    """
    config = model.config
    if config.num_hidden_layers != FULL_EVERY - 1:
        raise ValueError(
            f"one full layer in {FULL_EVERY} is made here from {FULL_EVERY - 1} layers, not {config.num_hidden_layers}"
        )
    grown = Transformer(config.replace(num_hidden_layers=FULL_EVERY, **_DENSE))
    grown.reset_parameters(seed)
    places = {0: 0, 1: 1, 2: 3}
    for old, new in places.items():
        grown.model.layers[new].load_state_dict(model.model.layers[old].state_dict(), strict=False)
    for name in ("embed_tokens", "norm"):
        getattr(grown.model, name).load_state_dict(getattr(model.model, name).state_dict())
    grown.lm_head.load_state_dict(model.lm_head.state_dict())
    for number, layer in enumerate(grown.model.layers):
        assert isinstance(layer, Layer)
        if number < FULL_EVERY - 1:
            layer.self_attn = GatedDeltaNet(config, width, seed=1000 * seed + number)  # type: ignore[assignment]
        if number not in places.values():
            silence(layer)
    return grown


@torch.no_grad()
def silence(layer: nn.Module) -> None:
    """Let a layer add nothing to the residual stream until it has learned to."""
    for name, p in layer.named_parameters():
        if "down_proj" in name or "o_proj" in name:
            p.zero_()
