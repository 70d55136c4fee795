"""Root-mean-square normalisation, in fp32 whatever the model's own precision."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa.kernels.reference import at_least_fp32


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least fp32 and cast to `dtype` (or back to x's own)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Normalise the last dimension: the same shape."""
        wide = at_least_fp32(x)
        weight = self.weight if self.weight.dtype == wide.dtype else self.weight.to(wide.dtype)
        return F.rms_norm(wide, weight.shape, weight, self.eps).to(dtype or x.dtype)
