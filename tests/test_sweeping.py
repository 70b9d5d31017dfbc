"""The sweep stage: trials on a real Ray Tune, and a run.yaml that train takes."""

import csv
from pathlib import Path

import pytest

from benchmarks.train_command import SETTINGS
from cluster.config import read_section
from cluster.storage import open_folder
from pipelines.sweeping import SweepConfig, draw_trials, sweep
from pipelines.training import TrainConfig

pytestmark = pytest.mark.slow


def test_the_best_of_the_trials_becomes_a_run_yaml(rows: str, tmp_path: Path, ray_cluster: None) -> None:
    settings = {**SETTINGS, "data": rows, "save_steps": 50, "strategy": "zero3", "workers": 2}
    # A rate at which nothing is learned loses to one at which something is.
    config = {"train": settings, "trials": 3, "at_once": 1, "ranks": [4], "learning_rates": [1e-9, 2e-3]} | {
        "targets": "all"
    }
    out = sweep(SweepConfig.parse({**config, "out": str(tmp_path / "sweep")}, "flags"))
    assert {path.name for path in Path(out).iterdir()} >= {"run.yaml", "trials.csv", "trials.png", "report.html"}
    trials = list(csv.DictReader(Path(out, "trials.csv").read_text().splitlines()))
    losses = [float(trial["dev_loss"]) for trial in trials]
    assert losses == sorted(losses)
    assert {trial["learning_rate"] for trial in trials} == {"1e-09", "0.002"}
    best = TrainConfig.parse(read_section(f"{out}/run.yaml", "train", ["train"]), "run.yaml")
    assert (best.learning_rate, best.lora.rank, best.lora.alpha, best.max_steps) == (2e-3, 4, 8, SETTINGS["max_steps"])
    assert open_folder(out, "sweep").receipt.counts["trials"] == len(trials) == 2
    assert (best.strategy, best.workers) == ("zero3", 2)  # a trial holds the whole base, the user's run as it was told


def test_no_combination_is_tried_twice_and_all_are_where_there_are_trials_enough() -> None:
    space = {"ranks": "4,8", "learning_rates": [1e-3, 2e-3], "targets": "qkv"}
    drawn = {n: draw_trials(SweepConfig.parse({**space, "trials": n}, "flags")) for n in (3, 4, 9)}
    distinct = {n: {tuple(trial.values()) for trial in trials} for n, trials in drawn.items()}
    assert {n: len(trials) for n, trials in drawn.items()} == {3: 3, 4: 4, 9: 4}
    assert {n: len(trials) for n, trials in distinct.items()} == {3: 3, 4: 4, 9: 4}
    assert distinct[9] == {(rank, rate, "qkv") for rank in (4, 8) for rate in (1e-3, 2e-3)}
