"""The report's post-training at a laptop's size, recorded: specialists, a student, one mixed stage, stages in a row.

For each seed, from the one model of :mod:`course.experiments.rl_base_model`, sparse attention on throughout:

1. a *specialist* for each domain, by GRPO in that domain alone;
2. a *student*: the model again, fine-tuned on the specialists' correct samples;
3. *mixed*: GRPO on all domains at once, from the model itself and, as the report does it, from the student;
4. *sequential*: one domain after the other, each stage from the one before;
5. what one more stage on a single domain makes the mixed model *forget*, with and without a divergence term.

The mixed stage runs with dense attention too, so that the two curves can be laid on each other. It starts from a dense
baseline: the model has lived with K = 8 for a while, so with dense attention it first reads on for as long
(:func:`dense_baseline`). Every model is evaluated on the same problems, sampled at temperature 1 as in training. Each
seed's findings are kept in ``--work``, from where a stopped run goes on.

    python -m course.experiments.post_training data/novice --work runs/post --out data/measurements/post_training.json
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from course.experiments.rl_base_model import BATCH, Generated
from dsa.checkpoint.load import from_pretrained
from dsa.datasets.rl_domains import DOMAINS
from dsa.datasets.rl_transcripts import Demonstrations
from dsa.io.files import read_json, write_json
from dsa.model.transformer import Transformer
from dsa.record import add_options, check_free, write
from dsa.training import run_folder, sft
from dsa.training.grpo import GRPOConfig, grpo
from dsa.training.indexer import SPARSE_RATE
from dsa.training.optimizers import main_optimizers
from dsa.training.pretrain import lm_objective
from dsa.training.rollout import accuracy
from dsa.training.trainer import Phase, Run, train

NAMES = tuple(DOMAINS)
SEEDS = (0, 1, 2)
CONFIG = GRPOConfig(epsilon_high=0.28)
PROMPTS = {"alone": 16, "together": 32}  # groups a step with one domain, with all
STEPS = {"specialist": 25, "mixed": 60, "polish": 20, "student": 80, "forget": 25, "dense": 150}
SAMPLES = {"num_prompts": 128, "num_generations": 4}  # of each specialist
ALONE, HELD = "maths", 0.1  # the domain trained alone in the end, and the beta that holds the rest
EVAL_PROBLEMS = 150  # problems of each domain

Scores = dict[str, float]


def evaluate_model(model: Transformer) -> Scores:
    """Accuracy in each domain."""
    return {name: round(score, 4) for name, score in accuracy(model, NAMES, EVAL_PROBLEMS).items()}


def curve(run: Run) -> dict[str, list[float]]:
    """Reward and length of every step."""
    kept = {"reward": "reward", "length": "completions/mean_length", "no_variance": "frac_reward_zero_std"}
    return {name: [round(row[key], 4) for row in run.rows] for name, key in kept.items()}


def dense_baseline(base: Transformer) -> Transformer:
    """A copy under dense attention, after as much more reading as the base had under sparse attention."""
    baseline = copy.deepcopy(base).train()
    baseline.attention = "dense"
    plan = [Phase("dense", STEPS["dense"], lm_objective(Demonstrations(), BATCH), rates=(1.0, 0.1), warmup=10)]
    train(baseline, main_optimizers("muon", baseline, SPARSE_RATE), plan, show=False)
    return baseline.eval()


class Study:
    """All runs of one seed from one model; each method trains a copy and leaves the model as it was."""

    def __init__(self, base: Transformer, seed: int):
        self.base, self.seed = base, seed
        self.curves: dict[str, dict[str, list[float]]] = {}

    def trained(
        self, name: str, model: Transformer, names: Sequence[str], steps: int, beta: float = 0.0
    ) -> Transformer:
        """A copy of ``model`` after GRPO on ``names``; its curve is kept under ``name``."""
        settings = replace(CONFIG, beta=beta, num_prompts=PROMPTS["alone" if len(names) == 1 else "together"])
        trained = copy.deepcopy(model)
        run = grpo(trained, names, steps=steps, config=settings, seed=self.seed, show=False)
        self.curves[name] = curve(run)
        print(f"seed {self.seed}: {name}, {run.processor_seconds:.0f} s", flush=True)
        return trained

    def specialists(self) -> dict[str, Transformer]:
        """One model for each domain."""
        return {name: self.trained(name, self.base, [name], STEPS["specialist"]) for name in NAMES}

    def student(self, specialists: dict[str, Transformer]) -> tuple[Transformer, int]:
        """The base after reading what the specialists got right, and how many samples that was."""
        written, trained = sft.collect(specialists, seed=self.seed, **SAMPLES), copy.deepcopy(self.base)
        sft.sft(trained, written, steps=STEPS["student"], seed=self.seed, show=False)
        return trained, len(written)

    def sequential(self, first: Transformer) -> list[Scores]:
        """Accuracies after each stage; ``first`` has gone through the first already: it is that domain's specialist."""
        model, scores = first, [evaluate_model(first)]
        for name in NAMES[1:]:
            model = self.trained(f"sequential {name}", model, [name], STEPS["specialist"])
            scores.append(evaluate_model(model))
        return scores

    def run(self) -> dict[str, Any]:
        """Everything, in the order of the module's text."""
        specialists = self.specialists()
        matrix = {name: evaluate_model(model) for name, model in specialists.items()}
        student, samples = self.student(specialists)
        mixed = self.trained("mixed", self.base, NAMES, STEPS["mixed"])
        polished = self.trained("student, mixed", student, NAMES, STEPS["polish"])
        forgot = self.trained("forget", mixed, [ALONE], STEPS["forget"])
        held = self.trained("forget less", mixed, [ALONE], STEPS["forget"], HELD)
        baseline = dense_baseline(self.base)
        densely = self.trained("mixed, dense", baseline, NAMES, STEPS["mixed"])
        models = {
            "base": self.base, "student": student, "mixed": mixed, "student, mixed": polished,
            "forget": forgot, "forget less": held, "base, dense": baseline, "mixed, dense": densely,
        }  # fmt: skip
        return {
            "seed": self.seed,
            "samples": samples,
            "specialists": matrix,
            "models": {name: evaluate_model(model) for name, model in models.items()},
            "sequential": self.sequential(specialists[NAMES[0]]),
            "curves": self.curves,
        }


def cached_study(base: Transformer, seed: int, work: Path) -> dict[str, Any]:
    """One seed's findings, from ``work`` if they are there."""
    path = work / f"{seed}.json"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, Study(base, seed).run())
    return read_json(path, "a seed's findings")


def run(options: argparse.Namespace) -> Path:
    """Make the file that the command line asks for."""
    check_free(options)
    base, started = from_pretrained(options.folder), perf_counter()
    runs = [cached_study(base, seed, options.work) for seed in options.seeds]
    settings = {
        "seeds": options.seeds,
        "steps": STEPS,
        "grpo": asdict(CONFIG),
        "prompts": PROMPTS,
        "samples": SAMPLES,
        "exam": EVAL_PROBLEMS,
    }
    found = run_folder.provenance(options.command, settings, Generated(), perf_counter() - started)
    found["weights"] = f"the runs start from {options.folder}; what they trained is not kept"
    write(options.out, found | {"runs": runs})
    return options.out


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``python -m course.experiments.post_training``."""
    what = "Record specialists, student, mixed and sequential training."
    parser = argparse.ArgumentParser("python -m course.experiments.post_training", description=what)
    parser.add_argument("folder", type=Path, help="the model to start from")
    add_options(parser)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="where finished seeds are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    run_folder.command(run, parser, argv)


if __name__ == "__main__":
    main()
