"""What a model remembers of the tokens it has read: per layer one latent and one index key for each.

MLA's cache holds, for all H heads together, C + R numbers a token; DSA adds the W numbers of the index key. In
bf16 and at the real sizes that is 1152 + 256 bytes per token and layer: at equal precision sparse attention makes
the cache *larger*. What it saves is work, not memory. Memory is saved by FP8, which stores the same in 656 + 132.
"""

from typing import Any

import torch
from torch import Tensor

from dsa.kernels.fp8 import QuantizedLatentKV, QuantizedTensor
from dsa.model.config import Config
from dsa.model.precision import FULL, FULL_PRECISION, CacheCodec, Precision, index_codec, latent_codec


class CacheTensor:
    """Room for `capacity` vectors a sequence, in whatever tensors the codec makes of them.

    `like` is one vector of zeros (B, 1, width): it tells width, dtype and device.
    """

    def __init__(self, codec: CacheCodec, like: Tensor, capacity: int):
        self.codec = codec
        self.parts = [part.new_zeros(len(like), capacity, part.shape[-1]) for part in codec.encode(like)]

    def append(self, start: int, x: Tensor) -> Any:
        """Write x (B, T, width) at `start` and read all so far (B, start + T, width): views, nothing is copied."""
        end = start + x.shape[1]
        for part, new in zip(self.parts, self.codec.encode(x), strict=True):
            part[:, start:end] = new
        return self.codec.decode(*(part[:, :end] for part in self.parts))

    def read(self) -> Any:
        """All of it (B, capacity, width), as the codec gives it; in full precision the memory itself."""
        return self.codec.decode(*self.parts)

    @property
    def nbytes(self) -> int:
        """The memory it takes."""
        return sum(part.nbytes for part in self.parts)


class LayerCache:
    """One layer's part: latents (B, capacity, C + R) and index keys (B, capacity, W), filled from the left."""

    def __init__(
        self,
        config: Config,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        precision: Precision = FULL_PRECISION,
    ):
        def room(codec: CacheCodec, width: int) -> CacheTensor:
            return CacheTensor(codec, torch.zeros(batch, 1, width, dtype=dtype, device=device), capacity)

        C, W = config.kv_lora_rank, config.indexer.head_dim
        self.latents = room(latent_codec(precision, C), C + config.qk_rope_head_dim)
        self.index_keys = room(index_codec(precision) if W else FULL, W)
        self.index_length = 0  # tokens with an index key; dense attention leaves none behind

    @property
    def latent(self) -> Tensor | QuantizedLatentKV:
        """What attention reads (B, capacity, C + R)."""
        return self.latents.read()

    @property
    def index_key(self) -> Tensor | QuantizedTensor:
        """What the indexer reads (B, capacity, W)."""
        return self.index_keys.read()

    def append_latent(self, start: int, latent: Tensor) -> Tensor | QuantizedLatentKV:
        """Write latents (B, T, C + R) at `start` and return all so far (B, start + T, C + R), as they are stored."""
        return self.latents.append(start, latent)

    def rewind(self, length: int) -> None:
        """Forget what comes after the first `length` tokens; the next to come overwrite it."""
        self.index_length = min(self.index_length, length)

    @property
    def nbytes(self) -> int:
        """The memory it takes."""
        return self.latents.nbytes + self.index_keys.nbytes

    def append_index_key(self, start: int, key: Tensor) -> Tensor | QuantizedTensor:
        """Write index keys (B, T, W) at `start` and return all so far (B, start + T, W).

        Raises:
            ValueError: if earlier tokens were read without the indexer and so have no key.
        """
        if self.index_length < start:
            raise ValueError(
                f"the cache holds {start} tokens but only {self.index_length} index keys, because the others were not "
                "read with attention='sparse': start again with a new cache to switch"
            )
        self.index_length = start + key.shape[1]
        return self.index_keys.append(start, key)


def check_capacity(config: Config, capacity: int) -> None:
    """Refuse more tokens than the model's context has."""
    if capacity > config.max_position_embeddings:
        raise ValueError(
            f"a cache for {capacity} tokens exceeds the model's max_position_embeddings="
            f"{config.max_position_embeddings}: ask for fewer new tokens or shorten the prompt"
        )


class Cache:
    """The memory of one generation, for all layers: allocated once, filled by the model's forward passes.

    Args:
        config: the model's sizes.
        batch: B, prompts side by side.
        capacity: most tokens a prompt and its continuation may have together.
        precision: in which numbers; it must stay the model's own.
        layers: how many layers remember; by default all of the model's.
    """

    def __init__(
        self,
        config: Config,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        precision: Precision = FULL_PRECISION,
        layers: int | None = None,
    ):
        check_capacity(config, capacity)
        self.batch, self.capacity, self.precision = batch, capacity, precision
        self.length = 0  # tokens read so far
        count = config.num_hidden_layers if layers is None else layers
        self.layers = [LayerCache(config, batch, capacity, dtype, device, precision) for _ in range(count)]

    @property
    def nbytes(self) -> int:
        """The memory it takes, all layers together."""
        return sum(layer.nbytes for layer in self.layers)

    def rewind(self, length: int) -> None:
        """Forget all tokens after the first `length`; what comes next overwrites them."""
        if not 0 <= length <= self.length:
            raise ValueError(f"the cache cannot go back from {self.length} tokens to {length}: give 0 to that many")
        self.length = length
        for layer in self.layers:
            layer.rewind(length)

    def check_room(self, batch: int, length: int, precision: Precision) -> None:
        """Refuse, before anything is written, a pass over `length` tokens that does not fit."""
        if precision != self.precision:
            raise ValueError(
                f"the cache was made for {self.precision} and the model is set to {precision}: "
                "start again with a new cache to switch"
            )
        if batch != self.batch:
            raise ValueError(f"the cache was made for a batch of {self.batch}, not {batch}")
        if self.length + length > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} of at most {self.capacity} tokens, so {length} more do not fit: "
                "make one with a larger capacity"
            )
