"""What test_train_resume.py compares with single processes: a training run after the other in two processes.

    python tests/support/train_processes.py FOLDER

Each writes into a folder of its own; without evaluation, but for the first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import forked

from barlow_fused.train import evaluate, main, processes, trainer

COMMON = ["--precision", "fp64", "--steps", "6", "--batch-size", "32", "--warmup-epochs", "0.05", "--device", "cpu"]
COMMON += ["--checkpoint-every", "3"]
SGD = ["--optimizer", "sgd", "--weight-decay", "0", "--projector", "64-96", "--lr-weights", "2e-3"]
RUNS = {
    "evaluated": ["--projector", "16-32", "--steps", "1"],
    "fused": ["--projector", "64-256"],
    "reference": ["--projector", "64-256", "--loss", "reference"],
    "accumulated": ["--projector", "64-32", "--accumulate", "2"],
    "official": [*SGD, "--lr-biases", "2e-3", "--gradient", "official"],
    "official reference": [*SGD, "--lr-biases", "2e-3", "--gradient", "official", "--loss", "reference"],
    "last layer": ["--projector", "64-256", "--fused-projector"],
    "last layer accumulated": ["--projector", "8-96", "--accumulate", "2", "--fused-projector"],
    "last layer official": [*SGD, "--lr-biases", "2e-3", "--gradient", "official", "--fused-projector"],
    "sharded": ["--projector", "64-256", "--shard-projector"],
    "sharded sgd": [*SGD, "--lr-biases", "2e-3", "--gradient", "official", "--shard-projector"],
    "sharded adamw": [
        "--projector",
        "64-90",
        "--optimizer",
        "adamw",
        "--lr-weights",
        "1e-3",
        "--lr-biases",
        "1e-3",
        "--shard-projector",
    ],
    "sharded accumulated": ["--projector", "8-96", "--accumulate", "2", "--shard-projector", "--fused-projector"],
    "sharded lars": ["--projector", "64-97", "--optimizer", "lars", "--shard-projector", "--fused-projector"],
    "own batch norm": ["--projector", "64-256", "--no-sync-batch-norm"],
}


def train(folder: Path, name: str, *flags: str) -> None:
    assert main([*COMMON, *RUNS[name], *flags, "--out", str(folder / name)]) == 0


def train_all(folder: Path) -> None:
    """One run after the other, with the same processes."""
    evaluate.DRAWS = 1
    stop, processes.stop = processes.stop, lambda: None
    for name in RUNS:
        train(folder, name)
        for method in ("look", "accuracy", "pixels", "draw", "knn"):
            setattr(trainer.Monitor, method, lambda self: None)
    assert main([*COMMON, *RUNS["fused"], "--steps", "4", "--out", str(folder / "resumed")]) == 0
    assert main(["--resume", str(folder / "resumed"), "--steps", "6"]) == 0
    stop()  # a process that ends while Gloo's threads run may be aborted


if __name__ == "__main__":
    forked.run(2, train_all, Path(sys.argv[1]))
