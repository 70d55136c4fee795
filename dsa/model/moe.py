"""The feed-forward half of a layer: one dense SwiGLU, or a few experts out of many.

A mixture of experts gives each token `num_experts_per_tok` of the E experts, and one shared expert always. Three
details are easy to get wrong, and all three are silent. The learned bias helps to *choose* experts and never weighs
them. Groups that were not chosen are masked with -inf, not 0: a biased score may be negative. And the weights are
normalised before the scaling. The bias learns without a loss term: after each step it rises for experts that got too
few tokens and falls for those that got too many (DeepSeek-V3 report, section 2.1.2; Eq. 12 to 16).

Sending tokens to experts is done in three ways that give the same. The loop over experts is the readable one, and
trains. One token needs no sorting. On a GPU the loop has to wait until the device has said how many tokens each expert
got; weights that lie behind each other in memory (`MoE.pack`) are multiplied in one grouped product instead, and
nothing waits.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa.kernels.reference import at_least_fp32
from dsa.model.config import Config


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), the product in fp32; x (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself."""
        gate, up = at_least_fp32(self.gate_proj(x)), at_least_fp32(self.up_proj(x))
        return self.down_proj((F.silu(gate) * up).to(x.dtype))


def route(logits: Tensor, bias: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Choose experts: logits (n, E), bias (E,) -> chosen (n, per token), weights (n, per token)."""
    scores = logits.sigmoid()
    biased = scores + bias  # for choosing only
    if config.n_group > 1:
        groups = biased.unflatten(-1, (config.n_group, -1))  # (n, groups, E / groups)
        group_scores = groups.topk(2, dim=-1).values.sum(-1)  # a group is as good as its best two
        kept = group_scores.topk(config.topk_group, dim=-1).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept, False)
        biased = groups.masked_fill(dropped[..., None], float("-inf")).flatten(-2)  # (n, E)
    chosen = biased.topk(config.num_experts_per_tok, dim=-1).indices
    return chosen, expert_weights(scores, chosen, config)


def expert_weights(scores: Tensor, chosen: Tensor, config: Config) -> Tensor:
    """How much each chosen expert counts: unbiased scores (n, E), chosen (n, per token) -> (n, per token)."""
    weights = scores.gather(-1, chosen)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * config.routed_scaling_factor


class Gate(nn.Module):
    """The router: scores every expert for every token, in fp32."""

    e_score_correction_bias: Tensor  # helps to choose, never weighs
    load: Tensor  # tokens that each expert got since the last `balance`

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.replay: Tensor | None = None  # (n, per token): an earlier choice to take again; -1 where there is none
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("load", torch.zeros(config.n_routed_experts, dtype=torch.int64), persistent=False)
        nn.init.normal_(self.weight, std=config.hidden_size**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Route tokens x (n, D) -> chosen experts (n, per token) and their weights (n, per token)."""
        x = at_least_fp32(x)
        logits = F.linear(x, self.weight.to(x.dtype))
        chosen, weights = route(logits, self.e_score_correction_bias, self.config)
        if self.replay is not None:  # the experts of then, with the weights and the gradient of today
            chosen = torch.where(self.replay < 0, chosen, self.replay)
            weights = expert_weights(logits.sigmoid(), chosen, self.config)
        if self.training and not chosen.is_meta:
            self.load += torch.bincount(chosen.flatten(), minlength=len(self.load))
        return chosen, weights

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Move the bias by `speed` toward the experts that were used too little since the last call."""
        self.e_score_correction_bias += speed * (self.load.double().mean() - self.load).sign()
        self.load.zero_()


class MoE(nn.Module):
    """Routed experts plus a shared one, summed in fp32; x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config):
        super().__init__()
        width, hidden = config.hidden_size, config.moe_intermediate_size
        self.run_idle_experts = False  # on no tokens: for a gradient of zero instead of none
        self.gate = Gate(config)
        self.experts = nn.ModuleList(FeedForward(width, hidden) for _ in range(config.n_routed_experts))
        if config.n_shared_experts:
            self.shared_experts = FeedForward(width, hidden * config.n_shared_experts)
        self.all_experts = nn.Identity()  # where `tensor_parallel` adds what experts on other ranks have found
        self.packed: tuple[Tensor, ...] = ()  # see `pack`

    def forward(self, x: Tensor) -> Tensor:
        """Send each token through its own experts only."""
        tokens = x.flatten(0, -2)  # (n, D)
        chosen, weights = self.gate(tokens)
        on_cpu = x.device.type == "cpu"
        if self.is_packed and not on_cpu and x.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            out = self.grouped(tokens, chosen, weights)
        elif len(tokens) == 1 and on_cpu and not self.run_idle_experts:
            out = self.one_token(tokens, chosen, weights)
        else:
            out = self.expert_by_expert(tokens, chosen, weights)
        if hasattr(self, "shared_experts"):
            out = out + self.shared_experts(tokens)
        return self.all_experts(out).to(x.dtype).view_as(x)

    def expert_by_expert(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Loop over experts: tokens (n, D), chosen and weights (n, per token) -> weighted sums (n, D) in fp32."""
        out = torch.zeros_like(tokens, dtype=weights.dtype)
        for expert, rows, slots in self.dispatch(chosen):
            out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, slots, None])
        return out

    def dispatch(self, chosen: Tensor) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """Sort a choice (n, per token) by expert: each one that is here, the rows that chose it, and in which slot.

        The counts are read from the device once for all experts; asking each for its rows would halt it E times.
        """
        pairs, per_token = chosen.flatten(), chosen.shape[-1]
        if pairs.is_meta:  # shapes only, and they are the same however tokens are shared out
            counts = [len(part) for part in pairs.tensor_split(len(self.experts))]
        else:
            counts = torch.bincount(pairs, minlength=len(self.experts)).tolist()
        for expert, routed in zip(self.experts, pairs.argsort(stable=True).split(counts), strict=True):
            if expert is not None and (len(routed) or self.run_idle_experts):  # None: it is on another rank
                yield expert, routed // per_token, routed % per_token

    def one_token(self, token: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The same for a single token (1, D), as decoding has it; in the order of experts, so with the same sums."""
        out = torch.zeros_like(token, dtype=weights.dtype)
        for expert, weight in sorted(zip(chosen[0].tolist(), weights[0].tolist(), strict=True)):
            mlp = self.experts[expert]
            if isinstance(mlp, FeedForward):  # and not on another rank
                out += mlp(token).to(out.dtype) * weight  # a bf16 tensor times a Python number would stay bf16
        return out

    @torch.no_grad()
    def pack(self) -> None:
        """Move the experts' weights into three tensors (E, out, in), of which each weight is then a slice.

        Names, values and gradients stay; it takes the memory of one of the three for a moment. Experts whose weights
        are somewhere else, or in eight bits, stay as they are.
        """
        if not all(isinstance(expert, FeedForward) for expert in self.experts):
            return
        packed = []
        for name in ("gate_proj", "up_proj", "down_proj"):
            linears = [expert.get_submodule(name) for expert in self.experts]
            if not all(type(linear) is nn.Linear for linear in linears):
                return
            weights: list[Any] = [linear.weight for linear in linears]
            packed.append(torch.stack(weights))
            for weight, part in zip(weights, packed[-1], strict=True):
                weight.data = part
        self.packed = tuple(packed)

    @property
    def is_packed(self) -> bool:
        """Whether the experts' weights still are slices: a change of type or device makes new tensors of them."""
        first: Any = self.experts[0]
        return bool(self.packed) and first.gate_proj.weight.data_ptr() == self.packed[0].data_ptr()

    def grouped(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The same with packed weights, in grouped products: nothing is read back from the device."""
        gate, up, down = (weight.mT for weight in self.packed)  # (E, in, out)
        order = chosen.flatten().argsort(stable=True)  # pairs of token and slot, by expert
        experts = torch.arange(len(gate), device=chosen.device)
        ends = torch.searchsorted(chosen.flatten()[order], experts, right=True).int()  # where each expert's pairs end
        x = tokens[order // chosen.shape[1]]
        product = F.silu(F.grouped_mm(x, gate, offs=ends).float()) * F.grouped_mm(x, up, offs=ends).float()
        found = F.grouped_mm(product.to(x.dtype), down, offs=ends)
        by_pair = torch.empty_like(found).index_copy_(0, order, found).view(*chosen.shape, -1)  # (n, per token, D)
        return (by_pair * weights[..., None]).sum(1)
