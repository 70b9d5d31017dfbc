"""Early stop: at the right evaluation, with the best adapter, and for good."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from benchmarks.train_command import SETTINGS
from cluster import storage
from pipelines.model_folders import open_model
from pipelines.run.planning import make_plan
from pipelines.run.progress import read_metrics
from pipelines.run.training_steps import Training
from pipelines.training import TrainConfig, train

pytestmark = pytest.mark.slow

PATIENCE, EVERY = 2, 2


def dev_loss_of(adapter: str, config: TrainConfig, folder: Path) -> float:
    """Measured anew."""
    data = storage.open_folder(config.data, "prepare")
    training = Training(make_plan(config, open_model("tiny", "--base"), data, folder, 0), 0, 1, torch.device("cpu"))
    set_peft_model_state_dict(training.model, load_file(f"{adapter}/adapter_model.safetensors"))
    return training.evaluate()["dev_loss"]


def test_a_run_stops_after_two_evaluations_without_a_lower_loss_and_keeps_the_best(
    rows: str, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    # The rate rises for 20 steps to one at which nothing can be learned: the loss falls and then rises.
    rising = {"learning_rate": 0.05, "warmup_ratio": 0.5, "schedule": "constant", "max_steps": 40, "epochs": 10.0}
    settings = SETTINGS | rising | {"eval_steps": EVERY, "patience": PATIENCE, "score_rows": 0}
    config = TrainConfig(data=rows, out=str(tmp_path / "adapter"), **settings)
    out = train(config)
    metrics = read_metrics(Path(out, "metrics.jsonl"))
    losses = {row["step"]: row["dev_loss"] for row in metrics if "dev_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best > EVERY
    assert [row["step"] for row in metrics] == list(range(1, best + PATIENCE * EVERY + 1))
    assert len(metrics) < config.max_steps
    assert dev_loss_of(out, config, tmp_path / "again" / "run-x") == pytest.approx(losses[best], rel=1e-5)
    receipt = json.loads(Path(out, "receipt.json").read_text())
    assert (receipt["counts"]["steps"], receipt["counts"]["lowest_dev_loss_at_step"]) == (len(metrics), best)

    adapter = Path(out, "adapter_model.safetensors").read_bytes()
    train(config)
    assert "is finished already" in capsys.readouterr().out
    shutil.rmtree(out)  # only the run's folder is left, as after a kill between the last step and the end
    train(config)
    assert read_metrics(Path(out, "metrics.jsonl")) == metrics
    assert Path(out, "adapter_model.safetensors").read_bytes() == adapter
