"""What a model's sizes are: a frozen, validated record with the field names of the published config.json.

The names are Hugging Face's, so that a published file reads in as it stands; beside each is the shape letter
that code, docstrings and figures use for it. Sizes that cannot work are refused here, before a tensor is built,
with the value, the limit and the remedy. Features that this package does not compute (biases, tied embeddings,
another router) are refused too rather than silently ignored.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple


class IndexerSizes(NamedTuple):
    """The lightning indexer's sizes; a dense model's are all 0, so that what it costs is 0 as well."""

    heads: int = 0  # J
    head_dim: int = 0  # W
    top_k: int = 0  # K


@dataclass(frozen=True)
class Yarn:
    """How YaRN stretches the rotary frequencies to a longer context (spec: rope type "yarn")."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        _require(self.factor >= 1, f"YaRN factor={self.factor} must be at least 1")
        _require(
            self.mscale == self.mscale_all_dim,
            f"mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim} differ: then cos and sin would be "
            "scaled as well, which no published model of this family does; set both to the same value",
        )


@dataclass(frozen=True)
class Config:
    """The sizes of a DeepSeek-V3.2 model, or of its dense predecessor V3 when `index_topk` is None.

    Raises ValueError naming the field, its value and the limit for sizes that cannot work.
    """

    vocab_size: int
    hidden_size: int  # D
    num_hidden_layers: int
    num_attention_heads: int  # H
    q_lora_rank: int | None  # Q; None: the query has no low-rank latent (some dense models)
    kv_lora_rank: int  # C
    qk_nope_head_dim: int  # N
    qk_rope_head_dim: int  # R
    v_head_dim: int  # V
    intermediate_size: int  # width of a dense feed-forward layer
    moe_intermediate_size: int  # width of one expert
    n_routed_experts: int  # E
    num_experts_per_tok: int
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    first_k_dense_replace: int = 0  # so many first layers are dense, all others mixtures of experts
    index_n_heads: int | None = None  # J
    index_head_dim: int | None = None  # W
    index_topk: int | None = None  # K; None: no indexer, dense attention only
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096

    def __post_init__(self) -> None:
        optional = {"q_lora_rank", "index_n_heads", "index_head_dim", "index_topk"}
        may_be_zero = {"n_shared_experts", "first_k_dense_replace"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", int) or (field.name in optional and value is not None):
                least = 0 if field.name in may_be_zero else 1
                whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
                _require(whole, f"{field.name}={value!r} must be a whole number of at least {least}")
            elif field.type in ("float", float):
                number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                _require(number and value > 0, f"{field.name}={value!r} must be a number above 0")
            elif field.type in ("bool", bool):
                _require(isinstance(value, bool), f"{field.name}={value!r} must be true or false")
        self._check_rotary_and_indexer()
        self._check_experts()

    def _check_rotary_and_indexer(self) -> None:
        R = self.qk_rope_head_dim
        _require(R % 2 == 0, f"qk_rope_head_dim={R} must be even: rotary dimensions turn in pairs")
        given = [self.index_n_heads, self.index_head_dim, self.index_topk]
        _require(
            all(x is None for x in given) or all(x is not None for x in given),
            f"index_n_heads, index_head_dim, index_topk = {given}: give all three, or none for a dense model",
        )
        if self.index_head_dim is not None:
            _require(
                self.index_head_dim >= R,
                f"index_head_dim={self.index_head_dim} must be at least qk_rope_head_dim={R}: "
                "the indexer rotates its first R dimensions",
            )

    def _check_experts(self) -> None:
        E, groups, per_token = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        _require(E % groups == 0, f"n_routed_experts={E} must be a multiple of n_group={groups}")
        _require(self.topk_group <= groups, f"topk_group={self.topk_group} exceeds n_group={groups}")
        reachable = self.topk_group * (E // groups)
        _require(
            per_token <= reachable,
            f"num_experts_per_tok={per_token} exceeds the {reachable} experts in topk_group={self.topk_group} groups",
        )
        _require(
            groups == 1 or E // groups >= 2,
            f"n_group={groups} leaves {E // groups} expert a group; a group is scored by its best two, "
            f"so use at most {E // 2} groups",
        )
        dense = self.first_k_dense_replace
        _require(
            dense <= self.num_hidden_layers,
            f"first_k_dense_replace={dense} exceeds num_hidden_layers={self.num_hidden_layers}",
        )

    @property
    def indexer(self) -> IndexerSizes:
        """J, W and K as whole numbers: the three optional fields, or 0 in a dense model."""
        return IndexerSizes(self.index_n_heads or 0, self.index_head_dim or 0, self.index_topk or 0)

    @property
    def softmax_scale(self) -> float:
        """(N + R)^-0.5, times mscale squared under YaRN: 0.135234 for the real model (report: App. A; V3 code)."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if self.yarn is None or self.yarn.factor == 1:
            return scale
        mscale = 0.1 * self.yarn.mscale_all_dim * math.log(self.yarn.factor) + 1
        return scale * mscale**2

    @classmethod
    def v32_exp(cls) -> "Config":
        """DeepSeek-V3.2-Exp as published: 671 B parameters. Build it with `torch.device("meta")`."""
        return cls(
            vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128,
            q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
            intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8,
            n_shared_experts=1, n_group=8, topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=3,
            index_n_heads=64, index_head_dim=128, index_topk=2048,
            yarn=Yarn(factor=40, original_max_position_embeddings=4096), max_position_embeddings=163840,
        )  # fmt: skip

    @classmethod
    def mini(cls) -> "Config":
        """The laptop model of this course: 0.6 M parameters, trained in minutes on two cores."""
        return cls(
            vocab_size=305, hidden_size=96, num_hidden_layers=3, num_attention_heads=4,
            q_lora_rank=64, kv_lora_rank=48, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=24,
            intermediate_size=256, moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2,
            n_shared_experts=1, first_k_dense_replace=1,
            index_n_heads=2, index_head_dim=32, index_topk=16, rope_theta=1000.0, max_position_embeddings=512,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> "Config":
        """Read a published config.json, old style (`rope_scaling`) or new (`rope_parameters`).

        Raises ValueError for a missing size and for a feature that this package does not compute.
        """
        _refuse_unknown_features(published)
        known = {f.name for f in fields(cls)} - {"yarn", "rope_theta"}
        values = {name: published[name] for name in known if name in published}
        required = {f.name for f in fields(cls)} & set(_REQUIRED)
        missing = sorted(required - values.keys())
        _require(not missing, f"config lacks {', '.join(missing)}: add these sizes to config.json")
        if published.get("model_type") == "deepseek_v3":
            values |= dict.fromkeys(("index_n_heads", "index_head_dim", "index_topk"))
        rope = dict(published.get("rope_parameters") or published.get("rope_scaling") or {})
        theta = rope.get("rope_theta", published.get("rope_theta", 10000.0))
        return cls(**values, rope_theta=float(theta), yarn=_yarn_from_dict(rope, published))

    def to_dict(self) -> dict[str, Any]:
        """Write the fields as a published config.json has them (new style, with `rope_parameters`)."""
        values = asdict(self)
        yarn, theta = values.pop("yarn"), values.pop("rope_theta")
        rope: dict[str, Any] = {"rope_type": "default" if yarn is None else "yarn", "rope_theta": theta}
        if self.index_topk is None:
            for name in ("index_n_heads", "index_head_dim", "index_topk"):
                del values[name]
        return {
            "model_type": "deepseek_v3" if self.index_topk is None else "deepseek_v32",
            **values,
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.qk_rope_head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "rope_parameters": rope | (yarn or {}),
        }

    def replace(self, **changes: Any) -> "Config":
        """Copy with some fields changed, validated again."""
        return replace(self, **changes)


_REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size",
    "n_routed_experts", "num_experts_per_tok",
)  # fmt: skip


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _refuse_unknown_features(published: Mapping[str, Any]) -> None:
    supported = {
        "model_type": ("deepseek_v32", "deepseek_v3"), "hidden_act": ("silu",), "attention_bias": (False,),
        "mlp_bias": (False,), "tie_word_embeddings": (False,), "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",), "moe_layer_freq": (1,), "rope_interleave": (True,),
    }  # fmt: skip
    for name, allowed in supported.items():
        value = published.get(name)
        wanted = " or ".join(map(repr, allowed))
        _require(
            value is None or value in allowed,
            f"config has {name}={value!r}, but only {wanted} is computed here",
        )
    heads, kv_heads = published.get("num_attention_heads"), published.get("num_key_value_heads")
    _require(kv_heads in (None, heads), f"num_key_value_heads={kv_heads} must equal num_attention_heads={heads}")
    kinds, dense = published.get("mlp_layer_types"), published.get("first_k_dense_replace", 0)
    _require(
        kinds is None or list(kinds) == ["dense"] * dense + ["sparse"] * (len(kinds) - dense),
        f"mlp_layer_types={kinds} is not {dense} dense layers (first_k_dense_replace) followed by experts",
    )


def _yarn_from_dict(rope: Mapping[str, Any], published: Mapping[str, Any]) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    _require(kind == "yarn", f"rope type {kind!r} is not computed here: only 'yarn' and 'default' are")
    defaults = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}
    other = {name: rope[name] for name in defaults if rope.get(name, defaults[name]) != defaults[name]}
    _require(not other, f"a yarn rope with {other} is not computed here: only with {defaults}")
    missing = [name for name in ("factor", "mscale", "mscale_all_dim") if name not in rope]
    _require(
        not missing,
        f"a yarn rope needs {', '.join(missing)} too: without mscale_all_dim the softmax scale is another one",
    )
    original = rope.get("original_max_position_embeddings", published.get("max_position_embeddings"))
    _require(original is not None, "a yarn rope needs original_max_position_embeddings")
    optional = {name: float(rope[name]) for name in ("beta_fast", "beta_slow") if name in rope}
    mscales = {name: float(rope[name]) for name in ("mscale", "mscale_all_dim")}
    return Yarn(float(rope["factor"]), int(original), **mscales, **optional)
