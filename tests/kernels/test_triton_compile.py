"""Machine code of every Triton kernel for three GPUs, none of them here: it fits, and the matrix unit does the work.

The calls are those of one layer at the real shape, made with tensors that have no numbers.
"""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

import small

pytest.importorskip("triton", reason="Triton is made for Linux only")

from dsa.kernels import ops
from dsa.kernels.triton import compile as aot
from dsa.kernels.triton.index_logits import index_logits
from dsa.kernels.triton.launch import Kernel, Recorder, viable_configs
from dsa.kernels.triton.sparse_attention import LatentKV, attend, tile_config
from dsa.kernels.triton.top_k import num_segments, top_k
from dsa.model.attention import Attention

MATRIX = {  # which instruction must do the multiplying; Nvidia's has no fp32, and rounding to tf32 is not wanted
    ("sm_90", 8): "QGMMA", ("sm_90", 16): "HGMMA", ("sm_100", 8): "UTCQMMA", ("sm_100", 16): "UTCHMMA",
    ("gfx942", 8): "v_mfma", ("gfx942", 16): "v_mfma",
}  # fmt: skip
WITHOUT = {"top_k_kernel", "merge_kernel"}  # nothing to multiply
SPILLED = {("query_gradient_kernel", "sm_90"): 32}  # bytes a thread, where not zero


def bits(name):
    return 8 if name == "index logits, FP8" else 32 if "fp32" in name else 16


ELSEWHERE = [name for name in aot.CALLS if name not in ("index logits, bf16", "sparse attention, fp32")]


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, "sm_90") for name in aot.CALLS] + [(name, target) for name in ELSEWHERE for target in ("sm_100", "gfx942")],
)
def test_a_kernel_fits_the_gpu_and_uses_its_matrix_unit(name, target):
    for kernel, arguments in aot.calls(name):
        code = aot.compile_call(kernel, arguments, target)
        assert code.fits, code
        assert code.spilled <= SPILLED.get((kernel.name, target), 0), code
        expected = None if kernel.name in WITHOUT else MATRIX.get((target, bits(name)))
        if expected:
            assert any(unit.startswith(expected) for unit in code.mma), code
        else:
            assert not code.mma, code


def test_wide_numbers_and_rocm_get_the_smallest_tiles():
    kernel, arguments = aot.calls("sparse attention, prefill")[0]
    wide = {**arguments, "q_ptr": arguments["q_ptr"].float()}
    assert viable_configs(kernel.configs, arguments, rocm=False) == list(kernel.configs)
    assert (
        viable_configs(kernel.configs, wide, rocm=False)
        == viable_configs(kernel.configs, arguments, rocm=True)
        == [kernel.configs[-1]]
    )


def kernel_with(kernel, tile):
    return Kernel(kernel.function, [tile], key=())


def test_a_spill_would_be_seen():
    """128 heads a program are more than the registers hold."""
    kernel, arguments = aot.calls("sparse attention, prefill")[0]
    assert aot.compile_call(kernel_with(kernel, tile_config(128, 32, 8)), arguments, "sm_90").spilled > 1000


@pytest.mark.parametrize(("name", "saved"), [("sparse attention, prefill", 36), ("sparse attention, backward", 68)])
def test_behind_a_branch_no_product_is_computed_twice(name, saved):
    for kernel, arguments in aot.calls(name):
        counts = [
            aot.compile_call(kernel_with(kernel, tile_config(64, 32, 8, 1, branch)), arguments, "sm_90").mma["HGMMA"]
            for branch in (False, True)
        ]
        assert counts[0] - counts[1] == saved, counts


def test_few_rows_are_cut_so_that_the_gpu_is_full_and_segments_stay_long():
    assert [num_segments(rows, 131072, 2048) for rows in (1, 16, 32, 128, 4096)] == [16, 16, 8, 2, 1]
    assert num_segments(1, 4000, 2048) == num_segments(1, 10, 64) == 1


