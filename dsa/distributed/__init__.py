"""Several processes: `tensor_parallel` splits a model for inference, `fsdp` shares weights and batches in training."""
