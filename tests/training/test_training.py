"""Training may be stopped at any moment and ends with the same bits; each loss teaches only what it is meant to."""

import csv
import json
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from dsa.datasets.recall_tasks import Needles
from dsa.training import checkpointing, evaluate, indexer, pretrain, run_folder
from dsa.training.losses import bits_per_byte, language_loss
from dsa.training.optimizers import adamw, muon_and_adamw
from dsa.training.trainer import Phase, generator, train, until, write_table
from tiny_training import copy_phases, tiny, trained


@pytest.fixture
def task(text):
    return Needles(text, 64, 4, 4)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def unbroken():
    return trained()


def test_same_seed_same_bits_other_seed_other_bits(unbroken):
    again, _ = trained()
    assert same(again, unbroken[0])
    assert not same(trained(seed=1)[0], again)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_resumed_after_sigkill_gives_the_same_weights(tmp_path, unbroken):
    script = f"""
        import os, pathlib, signal, torch
        torch.set_num_threads(1)
        from tiny_training import trained
        trained(pathlib.Path({str(tmp_path)!r}), stop=lambda step: step == 6 and os.kill(os.getpid(), signal.SIGKILL))
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpointing.exists(tmp_path)
    model, run = trained(tmp_path, resume=True)
    assert same(model, unbroken[0]) and run.rows == unbroken[1].rows
    assert run.seconds > 0


def test_resumed_after_control_c_gives_the_same_weights(tmp_path, unbroken):
    def interrupt(step):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, stop=interrupt)
    assert same(trained(tmp_path, resume=True)[0], unbroken[0])
    assert same(trained(tmp_path, resume=True)[0], unbroken[0])  # a finished run resumes to its end


def test_a_kill_while_saving_leaves_the_state_before(tmp_path, monkeypatch):
    model = tiny(dense=True)
    optimizers = adamw(model.parameters(), 0.01)
    checkpointing.save(tmp_path, model, optimizers, {"step": 1})

    def cut_off(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpointing, "save_file", cut_off)
    with pytest.raises(KeyboardInterrupt):
        checkpointing.save(tmp_path, model, optimizers, {"step": 2})
    assert checkpointing.load(tmp_path, model, optimizers) == {"step": 1}


def test_another_run_or_a_damaged_state_is_refused(tmp_path):
    trained(tmp_path)
    for other in ({"seed": 1}, {"label": "other corpus"}):
        with pytest.raises(ValueError, match="holds another run"):
            trained(tmp_path, resume=True, **other)
    model = tiny(dense=True)
    with pytest.raises(ValueError, match="holds another run"):  # the same seed and label, one step more
        train(model, muon_and_adamw(model, 0.01, 0.01), copy_phases(steps=11), work=tmp_path, resume=True, show=False)
    path = tmp_path / checkpointing.FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be resumed"):
        trained(tmp_path, resume=True)


def test_stop_rule_ends_a_phase_early():
    rule = until("score", 0.95, over=3)
    rows = [{"score": x} for x in (1.0, 0.9, 0.96)]
    assert rule(rows) and not rule(rows[:2]) and not rule([*rows, {"score": 0.9}])
    assert not until("score", 0.5, over=2)([{"score": 0.5}] * 2)  # it has to be more
    model = tiny(dense=True)

    def learn(model, chance):
        return model(torch.zeros(1, 2, dtype=torch.long)).sum(), {"score": 1.0}

    phases = [Phase("a", 50, learn, done=rule), Phase("b", 2, learn)]
    run = train(model, adamw(model.parameters(), 0.0), phases, show=False)
    assert [row["phase"] for row in run.rows] == ["a"] * 3 + ["b"] * 2


def test_a_stop_rule_sees_the_rows_of_its_own_phase_only():
    """Or a phase would end before it began, because the one before it was good at the same measure."""
    model, fed = tiny(dense=True), []

    def learn(model, chance):
        return model(torch.zeros(1, 2, dtype=torch.long)).sum(), {"score": 1.0}

    def rule(rows):
        fed.append([(row["phase"], row["step"]) for row in rows])
        return until("score", 0.95, over=3)(rows)

    phases = [Phase("a", 5, learn), Phase("b", 50, learn, done=rule), Phase("c", 1, learn)]
    run = train(model, adamw(model.parameters(), 0.0), phases, show=False)
    assert [row["phase"] for row in run.rows] == ["a"] * 5 + ["b"] * 3 + ["c"]
    assert fed == [[("b", step) for step in range(count)] for count in range(4)]


def test_rates_warm_up_and_follow_a_cosine():
    phase = Phase("a", 11, None, rates=(1.0, 0.2), warmup=2)
    factors = [phase.factor(step) for step in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[-1] == pytest.approx(0.2)
    assert factors[2:] == sorted(factors[2:], reverse=True) and factors[6] == pytest.approx(0.6)


def test_steps_are_as_long_as_rate_and_clipping_say():
    """By plain gradient descent: Adam would divide both a missing rate's and a missing clip's trace away."""
    model, sizes = torch.nn.Linear(4, 1, bias=False), []
    before = [model.weight.detach().clone()]

    def measure(model):
        sizes.append((model.weight - before.pop()).norm().item())
        before.append(model.weight.detach().clone())

    learn = lambda model, chance: (100 * model.weight.sum(), {})  # noqa: E731  a gradient of length 200
    phase = Phase("a", 4, learn, rates=(1.0, 0.2), warmup=2)
    train(model, [torch.optim.SGD(model.parameters(), lr=0.5)], [phase], clip=3.0, after=measure, show=False)
    assert sizes == pytest.approx([0.5 * 3 * factor for factor in (0.5, 1.0, 1.0, 0.2)], rel=1e-4)


def test_a_run_resumed_in_its_first_phase_goes_through_the_second_from_its_start(tmp_path):
    def learn(model, chance):
        if stop and len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(1)
        return model(torch.zeros(1, 2, dtype=torch.long)).sum(), {}

    seen, stop = [], True
    model = tiny(dense=True)
    optimizers, phases = adamw(model.parameters(), 0.0), [Phase("a", 5, learn), Phase("b", 4, learn)]
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizers, phases, work=tmp_path, every=1, show=False)
    stop = False
    run = train(model, optimizers, phases, work=tmp_path, resume=True, every=1, show=False)
    assert [(row["phase"], row["step"]) for row in run.rows] == [
        *(("a", s) for s in range(5)),
        *(("b", s) for s in range(4)),
    ]
    again = train(model, optimizers, phases, work=tmp_path, resume=True, show=False)  # has nothing left to do
    assert again.rows == run.rows
    assert again.seconds > run.seconds / 2 and again.processor_seconds > run.processor_seconds / 2


def test_each_step_has_chance_of_its_own():
    seeds = {generator(s, p, t).initial_seed() for s in range(3) for p in range(3) for t in range(100)}
    assert len(seeds) == 900


def test_a_loss_that_is_not_finite_ends_the_run():
    model = tiny(dense=True)
    phase = Phase("a", 3, lambda model, chance: (model.lm_head.weight.sum() * float("nan"), {}))
    with pytest.raises(FloatingPointError, match="step 0 of phase a"):
        train(model, adamw(model.parameters(), 0.1), [phase], show=False)


def test_table_has_a_column_for_every_measure(tmp_path):
    write_table([{"step": 0, "loss": 1.23456}, {"step": 1, "recall": 0.5}], tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"step": "0", "loss": "1.2346", "recall": ""},
            {"step": "1", "loss": "", "recall": "0.5000"},
        ]


def split(model):
    ours = {id(p) for p in model.indexer_parameters()}
    return model.indexer_parameters(), [p for p in model.parameters() if id(p) not in ours]


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_each_loss_reaches_only_its_own_parameters(task, attention):
    model = tiny()
    model.attention = attention
    indexers, others = split(model)
    episodes = task.generate(generator(0, 0, 0), 2)
    logits, losses = model(episodes.tokens, indexer_loss=True)
    pairs = [(language_loss(logits, episodes), others, indexers), (losses.sum(), indexers, others)]
    for loss, taught, untouched in pairs:
        grads = torch.autograd.grad(loss, taught + untouched, retain_graph=True, allow_unused=True)
        reached = [grad is not None and bool(grad.any()) for grad in grads]
        assert sum(reached[: len(taught)]) > len(taught) / 2 and not any(reached[len(taught) :])


def test_the_indexer_loss_does_not_change_what_the_model_learns(task, monkeypatch):
    """Not through gradients, and not through a clipping they share: bit for bit."""
    models = [tiny(), tiny()]
    for model, weight in zip(models, (0.0, 1000.0), strict=True):

        def learn(model, chance, weight=weight):
            episodes = task.generate(chance, 2)
            logits, losses = model(episodes.tokens, indexer_loss=True)
            return language_loss(logits, episodes) + weight * losses.sum(), {}

        monkeypatch.setattr(indexer, "joint_objective", lambda task, size, learn=learn: learn)
        indexer.train_sparse(model, task, steps=1, show=False)  # a second step would select other keys
    (index_a, main_a), (index_b, main_b) = map(split, models)
    assert all(map(torch.equal, main_a, main_b)) and not all(map(torch.equal, index_a, index_b))
    assert not all(map(torch.equal, main_a, split(tiny())[1]))


def test_warm_up_changes_only_the_indexers_and_learns(task):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = indexer.warm_up(model, task, steps=12, size=4, show=False)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".indexer." in name for name in changed)
    assert run.rows[-1]["kl"] < run.rows[0]["kl"]
    assert model.attention == "sparse" and all(p.requires_grad for p in model.parameters())


def test_with_indexer_adds_indexers_and_changes_nothing_else():
    base = tiny(dense=True).eval()
    grown = indexer.with_indexer(base, heads=2, width=16, top_k=4)
    tokens = torch.arange(60)[None]
    assert torch.equal(base(tokens), grown(tokens)) and grown.config.index_topk == 4
    again = indexer.with_indexer(base, heads=2, width=16, top_k=4)
    assert same(grown, again) and grown.indexer_parameters()[0].std() > 0
    with pytest.raises(ValueError, match="with_indexer"):
        indexer.warm_up(base, None)


def test_bits_per_byte_of_a_uniform_model():
    tokens = torch.tensor([[97, 256, 98]])
    bits, count = bits_per_byte(torch.zeros(1, 3, 8 * 64), tokens)
    assert bits == pytest.approx(2 * 9) and count == 5  # four spaces are four bytes


def test_choosers_and_hits(task):
    episodes = task.generate(generator(1, 0, 0), 3)
    mass = torch.full((3, 64, 64), 0.001)
    rows = torch.arange(3)[:, None]
    mass[rows, episodes.query, episodes.source] = 1.0
    chosen = evaluate.choices(mass, -mass.masked_fill(torch.ones(64, 64).triu(1).bool(), float("inf")), 4)
    assert evaluate.hit(chosen["oracle"], episodes).all()
    near = episodes.distance < 4
    assert torch.equal(evaluate.hit(chosen["window"], episodes), near)
    deep = episodes.query >= 8
    assert not evaluate.hit(chosen["indexer"], episodes)[deep].any()  # here an indexer that avoids the answer


def test_measure_says_sparse_is_dense_when_everything_is_selected(text):
    model = tiny()
    found = evaluate.measure(model, text, length=64, top_k=64, episodes=4)
    assert found["recall"]["dense"] == found["recall"]["sparse"] == found["recall"]["oracle"]
    assert found["bits_per_byte"]["dense"] == pytest.approx(found["bits_per_byte"]["sparse"], abs=1e-3)
    few = evaluate.measure(model, text, length=64, top_k=4, episodes=20, traced="sparse")["indexer"]
    assert all(a <= 1.0 for a in few["of_oracle"]) and len(few["hit_rate"]["random"]) == 2
    assert model.attention == "sparse" and model.top_k == 16  # as before


def test_a_claim_records_its_number_and_whether_it_holds():
    claim = evaluate.Claim("recalls", "recall.dense", least=0.5)
    assert claim.check({"recall": {"dense": 0.4}})["holds"] is False
    assert claim.check({"recall": {"dense": 0.6}}) == {
        "claim": "recalls", "measure": "recall.dense", "value": 0.6, "at_least": 0.5, "holds": True,
    }  # fmt: skip


def test_control_c_says_how_to_go_on(tmp_path, monkeypatch, text):
    def stopped(*args, work, **kwargs):
        if work.name == "later.partial":
            checkpointing.save(work, tiny(dense=True), [], {})
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "pretrain", stopped)
    for out, words in [("later", "add --resume"), ("at_once", "nothing was saved yet")]:
        with pytest.raises(SystemExit, match=words):
            pretrain.main(["--out", str(tmp_path / out), "--corpus", text.source])


def test_the_command_recorded_is_the_one_that_makes_the_folder_anew(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pretrain, "run", lambda options: seen.append(options.command))
    pretrain.main(["--out", "data/base", "--seed", "3", "--replace", "--corpus", "my texts"])
    assert seen == ["dsa train pretrain --out data/base --seed 3 --corpus 'my texts'"]


def test_finish_moves_a_whole_folder_into_place(text, tmp_path):
    model, run = trained()
    out = tmp_path / "model"
    eval_settings = {"length": 64, "episodes": 2}
    claims = [evaluate.Claim("impossible", "bits_per_byte.dense", most=0.0)]
    common = {
        "made_by": "a test",
        "options": {"seed": 0},
        "corpus": text,
        "claims": claims,
        "eval_settings": eval_settings,
    }
    run_folder.prepare(out, resume=False, replace=False)
    run_folder.finish(model, out, run, **common)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert {"config.json", "model.safetensors", "provenance.json", "training.csv"} == {p.name for p in out.iterdir()}
    record = json.loads((out / "provenance.json").read_text())
    assert record["claims"][0]["holds"] is False and record["corpus"]["sha256"] == text.sha256
    (out / "mark").touch()
    run_folder.prepare(out, resume=False, replace=True)
    run_folder.finish(model, out, run, **common)
    assert not (out / "mark").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "{old}"], "old exists: choose another --out"),
        (["--out", "{new}", "--resume"], "no stopped run to resume"),
        (["--out", "{stopped}"], "--resume it, or --replace it"),
        (["--out", "{new}", "--corpus", "{missing}"], "missing does not exist"),
        (["--out", "{new}", "--corpus", "{short}"], "one sequence needs 512"),
    ],
)
def test_commands_refuse_in_a_sentence(tmp_path, arguments, words):
    (tmp_path / "old").mkdir()
    (tmp_path / "short").write_text("too short")
    (tmp_path / "stopped.partial").mkdir()
    (tmp_path / "stopped.partial" / checkpointing.FILE).touch()
    names = {name: tmp_path / name for name in ("old", "new", "stopped", "missing", "short")}
    with pytest.raises(SystemExit, match=words):
        pretrain.main([a.format(**names) for a in arguments])
    with pytest.raises(SystemExit, match=r"error: .*folder"):
        indexer.main([str(tmp_path / "missing"), "--out", str(tmp_path / "new")])
