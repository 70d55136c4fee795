"""Two and four processes that share one model compute what one computes, and choose the very same tokens.

The processes are real ones, started by `torchrun` and joined through gloo. Each loads its part from the folder, runs
the same passes and writes what it found to a file of its own; one process does the same without any of that.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

import dsa
import small
from dsa.analysis.serving_fit import parameters_per_gpu
from dsa.distributed import tensor_parallel
from dsa.generation import chat, cli
from project import DATA

SIZES = {
    "sparse": {"n_routed_experts": 12},  # by four processes: three experts each, and 61 words unevenly
    "dense": small.DENSE | {"q_lora_rank": None, "n_shared_experts": 0, "first_k_dense_replace": 0, "n_group": 1,
                            "n_routed_experts": 6, "topk_group": 1},  # six experts by four: unevenly
    "fp8": {"num_attention_heads": 8, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "index_head_dim": 64, "index_n_heads": 4, "intermediate_size": 512,
            "moe_intermediate_size": 512, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
            "num_hidden_layers": 2},  # by four processes: whole blocks of 128
}  # fmt: skip
PASSES = {"sparse": ("sparse", "dense", "oracle"), "dense": ("dense", "window"), "fp8": ("sparse", "dense")}


@torch.no_grad()
def passes(folder, mesh=None):
    """Everything that is compared, and how much this process holds."""
    found = {}
    for name, kinds in PASSES.items():
        model = dsa.from_pretrained(folder / name, keep_fp8=name == "fp8", mesh=mesh)
        for kind in kinds:
            model.attention = kind
            logits, trace = model(small.tokens(2, 40), trace=True)
            cache = model.new_cache(2, 40)
            chunks = [model(part, cache) for part in small.tokens(2, 40).split((17, 22, 1), dim=1)]
            found[name, kind] = {"logits": logits, "chunks": torch.cat(chunks, dim=1)}
            found[name, kind] |= {f"selected {n}": layer.selected for n, layer in enumerate(trace)}
            found[name, kind] |= {f"mass {n}": layer.mass for n, layer in enumerate(trace)}
        model.attention = kinds[0]
        found[name, kinds[0]]["greedy"] = dsa.generate(model, small.tokens(2, 15), 8)
        found[name, kinds[0]]["drawn"] = dsa.generate(model, small.tokens(2, 15), 8, temperature=1.0, seed=3)
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in model.state_dict().values()]
        found[name, "held"] = sum(tensor.numel() for tensor in local)
        found[name, "matrices"] = sum(tensor.numel() for tensor in local if tensor.ndim > 1)
        found[name, "experts"] = [n for n, expert in enumerate(model.model.layers[-1].mlp.experts) if expert]
    return found


def worker(folder):
    """What each process does."""
    with tensor_parallel.processes("cpu") as mesh:
        found = passes(folder, mesh)
        torch.save(found, folder / f"rank_{mesh.get_local_rank()}_of_{mesh.size()}.pt")
        model = dsa.from_pretrained(folder / "fp8", mesh=mesh)  # expanded
        torch.save(model(small.tokens(2, 40)).detach(), folder / f"expanded_{mesh.get_local_rank()}.pt")
        with pytest.raises(ValueError, match="the indexer's loss needs all: train unsplit"):
            model(small.tokens(1, 8), indexer_loss=True)
        with pytest.raises(ValueError, match="the model is split over processes"):
            dsa.save_pretrained(model, folder / "never")
        with pytest.raises(ValueError, match="split already"):
            tensor_parallel.split(model, mesh)
        lines = ["Is it lit?"] if mesh.get_local_rank() == 0 else []
        assert chat.heard_by_all(lambda: lines.pop()) == "Is it lit?"


def torchrun(ranks, *arguments):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([*start, *arguments], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for seed, (name, changes) in enumerate(SIZES.items()):
        dsa.save_pretrained(small.model(seed, small.config(**changes)), folder / name, fp8=name == "fp8")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return passes(folder)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, folder):
    """What each of so many processes found."""
    torchrun(request.param, __file__, str(folder))
    return [torch.load(folder / f"rank_{rank}_of_{request.param}.pt") for rank in range(request.param)]


CASES = [(name, kind) for name, kinds in PASSES.items() for kind in kinds]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_logits_attention_and_tokens_are_those_of_one_process(alone, ranks, case):
    for found in ranks:
        for name, wanted in alone[case].items():
            got = found[case][name]
            if wanted is None or not wanted.is_floating_point():
                assert (got is None and wanted is None) or torch.equal(got, wanted), name
            else:
                assert torch.allclose(got, wanted, rtol=0, atol=5e-5), name


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_all_ranks_have_the_same_numbers_and_choose_the_same_tokens(ranks, case):
    for found in ranks[1:]:
        for name, tensor in ranks[0][case].items():
            assert tensor is None or torch.equal(found[case][name], tensor), name


def test_fp8_expanded_into_parts_is_fp8_kept_in_parts(alone, ranks, folder):
    for rank in range(len(ranks)):
        logits = torch.load(folder / f"expanded_{rank}.pt")
        assert torch.allclose(logits, alone["fp8", "sparse"]["logits"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", SIZES)
def test_experts_are_dealt_out_and_each_rank_holds_its_share_of_the_weights(alone, ranks, name):
    experts = [number for found in ranks for number in found[name, "experts"]]
    assert experts == alone[name, "experts"] == list(range(SIZES[name]["n_routed_experts"]))
    held = [found[name, "held"] for found in ranks]
    whole = alone[name, "held"]
    assert whole < sum(held) < 2.5 * whole  # indexer, router and first projections are on every rank
    assert max(held) < whole * (0.75 if len(ranks) == 2 else 0.6)


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_what_the_fullest_rank_holds_is_what_the_memory_plan_counts(ranks, name):
    planned = parameters_per_gpu(small.config(**SIZES[name]), len(ranks))
    assert max(found[name, "matrices"] for found in ranks) == pytest.approx(planned, rel=0.005)  # 61 words: unevenly


def test_the_command_prints_once_what_it_prints_on_one_process(capsys):
    arguments = [str(DATA / "sparse"), "--prompt", "def ", "--max-new-tokens", "12", "--device", "cpu"]
    cli.main(arguments)
    alone = capsys.readouterr().out
    assert alone.startswith("def ") and len(alone) > 8
    assert torchrun(2, "-m", "dsa.generation.cli", *arguments) == alone


def test_one_process_joins_nobody():
    with tensor_parallel.processes("cpu") as mesh:
        assert mesh is None


@pytest.mark.parametrize(
    ("changes", "ranks", "words"),
    [
        ({}, 3, "num_attention_heads=4 cannot be shared evenly by 3 processes"),
        ({"intermediate_size": 66}, 4, "intermediate_size=66 cannot be shared"),
        ({"moe_intermediate_size": 25}, 2, r"n_shared_experts \* moe_intermediate_size=25 cannot be shared"),
    ],
)
def test_what_cannot_be_shared_evenly_is_refused(changes, ranks, words):
    with pytest.raises(ValueError, match=words):
        tensor_parallel.check_divisible(small.config(**changes), ranks)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
