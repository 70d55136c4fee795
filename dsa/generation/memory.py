"""What a generation will hold in memory, and whether there is room for it: asked before anything is allocated.

A cache is made whole, for every token that may yet come, so its size is known beforehand: tokens times sequences times
what one token leaves behind in all layers (the real model in FP8: 48,068 bytes). What a pass needs beside it hardly
grows with the text, because prompts are read in chunks; a tenth of the free memory is left to it.
"""

import os
from pathlib import Path

import torch

from dsa.model.transformer import Transformer

RESERVE = 0.1  # of the free memory, for what a pass holds beside the cache


def token_bytes(model: Transformer) -> int:
    """What one token leaves in the cache, all layers together, in the precision that the model is set to."""
    return model.new_cache(1, 1).nbytes


def free_bytes(device: torch.device) -> int | None:
    """Memory that may still be had on a device; None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def check_room(model: Transformer, batch: int, length: int) -> None:
    """Refuse a cache for `batch` sequences of `length` tokens that will not fit: ValueError says what would."""
    device = model.model.embed_tokens.weight.device
    free = free_bytes(device)
    each = token_bytes(model)
    if free is None or batch * length * each <= (1 - RESERVE) * free:
        return
    room = int((1 - RESERVE) * free) // each  # tokens
    ways = [f"{batch} of {room // batch:,} tokens"] if room >= batch else []
    ways += [f"{room // length:,} of {length:,} tokens"] if room >= length and batch > 1 else []
    ways += ["with model.cache_precision = 'fp8' more"] if model.cache_precision == "full" else []
    raise ValueError(
        f"a cache for {batch} sequence{'s' * (batch > 1)} of {length:,} tokens, prompt included, takes "
        f"{batch * length * each / 2**30:,.2f} GiB ({each:,} bytes a token), and of {free / 2**30:,.2f} GiB free on "
        f"{device} {1 - RESERVE:.0%} may be used. What would fit: {'; '.join(ways) or 'nothing: free some memory'}"
    )