def test_a_text_that_grows_by_a_token_keeps_its_tiles():
    """Choosing tiles takes seconds: a length enters the choice by its class only."""
    recorder, kinds = Recorder(), (torch.bfloat16, torch.float32)
    for S in (70_000, 70_001, 131_072):
        q, k, w = index(kinds[0], T=1, S=S)
        index_logits(q, k, w, launcher=recorder)
        top_k(torch.empty(1, 4096, S, device="meta"), 2048, launcher=recorder)
        kv = LatentKV.split(torch.empty(2, S, 576, dtype=kinds[0], device="meta"), 512)
        attend(torch.empty(2, 1, 16, 576, dtype=kinds[0], device="meta"), kv, None, 1.0, launcher=recorder)
    keys = {(kernel.name, *(arguments[name] for name in kernel.key)) for kernel, arguments in recorder.calls}
    assert len(recorder.calls) == 9 and len(keys) == 3, keys


def index(kind, T=3, S=7, J=4, W=32, device="meta"):
    return [torch.empty(*shape, dtype=kind, device=device) for shape in ((2, T, J, W), (2, S, W), (2, T, J))]


def test_tensors_without_numbers_give_shapes():
    scores = ops.index_scores(*index(torch.bfloat16), backend="triton")
    assert (scores.shape, scores.dtype, scores.is_meta) == ((2, 3, 7), torch.float32, True)
    selected = ops.index_topk(*index(torch.bfloat16), 5, backend="triton")
    assert (selected.shape, selected.dtype) == ((2, 3, 5), torch.long)
    q, kv = torch.empty(2, 3, 16, 40, device="meta", requires_grad=True), torch.empty(2, 7, 40, device="meta")
    out = ops.sparse_attention(q, kv, selected, 1.0, 32, backend="triton")
    out.sum().backward()
    assert out.shape == (2, 3, 16, 32) and q.grad.shape == q.shape


def latents(value_width):
    shared = torch.empty(2, 70, 1, 576, device="meta")
    return torch.empty(2, 1, 16, 576, device="meta"), shared, shared[..., :value_width]


def test_the_models_own_dense_decoding_is_taken_by_triton(monkeypatch):
    """It passes values as a view of the keys: as a copy, or as wide as keys of the real size, they would be refused."""
    assert ops.dense_attention(*latents(512), 1.0, backend="triton").shape == (2, 1, 16, 512)
    with torch.device("meta"):
        attention = Attention(small.config(), 0)
        q, kv = torch.empty(2, 1, 4, 16), torch.empty(2, 9, 28)
    forced = partial(ops.dense_attention, backend="triton")
    monkeypatch.setattr(ops, "dense_attention", forced)
    with torch.no_grad():
        assert attention.attend_mqa(q, kv).shape == (2, 1, 4, 12)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ops.index_scores(*index(torch.float32, device="cpu"), backend="triton"), "tensors on a GPU"),
        (lambda: ops.index_scores(*index(torch.float64), backend="triton"), "not torch.float64"),
        (lambda: ops.index_scores(*index(torch.float16, W=512), backend="triton"), "512 numbers"),
        (
            lambda: ops.index_scores(*(x.requires_grad_() for x in index(torch.float16)), backend="triton"),
            "no gradient",
        ),
        (
            lambda: ops.dense_attention(
                *[torch.empty(1, 4, 2, 8, device="meta") for _ in "qkv"], 1.0, backend="triton"
            ),
            "one query a sequence",
        ),
        (
            lambda: ops.dense_attention(*latents(576), 1.0, backend="triton"),
            "values of 576 numbers",
        ),
        (
            lambda: ops.attention_mass(*[torch.empty(1, 4, 2, 8, device="meta") for _ in "qk"], 1.0, backend="triton"),
            "no attention_mass",
        ),
    ],
)
def test_what_triton_cannot_do_names_a_backend_that_can(call, reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        call()
    assert "tiled" in str(refusal.value)


def test_interpreted_kernels_cannot_be_compiled_and_say_so():
    program = "from dsa.kernels.triton import compile as aot; aot.compile_call(*aot.calls('top-k')[0], 'sm_90')"
    environment = {"TRITON_INTERPRET": "1", "PATH": "", "PYTHONPATH": os.environ["PYTHONPATH"]}
    made = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "a process that started without it" in made.stderr
