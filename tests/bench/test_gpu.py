"""The command for a GPU, without one: what it would measure runs, what is wrong is refused, and nothing found is lost.

No clock runs here. The cases are run tiny in Triton's interpreter; at full size they are built from tensors without
numbers, whose memory, work and machine code are counted.
"""

import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from project import ROOT

pytest.importorskip("triton", reason="Triton is made for Linux only")

from course.figures.own_machine import layer_seconds
from dsa.bench import timing
from dsa.bench.gpu import __main__ as command
from dsa.bench.gpu import baselines, correctness, suite
from dsa.bench.gpu.benchmark_case import BenchmarkCase, Candidate, Target, judge
from dsa.bench.gpu.cases import case_groups
from dsa.bench.gpu.inputs import Inputs, Shape
from dsa.kernels.triton import compile as aot
from dsa.kernels.triton import index_logits, sparse_attention, top_k
from dsa.kernels.triton.launch import Recorder, launch

META = Inputs(torch.device("meta"))
CPU = Inputs(torch.device("cpu"), torch.float32, sets=2)
LIBRARY = {
    "dense MHA, cuDNN",
    "dense MHA, cuDNN by heads",
    "dense MLA, torch, memory-efficient",
}  # which only a GPU has
H200 = 139 * 2**30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_clear_sentence(tmp_path):
    with pytest.raises(SystemExit, match="PyTorch sees none"):
        command.main(["--out", str(tmp_path / "a.json")])
    assert not (tmp_path / "a.json").exists()


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What the whole of it writes, tiny and interpreted."""
    path = tmp_path_factory.mktemp("record") / "gpu_kernels.json"
    script = ROOT / "tests/support/gpu_suite.py"
    made = subprocess.run([sys.executable, script, path], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return json.loads(path.read_text())


def test_every_candidate_of_every_case_runs_and_is_right(record):
    wanted = {case.name for cases in case_groups(Shape(lengths=(64, 128))).values() for case in cases}
    assert set(record["cases"]) == wanted
    for name, case in record["cases"].items():
        assert "failed" not in case and len(case["candidates"]) > 1, name
        for candidate, row in case["candidates"].items():
            if candidate not in LIBRARY:
                assert row.get("milliseconds") == [1.0, 2.0], (name, candidate, row)
                assert row["error"] < 2e-3


def test_every_goal_is_judged_and_the_record_says_where_it_comes_from(record):
    targets = {
        name: (t["unit"], t["target"], t["minimum"], t["verdict"]) for name, t in record["cases"].items() if "unit" in t
    }
    assert targets["index logits, 128 keys"] == ("TFLOP/s", 700, 500, "missed")
    assert targets["top-k"] == ("ms", 3, 6, "target")  # at 1.5 ms by the clock that is none
    assert targets["index decode"][3] == "target"
    assert targets["layer, prefill, 128 keys"][3] == "missed: dense reaches less than 500 TFLOP/s"
    assert len(targets) == 9
    assert set(record) >= {"command", "machine", "versions", "date", "what"}


def test_chapter_11_can_draw_it(record):
    pairs = layer_seconds(record)
    assert {phase: sorted(found) for phase, found in pairs.items()} == {"prefill": [64, 128], "decode": [64, 128]}
    assert pairs["decode"][128] == (1.5e-3 / 2, 1.5e-3 / 2)  # two sequences at once


def test_attention_by_groups_of_heads_is_attention(monkeypatch):
    q, k, v = (torch.randn(1, 70, n, 16, generator=torch.Generator().manual_seed(n)) for n in (4, 8, 8))
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(baselines, "fused", lambda kernel, q, k, v, scale: plain(q, k, v, scale=scale))
    assert torch.allclose(baselines.by_heads(q, k, v, 0.2), plain(q, k, v, scale=0.2), atol=1e-6)


# what is wrong is refused -----------------------------------------------------------------------------------------


def test_nan_and_a_missing_mask_never_pass():
    right = torch.tensor([1.0, 2.0, -torch.inf])
    assert correctness.relative_error(right, right) == 0
    for wrong in ([1.0, torch.nan, -torch.inf], [1.0, 2.0, 0.0], [1.0, -torch.inf, -torch.inf]):
        assert correctness.relative_error(torch.tensor(wrong), right) == float("inf")
    assert correctness.relative_error(torch.tensor([1.0, 2.5, -torch.inf]), right) == pytest.approx(0.5 / 5**0.5)
    assert correctness.relative_error(right[:1], right) == float("inf")


def test_a_choice_with_a_repeated_or_another_position_is_not_the_choice():
    right = torch.tensor([[[1, 4, 6, 9]]])
    assert correctness.missed_share(right.flip(-1), right) == 0
    assert correctness.missed_share(torch.tensor([[[1, 4, 6, 8]]]), right) == 0.25
    assert correctness.missed_share(torch.tensor([[[1, 4, 6, 6]]]), right) == float("inf")
    assert correctness.missed_share(right[..., :3], right) == float("inf")


def candidate(call):
    right = torch.arange(4.0)
    return Candidate(call, lambda out: correctness.relative_error(out, right), flop=1e9)


WRONG = {
    "one number unwritten": lambda n: torch.cat([torch.arange(3.0), torch.empty(1)]),
    "another number": lambda n: torch.tensor([0.0, 1.0, 2.0, 4.0]),
    "does not compile": lambda n: (_ for _ in ()).throw(RuntimeError("no such\n instruction")),
}


def clock(calls):
    return [1.0 for call in calls if call() is not None]


def test_the_wrong_is_not_timed_and_stops_nobody_else():
    candidates = {name: candidate(call) for name, call in WRONG.items()} | {
        "right": candidate(lambda n: torch.arange(4.0))
    }
    case = BenchmarkCase("case", lambda make: candidates, Target("TFLOP/s", 2, 1))
    saved = []
    found = suite.run_case(case, CPU, clock, lambda found: saved.append(json.dumps(found)))
    rows = found["candidates"]
    assert rows["one number unwritten"]["failed"].startswith("wrong by inf")
    assert rows["another number"]["failed"].startswith("wrong by 0.27")
    assert rows["does not compile"]["failed"] == "RuntimeError: no such instruction"
    assert rows["right"]["tflops"] == pytest.approx(1)
    assert found["verdict"] == "not measured"  # the first is ours, and it was wrong
    assert len(saved) == len(candidates) + 1  # after each, and at the end


def test_a_trial_whose_inputs_do_not_fit_is_written_down():
    def build(make):
        raise torch.OutOfMemoryError("too much")

    assert suite.run_case(BenchmarkCase("t", build), CPU, clock, len)["failed"] == "OutOfMemoryError: too much"


def test_a_ratio_needs_a_dense_candidate_that_is_quick():
    rows = {
        "sparse": {"milliseconds": [1.0, 1.0]},
        "dense": {"milliseconds": [4.0, 4.0], "tflops": 480, "counted": 0.9},
    }
    target = Target("times", 3.5, 2.5, dense=500)
    assert judge(target, rows)["verdict"] == "missed: dense reaches less than 500 TFLOP/s"
    rows["dense"]["tflops"] = 510
    assert judge(target, rows) == {"unit": "times", "target": 3.5, "minimum": 2.5, "figure": 3.6, "verdict": "target"}


# nothing found is lost ----------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_keeps_what_it_had(tmp_path):
    def killed(n):
        raise KeyboardInterrupt

    path = tmp_path / "gpu.json"
    case = BenchmarkCase(
        "t", lambda make: {"first": candidate(lambda n: torch.arange(4.0)), "second": candidate(killed)}
    )
    with pytest.raises(KeyboardInterrupt):
        suite.run_group([case], CPU, clock, suite.Record(path, {"date": "today"}).keep)
    assert list(json.loads(path.read_text())["cases"]["t"]["candidates"]) == ["first"]
    suite.Record(path, {"date": "tomorrow"}).keep("other", {"candidates": {}})  # a later process adds to it
    kept = json.loads(path.read_text())
    assert list(kept["cases"]) == ["t", "other"] and kept["date"] == "tomorrow"
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]


def test_a_case_that_dies_or_hangs_is_named_and_the_next_one_runs(tmp_path):
    programs = {
        "dies": "import os; os._exit(3)",
        "hangs": "import time; time.sleep(60)",
        "well": f"open({str(tmp_path / 'well')!r}, 'w')",
    }
    broken = suite.run_isolated(list(programs), lambda name: [sys.executable, "-c", programs[name]], limit=2)
    assert broken == {"dies": "its process ended with 3", "hangs": "stopped after 2 seconds"}
    assert (tmp_path / "well").exists()


def test_the_names_that_the_command_takes_are_the_cases():
    assert tuple(case_groups(Shape())) == command.GROUPS


# full size, counted -------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """How many bytes tensors without numbers would take at most, those alive counted."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for storage in {t.untyped_storage() for t in tree_leaves(made) if isinstance(t, torch.Tensor)}:
            if storage._cdata not in given:
                self.add(storage)
        return made

    def add(self, storage):
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.less, size)

    def less(self, size):
        self.now -= size


