"""No proxy at all: the first tokens and the last ones (StreamingLLM, arXiv 2309.17453).

A plain sliding window is `dsa.model.baselines.window`. Its weakness was noticed in dense models: their heads lay what
attention they have no use for on the text's first tokens, the *sinks*, and without these the softmax has to put it
elsewhere. Keeping a handful of sinks costs nothing. StreamingLLM also renumbers positions within what it keeps, to read
beyond the trained length; we leave positions as they are, since nothing here is longer than that.
"""

import torch
from torch import Tensor

from course.experiments.attention_variants.selective_attention import SelectiveAttention
from dsa.kernels import ops
from dsa.model import baselines
from dsa.model.indexer import IndexFactors


def sinks_and_window(batch: int, T: int, S: int, keys: int, sinks: int, device: torch.device | str = "cpu") -> Tensor:
    """Choose the first `sinks` tokens and the last `keys - sinks`: (B, T, <= keys), -1 for empty, none twice."""
    recent = baselines.window(batch, T, S, keys - sinks, device)
    recent = recent.masked_fill(recent < sinks, ops.EMPTY)  # these are in the other part
    own = torch.arange(S - T, S, device=device)[:, None]
    first = torch.arange(min(sinks, S), device=device).expand(T, -1)
    first = first.masked_fill(first > own, ops.EMPTY)  # (T, sinks)
    return torch.cat([first.expand(batch, -1, -1), recent], dim=-1)


class Sinks(SelectiveAttention):
    """MLA over sinks and a window."""

    def choose(self, q: Tensor, kv: Tensor, index: IndexFactors | None) -> Tensor:
        """Choose by place."""
        B, T = q.shape[:2]
        return sinks_and_window(B, T, kv.shape[1], self.budget.keys, self.budget.sinks, q.device)
