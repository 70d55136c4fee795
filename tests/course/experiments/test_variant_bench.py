"""The bench treats all designs alike, a hybrid learns by imitation, and the records hold every run."""

import json

import pytest
import torch

import dsa
from course.experiments import variant_bench
from course.experiments.attention_variants.selective_attention import Budget
from course.experiments.variant_bench import DESIGNS
from course.experiments.variant_costs import DESIGNS as BILLED
from dsa.datasets.recall_tasks import Needles
from dsa.record import as_of_today
from dsa.training import evaluate
from project import DATA

SUMMARIES = ("moba", "quest", "nsa")
SMALL = Budget(keys=12, block=4, sinks=2)


@pytest.fixture(scope="module")
def warmed():
    return dsa.from_pretrained(DATA / "warmed")


def test_every_design_has_a_bill():
    assert sorted(DESIGNS) == sorted(BILLED)


def test_all_designs_share_the_dense_models_weights(warmed):
    own = warmed.state_dict()
    for design in DESIGNS[:-1]:
        built = variant_bench.build(design, warmed, SMALL).state_dict()
        assert all(torch.equal(own[name], built[name]) for name in own), design
    with pytest.raises(ValueError, match="design='flash' is unknown"):
        variant_bench.build("flash", warmed, SMALL)


@pytest.mark.parametrize("design", ["window", "moba", "msa"])
def test_a_lesson_changes_the_model_and_only_learned_proxies_indexers(design, warmed, text):
    model = variant_bench.build(design, warmed, SMALL)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    variant_bench.train_design(design, model, Needles(text, 64, 2, 2), steps=2, size=1)
    after = model.state_dict()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    moved = [not torch.equal(before[name], after[name]) for name in before if "indexer.wk" in name]
    assert all(moved) if design == "msa" else not any(moved)


def test_a_hybrid_imitates_the_attention_it_replaces(warmed, text):
    task = Needles(text, 64, 2, 2)
    tokens = task.generate(torch.Generator().manual_seed(99), 2).tokens

    def error(steps):
        made = variant_bench.hybrid(warmed, task, steps=steps, size=2)
        targets = [layer.self_attn for layer in warmed.model.layers][:2]
        warmed.attention = "dense"
        seen = variant_bench.record_attention(warmed, targets, tokens)
        with torch.no_grad():
            return sum(
                float((made.model.layers[n].self_attn(x, step)[0] - out).square().mean() / out.square().mean())
                for n, (x, step, out) in enumerate(seen)
            )

    assert error(12) < 0.8 * error(0)


def test_watching_leaves_no_hook_behind(warmed):
    layer = warmed.model.layers[0].self_attn
    variant_bench.record_attention(warmed, [layer], torch.zeros(1, 4, dtype=torch.long))
    assert not layer._forward_hooks


def test_the_bench_examines_before_and_after(warmed, text):
    budget = Budget(keys=24, block=8)
    runs = variant_bench.bench(
        warmed, text, designs=("window", "dsa"), seeds=(3, 4), steps=1, budget=budget, length=160, episodes=1
    )
    assert [(run["design"], run["seed"], run["steps"]) for run in runs] == [
        ("window", 3, 0), ("window", 3, 1), ("dsa", 3, 0), ("dsa", 3, 1), ("window", 4, 1), ("dsa", 4, 1)
    ]  # fmt: skip
    assert variant_bench.measure_by_seed(runs, "dsa", "recall", 1) == [runs[3]["recall"], runs[5]["recall"]]
    with pytest.raises(ValueError, match="no run of 'moba' with 1 steps was recorded"):
        variant_bench.measure_by_seed(runs, "moba", "recall", 1)


@pytest.mark.parametrize(("name", "designs"), [("alternatives", DESIGNS), ("alternatives_longer", SUMMARIES)])
def test_the_records_say_where_they_come_from_and_hold_every_run(name, designs):
    record = json.loads((DATA / "measurements" / f"{name}.json").read_text())
    assert as_of_today(record["command"]).startswith("python -m course.experiments.variant_bench data/warmed")
    assert record["date"] and record["versions"]["torch"] and len(record["corpus"]["sha256"]) == 64
    seeds, steps = record["options"]["seeds"], record["options"]["steps"]
    for design in designs:
        assert len(variant_bench.measure_by_seed(record["runs"], design, "recall", steps)) == len(seeds) >= 3
        assert variant_bench.measure_by_seed(record["runs"], design, "recall", 0)


@pytest.mark.parametrize("design", ["window", "moba", "quest", "msa", "dsa"])
def test_a_short_examination_sees_the_record_again(design, warmed, text):
    """Untrained designs, on another text: needles do not depend much on what they stand in."""
    record = json.loads((DATA / "measurements" / "alternatives.json").read_text())
    eval_set = list(evaluate.needle_batches(text, 256, 32))
    found = variant_bench.evaluate_design(variant_bench.build(design, warmed, Budget()), text, eval_set, 256)["recall"]
    assert found == pytest.approx(variant_bench.measure_by_seed(record["runs"], design, "recall", 0)[0], abs=0.15)
