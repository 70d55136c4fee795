"""Two optimisers for one model: Muon makes each matrix's momentum orthogonal, AdamW does the rest.

Muon learns the copy task, and with it everything else, in a third of AdamW's steps at this size. It is for matrices
that multiply hidden states; embedding, head, norms and the indexers stay with AdamW, as is usual.
Its ``match_rms_adamw`` scaling makes one learning rate mean about the same to both.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from dsa.distributed import fsdp

OPTIMIZERS = ("muon", "adamw")
_LOOKUPS = ("embed_tokens", "lm_head")


def adamw(parameters: Iterable[nn.Parameter], rate: float) -> list[Optimizer]:
    """AdamW alone, without weight decay."""
    return [AdamW(list(parameters), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


def muon_and_adamw(model: nn.Module, muon_rate: float, adamw_rate: float) -> list[Optimizer]:
    """Muon for the 2-D matrices of the layers, AdamW for the rest; the indexers are left to one of their own."""
    named = [(name, p) for name, p in model.named_parameters() if ".indexer." not in name]
    matrices = [p for name, p in named if p.ndim == 2 and not _for_adamw(name)]
    others = [p for name, p in named if p.ndim != 2 or _for_adamw(name)]
    muon = Muon(matrices, lr=muon_rate, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, *adamw(others, adamw_rate)]


def main_optimizers(name: str, model: nn.Module, rate: float) -> list[Optimizer]:
    """Those of OPTIMIZERS by name, for all but the indexers; ValueError for Muon on several processes."""
    fsdp.require_elementwise(name)
    if name == "muon":
        return muon_and_adamw(model, rate, rate)
    return adamw((p for key, p in model.named_parameters() if ".indexer." not in key), rate)


def _for_adamw(name: str) -> bool:
    return any(part in name for part in _LOOKUPS)


def remember_rates(optimizers: list[Optimizer]) -> None:
    """Note each group's learning rate as the peak that :func:`set_rates` scales."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])  # kept when the same optimiser trains again


def set_rates(optimizers: list[Optimizer], factor: float) -> None:
    """Set every learning rate to ``factor`` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]


def clip_gradients(optimizers: list[Optimizer], max_norm: float) -> None:
    """Scale the gradients of each optimiser's parameters down to norm ``max_norm`` at most.

    One norm over everything would let the indexer's loss shrink the main model's steps: a leak, if a small one.
    """
    for optimizer in optimizers:
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
