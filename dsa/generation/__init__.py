"""Writing with a trained model: `generate` with a cache, speculative decoding, chat."""
