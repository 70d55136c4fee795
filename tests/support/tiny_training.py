"""A model small enough to be trained in a test, and a short run of two phases that may be stopped on its way."""

import dsa
from dsa.datasets.recall_tasks import Copy
from dsa.training import pretrain
from dsa.training.optimizers import muon_and_adamw
from dsa.training.trainer import Phase, train

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 8, "intermediate_size": 32, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "max_position_embeddings": 64,
}  # fmt: skip


def tiny(seed=0, dense=False):
    config = pretrain.dense_config(64) if dense else dsa.Config.mini().replace(index_head_dim=16)
    model = dsa.Transformer(config.replace(**TINY))
    model.reset_parameters(seed)
    return model


def copy_phases(steps=10, stop=None):
    """Two phases of the copy task; ``stop(step)`` is called at each step of the second."""
    count = iter(range(1000))

    def learn(model, chance):
        if stop is not None:
            stop(next(count))
        return pretrain.lm_objective(Copy(32), 4)(model, chance)

    return [Phase("first", 3, pretrain.lm_objective(Copy(16), 2)), Phase("second", steps, learn, (1.0, 0.1), 2)]


def trained(work=None, resume=False, stop=None, seed=0, label=""):
    model = tiny(dense=True).train()
    optimizers = muon_and_adamw(model, 0.01, 0.01)
    run = train(
        model, optimizers, copy_phases(stop=stop), seed=seed, work=work, resume=resume, every=4,
        after=pretrain.balance, label=label, show=False,
    )  # fmt: skip
    return model, run
