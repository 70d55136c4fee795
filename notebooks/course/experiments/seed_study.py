"""The whole training again with other seeds: is what one model shows a property of the training, or of that model?

Each seed gets a dense base, a warm-up and a sparse training of its own, in WORK/SEED/{base,warmed,sparse}. Folders that
are there already are taken as they are, so a run that was stopped goes on with the next one. What was measured is then
collected from their provenance into one table, from which the course's *recorded* claims are made.

    python -m course.experiments.seed_study --work runs/seeds --out data/measurements/seeds.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsa.io.files import read_json
from dsa.record import write
from dsa.training import checkpointing, indexer, pretrain, run_folder

SEEDS = (0, 1, 2)
COLUMNS = {  # what the table holds of each seed: name -> folder and path in its measures
    "recall_dense": ("base", "recall.dense.all"),
    "recall_indexer": ("sparse", "recall.sparse.all"),
    "recall_window_far": ("sparse", "recall.window.far"),
    "bits_dense": ("base", "bits_per_byte.dense"),
    "bits_sparse": ("sparse", "bits_per_byte.sparse"),
    "hit_indexer": ("warmed", "indexer.hit_rate_in_induction_layer.indexer"),
    "hit_window": ("warmed", "indexer.hit_rate_in_induction_layer.window"),
    "hit_random": ("warmed", "indexer.hit_rate_in_induction_layer.random"),
    "of_oracle": ("warmed", "indexer.of_oracle_mean"),
}


def make(work: Path, seed: int) -> None:
    """Train what is missing of one seed."""
    base, warmed, sparse = (str(work / str(seed) / name) for name in ("base", "warmed", "sparse"))
    stages = [
        (pretrain.main, base, []),
        (indexer.main, warmed, [base]),
        (indexer.main, sparse, [warmed, "--sparse"]),
    ]
    for main, out, arguments in stages:
        if not Path(out).exists():
            resume = ["--resume"] if checkpointing.exists(run_folder.work_folder(Path(out))) else []
            main([*arguments, "--out", out, "--seed", str(seed), *resume])


def row(work: Path, seed: int) -> dict[str, Any]:
    """What was measured of one seed: a number for each of COLUMNS."""
    found: dict[str, Any] = {"seed": seed}
    for name, (stage, path) in COLUMNS.items():
        number: Any = read_json(work / str(seed) / stage / "provenance.json", "what was measured")["measures"]
        for key in path.split("."):
            number = number[key]
        found[name] = number
    return found


def collect(work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """The table of all seeds, with the least and the most of every column and where they were measured."""
    rows = [row(work, seed) for seed in seeds]
    source = read_json(work / str(seeds[0]) / "sparse" / "provenance.json", "what was measured")
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    return {
        "command": "python -m course.experiments.seed_study --work runs/seeds --out data/measurements/seeds.json",
        **{key: source[key] for key in ("date", "machine", "versions", "corpus", "weights")},
        "rows": rows,
        "least": {name: min(values) for name, values in columns.items()},
        "most": {name: max(values) for name, values in columns.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``python -m course.experiments.seed_study``."""
    parser = argparse.ArgumentParser(
        "python -m course.experiments.seed_study", description="Train and measure several seeds."
    )
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="where the models go")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table, as JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args(argv)
    for seed in options.seeds:
        make(options.work, seed)
    write(options.out, collect(options.work, options.seeds))
    print(f"made {options.out}")


if __name__ == "__main__":
    main()
