"""The base model is small, says where it comes from and errs as often as it says; its training runs and resumes."""

import csv
import json

import pytest
import torch
from safetensors import safe_open

import dsa
from course.experiments import post_training, rl_base_model
from course.figures.grpo_groups import curves_by_seed
from dsa.datasets.rl_domains import DOMAINS
from dsa.record import as_of_today
from dsa.training import grpo, rollout, sft
from dsa.training.grpo import GRPOConfig
from project import DATA

FOLDER = DATA / "novice"


@pytest.fixture(scope="module")
def model():
    return dsa.from_pretrained(FOLDER)


def test_the_folder_is_small_whole_and_in_bf16():
    assert {p.name for p in FOLDER.iterdir()} == {
        "config.json",
        "model.safetensors",
        "provenance.json",
        "training.csv",
    }
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 1_000_000
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys() if "norm" not in name}  # noqa: SIM118
    assert kinds == {"BF16"}
    found = json.loads((FOLDER / "provenance.json").read_text())
    assert as_of_today(found["command"]) == "python -m course.experiments.rl_base_model --out data/novice"
    assert found["date"] and found["versions"]["torch"] and "generated" in found["corpus"]["source"]
    with (FOLDER / "training.csv").open() as file:
        phases = {row["phase"] for row in csv.DictReader(file)}
    assert phases == {"copy", "solutions", "warm-up", "sparse"}


def test_it_knows_the_domains_and_its_samples_err(model):
    assert model.attention == "sparse" and model.top_k == rl_base_model.TOP_K == 8
    recorded = json.loads((FOLDER / "provenance.json").read_text())["measures"]
    for name, temperature in (("sparse sampled", 1.0), ("sparse greedy", 0.0)):
        found = rollout.accuracy(model, tuple(DOMAINS), 50, temperature=temperature, seed=1)
        assert all(abs(found[domain] - recorded[name][domain]) < 0.2 for domain in DOMAINS)
    mean = {name: sum(scores.values()) / len(scores) for name, scores in recorded.items()}
    assert mean["sparse greedy"] > 0.85 and 0.45 < mean["sparse sampled"] < 0.7


def test_sampling_and_training_select_the_same(model):
    problems = grpo.rl_transcripts.sample_problems(torch.Generator().manual_seed(1), tuple(DOMAINS), 40)
    found = rollout.sample(model, problems, torch.Generator().manual_seed(2))
    assert rollout.train_infer_mismatch(model, found)["logprob"] < 1e-3
    assert rollout.selection_agreement(model, found.tokens) > 0.999


def test_rejection_keeps_the_right_ones_only(model):
    options = {"num_prompts": 30, "num_generations": 3}
    kept = sft.rejection_sample(model, ["sorting"], **options)
    assert 15 < len(kept) <= 30 and all(one.correct for one in kept)
    every = sft.rejection_sample(model, ["sorting"], per_prompt=3, **options)
    assert len(every) > len(kept) and all(one.correct for one in every)


def test_the_recipe_runs_and_goes_on(tmp_path, monkeypatch):
    for name, value in {
        "COPY_CAP": 3,
        "STEPS": 3,
        "WARM_STEPS": 2,
        "SPARSE_STEPS": 2,
        "BATCH": 8,
        "EVAL_PROBLEMS": 5,
    }.items():
        monkeypatch.setattr(rl_base_model, name, value)
    rl_base_model.main(["--out", str(tmp_path / "made")])
    made = dsa.from_pretrained(tmp_path / "made")
    assert made.top_k == 8 and set(json.loads((tmp_path / "made" / "provenance.json").read_text())["measures"])
    with pytest.raises(SystemExit, match="exists: choose another --out"):
        rl_base_model.main(["--out", str(tmp_path / "made")])


def test_a_study_is_whole_and_kept(model, tmp_path, monkeypatch):
    steps = {"specialist": 1, "mixed": 2, "polish": 1, "student": 1, "forget": 1, "dense": 1}
    monkeypatch.setattr(post_training, "STEPS", steps)
    monkeypatch.setattr(post_training, "CONFIG", GRPOConfig(num_generations=2))
    monkeypatch.setattr(post_training, "PROMPTS", {"alone": 2, "together": 2})
    monkeypatch.setattr(post_training, "EVAL_PROBLEMS", 4)
    monkeypatch.setattr(post_training, "SAMPLES", {"num_prompts": 4, "num_generations": 2})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    command = [str(FOLDER), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "a.json"), "--seeds", "5"]
    post_training.main(command)
    (run,) = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert run["seed"] == 5 and set(run["specialists"]) == set(DOMAINS) and len(run["sequential"]) == 5
    assert run["sequential"][0] == run["specialists"]["maths"]
    assert len(run["curves"]["mixed"]["reward"]) == len(run["curves"]["mixed, dense"]["reward"]) == 2
    made = (tmp_path / "work" / "5.json").stat().st_mtime_ns
    with pytest.raises(SystemExit, match="exists"):
        post_training.main(command)
    post_training.main([*command, "--replace"])
    assert (tmp_path / "work" / "5.json").stat().st_mtime_ns == made, "a finished seed is not run again"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert dsa.from_pretrained(FOLDER).attention == model.attention == "sparse"


def test_the_record_holds_what_the_chapter_says():
    record = json.loads((FOLDER.parent / "measurements" / "post_training.json").read_text())
    assert as_of_today(record["command"]).startswith("python -m course.experiments.post_training data/novice --work")
    assert record["date"] and record["versions"]["torch"] and "generated" in record["corpus"]["source"]
    options, runs = record["options"], record["runs"]
    assert options["steps"] == post_training.STEPS and options["prompts"] == post_training.PROMPTS
    assert [run["seed"] for run in runs] == options["seeds"] == list(post_training.SEEDS)
    mean = {name: [sum(run["models"][name].values()) / 5 for run in runs] for name in runs[0]["models"]}
    own = [sum(run["specialists"][name][name] for name in DOMAINS) / 5 for run in runs]
    assert sum(mean["mixed"]) - sum(mean["base"]) > 0.2 * 3, "mixed GRPO raises its base by more than 0.2"
    assert sum(mean["student"]) - sum(own) > -0.05 * 3, "the student is within 0.05 of the specialists"
    sparse, dense = (curves_by_seed(runs, name, "reward").mean(0) for name in ("mixed", "mixed, dense"))
    assert (sparse - dense).abs().max() < 0.15 and len(sparse) == options["steps"]["mixed"] // 5
