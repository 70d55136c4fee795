"""The model: config, rotary embedding, cache, indexer, attention, experts, transformer."""
