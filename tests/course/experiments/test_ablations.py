"""Each ablation changes what it says and nothing else; the record holds all of them."""

import json

import pytest
import torch

from course.experiments import ablations
from dsa.record import as_of_today
from project import DATA
from tiny_training import tiny

RECORD = DATA / "measurements" / "sparse_ablations.json"


def reached(model):
    """Names outside the indexers that the divergence moves."""
    tokens = torch.randint(256, (1, 24), generator=torch.Generator().manual_seed(2))
    model.attention, model.top_k = "sparse", 4
    model(tokens, indexer_loss=True)[1].sum().backward()
    return [name for name, p in model.named_parameters() if p.grad is not None and ".indexer." not in name]


def test_attached_says_the_same_and_leaks():
    plain, leaking = tiny(), ablations.attach_indexer_loss(tiny())
    tokens = torch.randint(256, (1, 24), generator=torch.Generator().manual_seed(2))
    assert torch.equal(plain(tokens), leaking(tokens))
    for model in (plain, leaking):
        model.attention, model.top_k = "sparse", 4
    assert torch.equal(plain(tokens, indexer_loss=True)[1], leaking(tokens, indexer_loss=True)[1])
    assert reached(plain) == [] and len(reached(leaking)) > 5


def test_a_copy_is_its_own_and_reads_further():
    model = tiny()
    model.attention, model.top_k = "window", 3
    longer = ablations.clone_model(model, 1024)
    assert (longer.attention, longer.top_k, longer.config.max_position_embeddings) == ("window", 3, 1024)
    assert not longer.training, "its routers keep their biases"
    tokens = torch.randint(256, (1, 24), generator=torch.Generator().manual_seed(2))
    before = model(tokens)
    assert torch.allclose(longer(tokens), before, atol=1e-6)
    with torch.no_grad():
        for p in longer.parameters():
            p.add_(1)
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_from_scratch_both_kinds_start_alike(text, kind, monkeypatch):
    fresh = tiny(3, dense=True)
    monkeypatch.setattr(ablations.pretrain, "dense_config", lambda: fresh.config)
    monkeypatch.setattr(ablations, "SCRATCH_LENGTH", 64)
    started, ended = [], []
    train = ablations.train

    def spied(model, *arguments, **options):
        started.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        run = train(model, *arguments, **options)
        ended.extend((model, run.rows))
        return run

    monkeypatch.setattr(ablations, "train", spied)
    found = ablations.from_scratch(text, kind, seed=3, steps=12, cap=11)
    (before,), (model, rows) = started, ended
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())
    assert model.attention == kind
    own = [name for name, p in model.named_parameters() if ".indexer." in name and not torch.equal(p, before[name])]
    assert bool(own) == any(".indexer." in name for name in before) == (kind == "sparse"), "indexers learn, if any"
    assert found["copy_steps"] == 11 and len(found["copy"]) == len(found["recall"]) == 2
    copying = [row["copy"] for row in rows if "copy" in row]
    assert found["copy"] == [round(sum(copying[:10]) / 10, 3), round(copying[10], 3)]


def test_only_the_attached_pupil_is_attached_and_both_are_copies(text, monkeypatch):
    model, trained_models = tiny(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(ablations, "LENGTH", 64)
    monkeypatch.setattr(ablations, "evaluate_model", lambda trained, *_: trained_models.append(trained) or {})
    for kind in ("attached", "detached"):
        assert ablations.detached_or_not(model, text, kind, seed=1, steps=1)["kl"] > 0
        trained = trained_models[-1]
        trained.zero_grad(set_to_none=True)
        assert bool(reached(trained)) == (kind == "attached") and trained is not model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_longer_pupil_reads_the_longer_text(text, monkeypatch):
    model, seen = tiny(), []
    longest = 2 * model.config.max_position_embeddings
    monkeypatch.setattr(
        ablations, "evaluate_model", lambda trained, corpus, kind, length: seen.append((kind, length)) or {}
    )
    monkeypatch.setattr(ablations, "train_sparse", lambda trained, task, **given: seen.append(trained))
    ablations.longer(model, text, seed=1, steps=1, length=longest)
    assert seen[:2] + seen[3:] == [("dense", longest), ("sparse", longest), ("sparse", longest)]
    assert seen[2] is not model and seen[2].config.max_position_embeddings == longest


def test_the_record_is_whole():
    record = json.loads(RECORD.read_text())
    assert as_of_today(record["command"]).startswith("python -m course.experiments.ablations data/warmed")
    kinds = {(run["ablation"], run["kind"]) for run in record["runs"]}
    assert kinds == {("detach", "detached"), ("detach", "attached"), ("longer", "sparse"), ("scratch", "dense"),
                     ("scratch", "sparse")}  # fmt: skip
