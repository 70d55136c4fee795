"""Small random models of the domains' alphabet, for tests of sampling and of learning from samples."""

import torch

import dsa
from course.experiments import rl_base_model
from dsa.datasets.rl_domains import DOMAINS
from dsa.datasets.rl_symbols import DIGITS

ALL = tuple(DOMAINS)
EXPERTS = {"first_k_dense_replace": 0, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(seed=0, **changes):
    """A random model of two layers, sparse with K = 6; changes are of its sizes (EXPERTS: six in each layer)."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 2, "intermediate_size": 48}
    indexer = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 6}
    model = dsa.Transformer(rl_base_model.dense_config().replace(**(sizes | indexer | changes)))
    model.reset_parameters(seed)
    return model.eval()


@torch.no_grad()
def shift_biases(model):
    """Let routers choose otherwise: their bias chooses and never weighs, so nothing else changes."""
    for gate in model.gates():
        gate.e_score_correction_bias += torch.randn(len(gate.e_score_correction_bias), generator=seeded(1))


def says_one(one):
    """Rewards the digit 1 anywhere: easy to find for a random model."""
    return float(DIGITS[1] in one.completion)
