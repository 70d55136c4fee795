"""Small random models for tests: every feature of the real one, a few thousand parameters.

Random weights stand in for trained ones, so nothing may be left at its harmless default: norm weights are not one,
biases are not zero, and the head is scaled until logits have a deviation of 2, as a trained model's do.
"""

import torch

from dsa.model.config import Config, Yarn
from dsa.model.transformer import Transformer

SIZES = {
    "vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "q_lora_rank": 24,
    "kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "intermediate_size": 64,
    "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "index_n_heads": 16, "index_head_dim": 16,
    "index_topk": 6, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
    "yarn": Yarn(factor=8, original_max_position_embeddings=16),
}  # fmt: skip
LINES = "".join(f"line {n} of a text\n" for n in range(2000))  # what a model could learn from
DENSE = {"index_n_heads": None, "index_head_dim": None, "index_topk": None}


def config(**changes) -> Config:
    """A config of SIZES, some of them changed; DENSE makes it a V3 one."""
    return Config(**(SIZES | changes))


def tokens(B: int, T: int, seed: int = 0, vocab: int = SIZES["vocab_size"]) -> torch.Tensor:
    """Random token ids (B, T)."""
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def model(seed: int = 0, sizes: Config | None = None, gate_bias: float = 0.0) -> Transformer:
    """A random model without harmless defaults; gate biases lie around `gate_bias`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    made = Transformer(sizes or config())
    made.reset_parameters(seed)
    for name, p in made.named_parameters():
        if p.ndim == 1:
            p.copy_(("bias" not in name) + 0.3 * torch.randn(p.shape, generator=generator))
    for gate in made.gates():
        noise = torch.randn(gate.e_score_correction_bias.shape, generator=generator)
        gate.e_score_correction_bias.copy_(gate_bias + 0.1 * noise)
    deviation = made(tokens(1, 32, vocab=made.config.vocab_size)).std()
    made.lm_head.weight *= 2 / deviation
    return made.eval()
