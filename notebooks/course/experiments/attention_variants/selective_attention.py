"""One bench for every idea that chooses keys: the same MLA, the same weights, another chooser.

Most sparse attention is one scheme with two free places. Score candidates by a *proxy* that is cheaper than attention,
take the best, attend to those. The candidates are tokens or blocks of them; the proxy is derived from the keys that
are there anyway, or learned for the purpose. That is a map of four squares, and DSA is one of them:

    |          | derived proxy                             | learned proxy         |
    | -------- | ----------------------------------------- | --------------------- |
    | blocks   | `moba` (mean), `quest` (bounds), `nsa` (*) | `msa`                 |
    | tokens   | `sparq`                                   | DSA: `dsa.model.indexer` |

(*) NSA compresses a block by a small network, which learns from the language loss because the compressed keys are
attended to as well: half a step towards "learned". `sinks` has no proxy: places alone decide. `delta` keeps no keys.

The originals were published for attention with separate key heads. Here all stand on MLA in its MQA mode, in which a
latent is fetched once and serves all heads; so one choice serves all heads, and scores of heads are added after a
softmax over the candidates, as DSA's own teacher does. Only what chooses differs. Nothing here is fast: scores are
whole matrices, pooled keys are made anew in each pass. What these designs would cost if built well is counted in
`course.experiments.variant_costs`.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa.kernels.fp8 import QuantizedLatentKV
from dsa.model.attention import Attention, ForwardContext, dequantized
from dsa.model.config import Config
from dsa.model.indexer import IndexFactors
from dsa.model.transformer import Layer, Transformer


@dataclass(frozen=True)
class Budget:
    """What a query may read: `keys` tokens in all; blocks of `block`; `sinks` of them the text's first tokens.

    `components` is the number of a query's components that `sparq` compares. Raises ValueError for a budget that does
    not hold two blocks (the query's own and a chosen one), or is all sinks.
    """

    keys: int = 32
    block: int = 8
    sinks: int = 4
    components: int = 16

    def __post_init__(self) -> None:
        for name in ("keys", "block", "components"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value}: a query reads at least 1")
        if self.keys % self.block or self.keys < 2 * self.block:
            raise ValueError(
                f"{self.keys} keys in blocks of {self.block}: give a multiple of the block, at least {2 * self.block}, "
                "for the query's own block and a chosen one"
            )
        if not 0 <= self.sinks < self.keys:
            raise ValueError(f"sinks={self.sinks} must lie in 0 ... {self.keys - 1}: at least one key is recent")

    @property
    def blocks(self) -> int:
        """How many blocks it is."""
        return self.keys // self.block


class SelectiveAttention(Attention):
    """MLA whose keys a subclass chooses, whatever `model.attention` says; the indexer, if any, is asked under "sparse".

    A key that is chosen twice would count twice: choices have no repeats.
    """

    def __init__(self, config: Config, layer: int, budget: Budget):
        super().__init__(config, layer)
        self.budget = budget

    def choose(self, q: Tensor, kv: Tensor, index: IndexFactors | None) -> Tensor:
        """Choose: absorbed queries (B, T, H, C + R), latents (B, S, C + R) -> selected (B, T, K), -1 for empty."""
        raise NotImplementedError

    @torch.no_grad()
    def select(
        self, context: ForwardContext, q: Tensor, kv: Tensor | QuantizedLatentKV, index: IndexFactors | None
    ) -> Tensor | None:
        """Hand the kernels this design's choice."""
        return self.choose(self.absorb_query(q), dequantized(kv, q.dtype), index)


def convert(model: Transformer, design: type[Attention], budget: Budget) -> Transformer:
    """A copy of a model whose layers attend by `design`; every weight the two share is equal."""
    grown = copy.deepcopy(model)
    for number, layer in enumerate(grown.model.layers):
        assert isinstance(layer, Layer)
        new = design(model.config, number, budget)  # type: ignore[call-arg]
        new.load_state_dict(layer.self_attn.state_dict(), strict=False)
        layer.self_attn = new.to(model.dtype).train(model.training)
    return grown
