"""What each design of `course.experiments.attention_variants` would cost, its proxy included, if it were built well.

A sparse design is often advertised by the attention it saves. The cost has other items: the matrices that make a
proxy, the products that compare it with every candidate, what is stored for it, and what is read to write one token.
Here they stand side by side, for one new token in one layer that sees so many `keys`, as decoding has it: latents, MQA
mode. All designs are set on the same MLA and the same budget; the rules of counting are those of `dsa.analysis.flops`.

Numbers, not bytes: a precision would favour the one it was made for. What no FLOP shows stands beside: how many
candidates a top-k must rank, and in how many separate places memory is read: tokens lie scattered, a block in one
piece. Single components are counted as if memory delivered them as cheaply as whole vectors, which favours "sparq".
"""

from dataclasses import dataclass, replace

from course.experiments.attention_variants.selective_attention import Budget
from dsa.analysis.flops import active_parameters, index_pair_flops, mqa_pair_flops
from dsa.model.config import Config

DESIGNS = ("dense", "window", "sinks", "moba", "quest", "nsa", "sparq", "msa", "dsa", "delta")
REAL = Budget(keys=2048, block=128, sinks=4, components=64)
DELTA_WIDTH = 128  # key width of a Gated DeltaNet head; Qwen3-Next's
FULL = 1 / 4  # share of layers that keep their attention beside Gated DeltaNet


@dataclass(frozen=True)
class TokenCost:
    """One token in one layer (for "delta" the mean of four layers).

    Attributes:
        projections: FLOP of the matrices that only the proxy needs.
        scoring: FLOP of comparing the query with all candidates.
        attention: FLOP of attending to what was chosen, or of reading and writing the memory.
        stored: numbers kept for each token of the text, for as long as the text lasts.
        state: numbers kept for the whole text, however long.
        read: numbers fetched from either to write this token.
        candidates: how many scores a top-k ranks.
        places: in how many separate places the chosen keys lie, at most.
    """

    projections: float = 0
    scoring: float = 0
    attention: float = 0
    stored: float = 0
    state: float = 0
    read: float = 0
    candidates: int = 0
    places: int = 0

    @property
    def flops(self) -> float:
        """All FLOP."""
        return self.projections + self.scoring + self.attention

    def memory(self, length: int) -> float:
        """Numbers kept for a text of `length` tokens."""
        return self.state + length * self.stored


def token_cost(design: str, config: Config, keys: int, budget: Budget = REAL) -> TokenCost:
    """Count one design for a token that sees `keys` tokens, itself included.

    Raises ValueError for an unknown design, no keys, or a learned proxy without an indexer in the config.
    """
    if design not in DESIGNS:
        raise ValueError(f"design={design!r} is unknown: use one of {', '.join(DESIGNS)}")
    if keys < 1:
        raise ValueError(f"keys={keys}: a token sees at least itself, so give 1 or more")
    if design == "dense":
        return _attend(config, keys)
    if design == "delta":
        return _delta(config, keys)
    chosen = _attend(config, min(keys, budget.keys))
    if design in ("window", "sinks"):
        kept = budget.keys * _width(config)
        return replace(chosen, stored=0, state=kept, places=1 if design == "window" else 2)
    if design in ("sparq", "msa", "dsa"):
        return _by_token(design, config, keys, budget, chosen)
    return _by_block(design, config, keys, budget, chosen)


def _width(config: Config) -> int:
    """Numbers of one latent with its rotary key: C + R."""
    return config.kv_lora_rank + config.qk_rope_head_dim


def _attend(config: Config, attended: int) -> TokenCost:
    """Attend to so many latents, all kept."""
    work = attended * mqa_pair_flops(config)
    return TokenCost(attention=work, stored=_width(config), read=attended * _width(config), places=1)


def _by_block(design: str, config: Config, keys: int, budget: Budget, chosen: TokenCost) -> TokenCost:
    """A summary of each block is compared: its mean, two bounds, or what a network makes of it."""
    blocks, width = keys // budget.block, _width(config)
    vectors = 2 if design == "quest" else 1
    pair = 2 * config.num_attention_heads * width * vectors
    projections = 0.0
    if design == "nsa":  # the summary is attended to as well; the network sees a block's Z keys, then its own output
        pair = mqa_pair_flops(config)
        projections = 2 * (budget.block + 1) * width**2 / budget.block
    return replace(
        chosen,
        projections=projections,
        scoring=blocks * pair,
        stored=width * (1 + vectors / budget.block),
        read=chosen.read + blocks * vectors * width,
        candidates=blocks,
        places=min(blocks + 1, budget.blocks) + (design == "nsa"),
    )


def _by_token(design: str, config: Config, keys: int, budget: Budget, chosen: TokenCost) -> TokenCost:
    """Each token is compared: by an index key, or by some components of its latent."""
    scattered = min(keys, budget.keys)
    if design == "sparq":
        r = budget.components
        scoring, read = keys * 2 * config.num_attention_heads * r, chosen.read + keys * r
        return replace(chosen, scoring=scoring, read=read, candidates=keys, places=scattered)
    scoring, W = keys * index_pair_flops(config), config.indexer.head_dim
    by_block = design == "msa"
    blocks = -(-keys // budget.block)
    return replace(
        chosen,
        projections=2 * active_parameters(config)["indexer"] / config.num_hidden_layers,
        scoring=scoring,
        stored=chosen.stored + W,
        read=chosen.read + keys * W,
        candidates=blocks if by_block else keys,
        places=min(blocks, budget.blocks) if by_block else scattered,
    )


def _delta(config: Config, keys: int) -> TokenCost:
    """The mean of three layers with a memory for each head and one with attention to everything."""
    full, memory = _attend(config, keys), config.num_attention_heads * DELTA_WIDTH * config.v_head_dim
    return TokenCost(
        attention=FULL * full.attention + (1 - FULL) * 3 * 2 * memory,  # ask, write, read: 2 FLOP a number each
        stored=FULL * full.stored,
        state=(1 - FULL) * memory,
        read=FULL * full.read + (1 - FULL) * memory,
        places=1,
    )
