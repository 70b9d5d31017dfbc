"""Training runs that tests compare: whether their curves and scores are the same, and how to kill one in the middle."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import below
from benchmarks.train_command import STEPS, curve
from pipelines.run.progress import read_metrics


def assert_same_curve(adapter: str | Path, expected: str | Path) -> None:
    """Every step once, with the losses of an undisturbed run."""
    assert [step for step, _ in curve(Path(adapter))] == list(range(1, STEPS + 1))
    losses, others = ([loss for _, loss in curve(Path(folder))] for folder in (adapter, expected))
    assert losses == pytest.approx(others, rel=1e-3)


def scores(adapter: str | Path) -> list[tuple[float, float]]:
    """Exact match and F1 of each evaluation."""
    rows = read_metrics(Path(adapter, "metrics.jsonl"))
    return [(row["dev_exact_match"], row["dev_f1"]) for row in rows if "dev_loss" in row]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics so far."""
    return [row for file in run.glob("run-*/metrics.jsonl") for row in read_metrics(file)]


def checkpoint_lists(run: Path) -> list[Path]:
    """Ray Train's list of a run's checkpoints, as soon as one counts."""
    return list(run.glob("run-*/checkpoint_manager_snapshot.json"))


def kill_a_worker_after_step(run: Path, step: int) -> None:
    while len(steps_of(run)) < step or not checkpoint_lists(run):
        time.sleep(0.05)
    below(os.getpid(), "RayTrainWorker")[-1].kill()