CASES = [case for cases in case_groups(Shape()).values() for case in cases]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_trial_fits_the_memory_of_an_h200(case):
    gc.collect()
    make = Inputs(META.device, sets=min(case.sets, META.sets))
    with Peak() as peak:
        for name, candidate in case.build(make).items():
            if not any(word in name for word in ("MHA", "torch", "efficient")):  # whose answers are small, and no more
                candidate.call(0)
    assert peak.most < 0.8 * H200, f"{peak.most / 2**30:.0f} GiB"


def test_all_of_it_takes_less_than_ten_minutes():
    """At a tenth of what dense kernels reach, with five seconds to start a process and 2.5 to compile a kernel."""
    seconds = 5 * len(case_groups(Shape()))
    kinds = {"index_logits_kernel": 2, "top_k_kernel": 3, "sparse_attention_kernel": 7}  # of arguments, compiled apart
    seconds += 2.5 * sum(len(kernel.configs) * kinds.get(kernel.name, 1) for kernel in suite.TUNED)
    for case in CASES:
        for candidate in case.build(Inputs(META.device, sets=case.sets)).values():
            once = candidate.flop / 40e12 + candidate.bytes / 0.4e12
            seconds += (3 * case.sets + 2) * once + 2 * max(timing.ROUND_SECONDS, timing.MIN_CALLS * once)
    assert seconds < 600, seconds


@pytest.mark.parametrize("name", ["index decode", "sparse decode", "layer, decode"])
def test_what_decoding_starts_at_full_size_compiles_for_hopper(name, monkeypatch):
    recorder = Recorder()
    for function in (index_logits.index_logits, sparse_attention.attend, sparse_attention.merge, top_k.top_k):
        given = tuple(recorder if value is launch else value for value in function.__defaults__)
        monkeypatch.setattr(function, "__defaults__", given)
    for candidate in case_groups(Shape())[name][-1].build(META).values():
        candidate.call(0)
    found = {str(aot.ast_source(kernel, arguments, kernel.configs[0]).hash()): (kernel, arguments)
             for kernel, arguments in recorder.calls}  # fmt: skip
    assert found
    for kernel, arguments in found.values():
        code = aot.compile_call(kernel, arguments, "sm_90")
        assert code.fits and code.spilled <= 8, code
