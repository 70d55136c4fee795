"""Triton kernels for CUDA and ROCm; read `launch`, then `index_logits`, and come to `sparse_backward` last."""
