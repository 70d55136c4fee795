"""What a model remembers of the tokens it has read: per layer one latent and one index key for each.

MLA's cache holds, for all H heads together, C + R numbers a token; DSA adds the W numbers of the index key. In
bf16 and at the real sizes that is 1152 + 256 bytes per token and layer: at equal precision sparse attention makes
the cache *larger*. What it saves is work, not memory.
"""

import torch
from torch import Tensor

from dsa.model.config import Config


class LayerCache:
    """One layer's part: latents (B, capacity, C + R) and index keys (B, capacity, W), filled from the left."""

    def __init__(self, config: Config, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        def room(width: int) -> Tensor:
            return torch.zeros(batch, capacity, width, dtype=dtype, device=device)

        self.latent = room(config.kv_lora_rank + config.qk_rope_head_dim)
        self.index_key = room(config.index_head_dim or 0)
        self.index_length = 0  # tokens with an index key; dense attention leaves none behind

    def append_latent(self, start: int, latent: Tensor) -> Tensor:
        """Write latents (B, T, C + R) at `start` and return all so far (B, start + T, C + R)."""
        end = start + latent.shape[1]
        self.latent[:, start:end] = latent
        return self.latent[:, :end]

    def append_index_key(self, start: int, key: Tensor) -> Tensor:
        """Write index keys (B, T, W) at `start` and return all so far (B, start + T, W).

        Raises:
            ValueError: if earlier tokens were read without the indexer and so have no key.
        """
        if self.index_length < start:
            raise ValueError(
                f"the cache holds {start} tokens but only {self.index_length} index keys, because the others were not "
                "read with attention='sparse': start again with a new cache to switch"
            )
        end = self.index_length = start + key.shape[1]
        self.index_key[:, start:end] = key
        return self.index_key[:, :end]


class Cache:
    """The memory of one generation, for all layers: allocated once, filled by the model's forward passes.

    Args:
        config: the model's sizes.
        batch: B, prompts side by side.
        capacity: most tokens a prompt and its continuation may have together.
    """

    def __init__(
        self,
        config: Config,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if capacity > config.max_position_embeddings:
            raise ValueError(
                f"a cache for {capacity} tokens exceeds the model's max_position_embeddings="
                f"{config.max_position_embeddings}: ask for fewer new tokens or shorten the prompt"
            )
        self.batch, self.capacity = batch, capacity
        self.length = 0  # tokens read so far
        self.layers = [LayerCache(config, batch, capacity, dtype, device) for _ in range(config.num_hidden_layers)]

    def check_room(self, batch: int, length: int) -> None:
        """Refuse, before anything is written, a pass over `length` tokens that does not fit."""
        if batch != self.batch:
            raise ValueError(f"the cache was made for a batch of {self.batch}, not {batch}")
        if self.length + length > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} of at most {self.capacity} tokens, so {length} more do not fit: "
                "make one with a larger capacity"
            )
