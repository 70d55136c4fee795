"""What is timed is what is counted: the calls' FLOP, taken in the clock's place, are the roofline's."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsa.analysis.flops import PHASES, dense_pair_flops, head_sum_pair_flops, index_pair_flops, mqa_pair_flops
from dsa.bench import layer
from dsa.model.config import Config

REAL = Config.v32_exp()
SMALL = Config.mini()


def flops(calls, repeats):
    """A clock that counts products, attention's included."""
    found = {}
    for name, call in calls.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        found[name] = counter.get_total_flops()
    return found


@pytest.mark.parametrize("phase", PHASES)
def test_a_token_is_timed_with_all_its_heads_and_nothing_else(monkeypatch, phase):
    monkeypatch.setattr(layer, "cpu_seconds", flops)
    keys = 2304
    dense, sparse = layer.token_seconds(REAL, phase, keys)
    pair = dense_pair_flops(REAL, phase)
    padded = 2 * 128 * 64 if phase == "decode" or dense > keys * pair else 0  # values taken as wide as keys
    assert dense == pytest.approx(keys * (pair + padded))
    scores = index_pair_flops(REAL) + head_sum_pair_flops(REAL)
    assert sparse == pytest.approx(keys * scores + 2048 * mqa_pair_flops(REAL), rel=1e-3)


def test_what_comes_out_has_the_shape_of_attention():
    assert layer.sparse_call(SMALL, 40, 3)().shape == (1, 3, SMALL.num_attention_heads, SMALL.kv_lora_rank)
    assert layer.dense_call(SMALL, "prefill", 40, 3, 2)().shape == (1, 3, 2, SMALL.v_head_dim)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="phase='both' is unknown"):
        layer.token_seconds(SMALL, "both", 64)
    with pytest.raises(ValueError, match="keys=8: a block needs room"):
        layer.token_seconds(SMALL, "decode", 8)
