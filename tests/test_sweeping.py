"""The sweep stage: trials on a real Ray Tune, and a run.yaml that train takes."""

import csv
from pathlib import Path

import pytest

from cluster.config import read_section
from cluster.storage import open_folder
from pipelines.sweeping import SweepConfig, sweep
from pipelines.training import TrainConfig
from tests.training_runs import SETTINGS

pytestmark = pytest.mark.slow


def test_the_best_of_the_trials_becomes_a_run_yaml(rows: str, tmp_path: Path, ray_cluster: None) -> None:
    settings = {**SETTINGS, "data": rows, "save_steps": 50}
    # A rate at which nothing is learned loses to one at which something is.
    config = {"train": settings, "trials": 3, "at_once": 1, "ranks": [4], "learning_rates": [1e-9, 2e-3]}
    out = sweep(SweepConfig.parse({**config, "out": str(tmp_path / "sweep")}, "flags"))
    assert {path.name for path in Path(out).iterdir()} >= {"run.yaml", "trials.csv", "trials.png", "report.html"}
    trials = list(csv.DictReader(Path(out, "trials.csv").read_text().splitlines()))
    losses = [float(trial["dev_loss"]) for trial in trials]
    assert losses == sorted(losses)
    assert {trial["learning_rate"] for trial in trials} == {"1e-09", "0.002"}
    best = TrainConfig.parse(read_section(f"{out}/run.yaml", "train", ["train"]), "run.yaml")
    assert (best.learning_rate, best.lora.rank, best.lora.alpha, best.max_steps) == (2e-3, 4, 8, SETTINGS["max_steps"])
    assert open_folder(out, "sweep").receipt.counts["trials"] == len(trials)
