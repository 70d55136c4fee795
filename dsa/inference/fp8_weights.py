"""What a checkpoint stores: which matrices are FP8 in the published format, and how each tensor is turned into it.

FP8: every projection of the attention, the indexer's queries and key, all feed-forward and expert weights. Not FP8,
because little would be saved or much lost: embedding and head, the router, the indexer's head weights, and the
projection with which the multi-token-prediction layer begins.
"""

import re
from collections.abc import Iterator, Mapping
from math import ceil, prod

import torch
from torch import Tensor

from dsa.inference.layout import SCALE
from dsa.inference.reading import stays_fp32
from dsa.kernels import fp8

PUBLISHED = re.compile(
    r"\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj|wq_b|wk)\.weight$"
)


class Writer:
    """Turns a model's tensors into those that a file holds, one at a time.

    Args:
        state: tensors by their published names.
        dtype: of matrices that are not FP8. Norms and router biases are fp32.
        fp8: round what the published format rounds. What is FP8 already stays so in any case.
    """

    def __init__(self, state: Mapping[str, Tensor], dtype: torch.dtype, fp8: bool):
        self.state, self.dtype, self.fp8 = state, dtype, fp8

    @property
    def quantised(self) -> bool:
        """Whether anything will be FP8."""
        return any(self._is_fp8(name) for name in self.state)

    def _is_fp8(self, name: str) -> bool:
        return self.state[name].dtype == fp8.E4M3 or (self.fp8 and PUBLISHED.search(name) is not None)

    def nbytes(self, name: str) -> int:
        """What one tensor will take, its scales included."""
        shape = self.state[name].shape
        if self._is_fp8(name):
            return prod(shape) + 4 * prod(ceil(size / block) for size, block in zip(shape, fp8.BLOCK, strict=True))
        return prod(shape) * (4 if self._stays_fp32(name) else self.dtype.itemsize)

    def _stays_fp32(self, name: str) -> bool:
        return stays_fp32(name) or name.endswith(SCALE)

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """One tensor as stored, and after fresh codes their scales."""
        tensor = self.state[name].detach()
        if self._is_fp8(name) and tensor.dtype != fp8.E4M3:
            codes, scale = fp8.quantise(tensor, fp8.BLOCK)
            yield name, codes.cpu()
            yield name + SCALE, scale.cpu()
        elif tensor.dtype == fp8.E4M3:
            yield name, tensor.cpu().contiguous()
        else:
            yield name, tensor.to("cpu", torch.float32 if self._stays_fp32(name) else self.dtype).contiguous()

    def plan(self, limit: int) -> list[list[str]]:
        """Cut the names into runs of at most `limit` bytes, for one file each."""
        runs: list[list[str]] = [[]]
        size = 0
        for name in self.state:
            if runs[-1] and size + self.nbytes(name) > limit:
                runs.append([])
                size = 0
            runs[-1].append(name)
            size += self.nbytes(name)
        return runs
