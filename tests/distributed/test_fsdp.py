"""Two processes that share weights and batches train as one does: the same losses, the same weights, a whole folder.

The processes are real ones, started by `torchrun` and joined through gloo; one of them is killed on the way. Training
runs in fp64, so that what is left of differences is the order of sums. The two ranks see other tokens, load other
experts and have other numbers of tokens that count.
"""

import json
import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsa
import small
from dsa.datasets.corpus import user_text
from dsa.datasets.recall_tasks import Copy, Needles
from dsa.distributed import fsdp
from dsa.model.moe import MoE
from dsa.training import checkpointing, indexer, pretrain
from dsa.training.optimizers import adamw
from dsa.training.trainer import Phase, train
from tiny_training import TINY

CONFIG = pretrain.dense_config(64).replace(**TINY)


def plan(text):
    return [
        Phase("copy", 3, pretrain.lm_objective(Copy(32), 4)),
        Phase("text", 2, pretrain.lm_objective(Needles(text, 64, 4, 4), 4)),
    ]


def three_stages(folder, text):
    """A few steps of each stage: the model and its rows; the first stage's saved state lies in `folder`."""
    torch.set_default_dtype(torch.float64)
    try:
        model, run = pretrain.pretrain(text, config=CONFIG, plan=plan(text), optimizer="adamw", work=folder)
        rows = run.rows
        model, task = indexer.with_indexer(model, heads=2, width=16, top_k=8), Needles(text, 64, 4, 4)
        sharded = fsdp.shard(model)
        rows += indexer.warm_up(sharded, task, steps=4, size=4, show=False).rows
        sharded = fsdp.shard(fsdp.gather(sharded))
        rows += indexer.train_sparse(sharded, task, steps=4, size=4, show=False, optimizer="adamw").rows
        return fsdp.gather(sharded), rows
    finally:
        torch.set_default_dtype(torch.float32)


def save_again(folder, other):
    """Load a saved state into parts and save it from them."""
    model = fsdp.shard(dsa.Transformer(CONFIG).double())
    optimizers = adamw(model.parameters(), 0.01)
    checkpointing.save(other, model, optimizers, checkpointing.load(folder, model, optimizers))


def command(folder, name, *options):
    """`dsa train pretrain` with a plan of seconds."""
    changes = {"phases": plan, "dense_config": lambda: CONFIG, "LENGTH": 64}
    with mock.patch.multiple(pretrain, **changes):
        pretrain.main(["--out", str(folder / name), "--corpus", str(folder / "a.txt"), *options])


def in_parts(text, work=None, resume=False, kill_after=None):
    """A sharded run that saves every second step; rank 1 may kill itself after some steps."""
    torch.set_default_dtype(torch.float64)
    try:
        model = dsa.Transformer(CONFIG)
        model.reset_parameters(0)
        steps = count(1)
        fsdp.shard(model).train()

        def after(whole):
            pretrain.balance(whole)
            if next(steps) == kill_after and fsdp.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        options = {"work": work, "resume": resume, "every": 2, "after": after, "show": False}
        run = train(model, adamw(model.parameters(), 0.01), plan(text), **options)
        return fsdp.gather(model), run.rows, next(steps) - 1
    finally:
        torch.set_default_dtype(torch.float32)


def killed(folder):
    """Never returns: step 4 of 5 is the last one, and step 2 the last that was saved."""
    with fsdp.processes():
        in_parts(user_text(folder / "a.txt"), folder / "killed", kill_after=4)


def resumed(text, folder):
    """Go on where the killed run was saved, and do the same without a stop: what each left."""
    (one, rows, done), (two, wanted, _) = in_parts(text, folder / "killed", resume=True), in_parts(text)
    same = all(torch.equal(one.state_dict()[name], tensor) for name, tensor in two.state_dict().items())
    return {"same": same, "steps": done, "rows": rows == wanted}


def indexed(folder):
    """`dsa train indexer` on what `pretrain` has made, then its sparse stage."""
    common = ["--corpus", str(folder / "a.txt"), "--optimizer", "adamw", "--steps", "2", "--batch", "4", "--top-k", "8"]
    indexer.main([str(folder / "made"), "--out", str(folder / "indexed"), "--then-sparse", "2", *common])


