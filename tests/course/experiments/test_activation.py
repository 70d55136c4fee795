"""The comparison of activations is fair, its record is whole, and what it says can be seen again in a short run."""

import json

import pytest
import torch

import dsa
import small
from course.experiments import activation
from dsa.datasets.recall_tasks import Needles
from dsa.kernels import loops
from dsa.record import as_of_today
from dsa.training import evaluate
from project import DATA
from tiny_training import tiny

RECORD = DATA / "measurements" / "indexer_activation.json"


def factors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in ((1, 6, 2, 8), (1, 6, 8), (1, 6, 2))]


def test_the_published_form_is_eq_1_and_the_others_differ_in_one_step():
    q, k, w = factors()
    right = loops.index_scores(q, k, w)
    assert torch.allclose(activation.scores("relu", q, k, w), right, atol=1e-5)
    linear = torch.einsum("btjw,btj,bsw->bts", q, w, k)
    visible = right > float("-inf")
    assert torch.allclose(activation.scores("none", q, k, w)[visible], linear[visible], atol=1e-5)
    shares = (w * 4).softmax(-1)  # (J W)^0.5 = 4
    expected = loops.index_scores(q, k, shares)
    assert torch.allclose(activation.scores("softmax", q, k, w), expected, atol=1e-5)
    with pytest.raises(ValueError, match="form 'gelu' is unknown"):
        activation.scores("gelu", q, k, w)


def test_a_pupil_of_the_published_form_learns_as_the_model_itself_would():
    model, tokens = tiny(), torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))
    model.attention = "dense"
    _, expected = model(tokens, indexer_loss=True)
    variant = activation.IndexerVariant(model, "relu", model.config.index_n_heads, model.config.index_head_dim, seed=0)
    variant.indexers = torch.nn.ModuleList(activation.indexers(model))
    assert torch.allclose(variant.loss(activation.teacher_batches(model, tokens)), expected, atol=1e-5)
    assert model.attention == "dense"


def test_variants_learn_apart_and_the_model_stays(text):
    model = tiny(dense=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    task = Needles(text, 64, 4, 4)

    def learned(forms):
        variants = [activation.IndexerVariant(model, form, 2, 16, seed=0) for form in forms]
        activation.warm_up(model, variants, task, steps=5, size=2)
        return variants

    together, alone = learned(("relu", "none")), learned(("relu",))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for a, b in zip(together[0].parameters(), alone[0].parameters(), strict=True):
        assert torch.equal(a, b)  # the other variant beside it changes nothing


def test_the_command_writes_a_whole_record(tmp_path, text, monkeypatch):
    monkeypatch.setattr(activation, "LENGTH", 128)
    monkeypatch.setattr(activation, "EVAL_EPISODES", 2)
    source, out = tmp_path / "a.txt", tmp_path / "record.json"
    source.write_text(small.LINES)
    command = [str(DATA / "base"), "--out", str(out), "--corpus", str(source), "--seeds", "5", "--steps", "2"]
    activation.main(command)
    record = json.loads(out.read_text())
    assert record["options"]["seeds"] == [5] and len(record["runs"]) == 6
    with pytest.raises(SystemExit, match="exists: choose another --out"):
        activation.main(command)
    activation.main([*command, "--replace"])


def test_the_record_says_where_it_comes_from_and_holds_every_run():
    record = json.loads(RECORD.read_text())
    assert as_of_today(record["command"]).startswith("python -m course.experiments.activation data/base")
    assert record["date"] and record["versions"]["torch"] and len(record["corpus"]["sha256"]) == 64
    seeds = record["options"]["seeds"]
    assert len(seeds) >= 3
    runs = {(r["form"], r["heads"], r["width"], r["seed"]) for r in record["runs"]}
    assert runs == {(f, J, W, s) for f in activation.FORMS for J, W in activation.SIZES for s in seeds}
    assert all(0 < r["kl"] < 1 and 0.8 < r["of_oracle"] <= 1 and 0.9 < r["hit"] <= 1 for r in record["runs"])


@pytest.mark.slow
def test_a_short_run_sees_the_same_again(text):
    """Spot check: after 40 steps each form follows attention, and none is far ahead."""
    model, task = dsa.from_pretrained(DATA / "base"), Needles(text, 128)
    eval_set = list(evaluate.needle_batches(text, 128, 8))
    variants = [activation.IndexerVariant(model, form, 2, 32, seed=0) for form in activation.FORMS]
    before = activation.evaluate_variants(model, variants, eval_set)
    activation.warm_up(model, variants, task, steps=40)
    after = activation.evaluate_variants(model, variants, eval_set)
    assert max(found["kl"] for found in after) < 0.6 * min(found["kl"] for found in before)
    kept = [found["of_oracle"] for found in after]
    assert max(kept) - min(kept) < 0.1