def worker(folder):
    """What each of the two processes does."""
    with fsdp.processes():
        model, rows = three_stages(folder / "two", user_text(folder / "a.txt"))
        if fsdp.rank() == 0:
            save_file(model.state_dict(), folder / "two.safetensors")
            (folder / "two.json").write_text(json.dumps(rows))
        save_again(folder / "two", folder / "again")
        command(folder, "made", "--optimizer", "adamw")
        fsdp.barrier()  # rank 0 is the one that writes it
        indexed(folder)
        found = resumed(user_text(folder / "a.txt"), folder)
        if fsdp.rank() == 0:
            (folder / "resumed.json").write_text(json.dumps(found))
        with pytest.raises(SystemExit, match="'muon' needs whole matrices, 2 processes have parts: use adamw"):
            command(folder, "refused")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which two processes have done their work."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "a.txt").write_text(small.LINES)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    ask = {"capture_output": True, "text": True, "env": environment, "timeout": 240}
    stopped = subprocess.run([*start, str(folder), "killed"], **ask)
    assert stopped.returncode != 0 and checkpointing.exists(folder / "killed"), stopped.stderr[-3000:]
    done = subprocess.run([*start, str(folder)], **ask)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(trained):
    """What one process makes of the same."""
    return three_stages(trained / "one", user_text(trained / "a.txt"))


def test_the_losses_are_the_same(trained, alone):
    found = json.loads((trained / "two.json").read_text())
    assert len(found) == len(alone[1]) == 13
    for two, one in zip(found, alone[1], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)
        assert two.keys() == one.keys()
        assert two.get("kl", 0.0) == pytest.approx(one.get("kl", 0.0), rel=1e-9)


def test_the_weights_and_router_biases_are_the_same(trained, alone):
    weights, wanted = load_file(trained / "two.safetensors"), alone[0].state_dict()
    assert weights.keys() == wanted.keys() and any("e_score_correction_bias" in name for name in weights)
    for name, tensor in wanted.items():
        assert weights[name].shape == tensor.shape and torch.allclose(weights[name], tensor, rtol=0, atol=1e-8), name


def test_the_saved_state_is_whole_and_can_be_taken_up_by_any_number_of_processes(trained, alone):
    two, again, one = (load_file(trained / name / checkpointing.FILE) for name in ("two", "again", "one"))
    assert two.keys() == again.keys() == one.keys() and any(name.startswith("optimizer.0.3.exp_avg") for name in two)
    for name, tensor in one.items():
        assert torch.equal(again[name], two[name]) and torch.allclose(two[name], tensor, rtol=0, atol=1e-8), name


def test_the_command_makes_one_whole_folder(trained):
    assert not (trained / "made.partial").exists() and not (trained / "refused").exists()
    record = json.loads((trained / "made" / "provenance.json").read_text())
    assert record["command"].startswith("torchrun --nproc-per-node 2 -m dsa train pretrain --out")
    assert dsa.from_pretrained(trained / "made")(torch.arange(8)[None]).shape == (1, 8, CONFIG.vocab_size)


def test_a_sharded_run_goes_on_after_a_kill_and_ends_bit_for_bit_alike(trained):
    assert json.loads((trained / "resumed.json").read_text()) == {"same": True, "steps": 3, "rows": True}


def test_the_indexer_command_makes_one_whole_folder(trained):
    assert not (trained / "indexed.partial").exists()
    record = json.loads((trained / "indexed" / "provenance.json").read_text())
    assert record["command"].startswith("torchrun --nproc-per-node 2 -m dsa train indexer ")
    made = dsa.from_pretrained(trained / "indexed")
    assert (made.attention, made.top_k) == ("sparse", 8) and made(torch.arange(20)[None]).shape[1] == 20


def test_one_process_is_left_alone(alone):
    model = dsa.Transformer(CONFIG)
    assert fsdp.shard(model) is model is fsdp.gather(model)
    assert fsdp.world_size() == 1 and fsdp.rank() == 0 and fsdp.token_weight(3) == 1
    assert not any(getattr(module, "run_idle_experts", False) for module in model.modules())


def test_an_expert_without_tokens_has_a_gradient_of_zero_where_ranks_exchange_them():
    for run, expected in [(False, {None}), (True, {0.0})]:
        moe = MoE(CONFIG).train()
        moe.run_idle_experts = run
        moe.gate.e_score_correction_bias[0] = -10  # never chosen
        moe(torch.randn(1, 5, CONFIG.hidden_size)).sum().backward()
        idle = [p.grad for p in moe.experts[0].parameters()]
        assert {None if grad is None else grad.abs().max().item() for grad in idle} == expected


def test_a_batch_that_cannot_be_dealt_out_is_refused(monkeypatch):
    monkeypatch.setattr(fsdp, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="batch of 4 sequences cannot be shared evenly by 3 processes"):
        fsdp.local_batch(Copy(32).generate(torch.Generator(), 4))


if __name__ == "__main__":
    {1: worker, 2: killed}[len(sys.argv) - 1](Path(sys.argv[1]))
