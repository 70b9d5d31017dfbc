"""A node's notice that it will be taken away: a checkpoint comes first, what is measured later, and at its own step."""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.train import Checkpoint

from benchmarks.train_command import SETTINGS
from cluster import storage
from pipelines.model_folders import open_model
from pipelines.run import worker
from pipelines.run.planning import make_plan
from pipelines.run.progress import read_metrics
from pipelines.run.saving import UNKNOWN
from pipelines.run.training_plan import TrainingPlan
from pipelines.run.training_steps import Training
from pipelines.run.worker import train_worker
from pipelines.training import TrainConfig

CPU = torch.device("cpu")


@pytest.fixture
def plan(rows: str, tmp_path: Path) -> TrainingPlan:
    settings = SETTINGS | {"max_steps": 4, "eval_steps": 2, "save_steps": 100, "score_rows": 2, "score_tokens": 4}
    data = storage.open_folder(rows, "prepare")
    return make_plan(TrainConfig(data=rows, **settings), open_model("tiny", "--base"), data, tmp_path / "run-x", 0)


@dataclass
class RayTrain:
    """Stands in for Ray Train around the only worker of a run."""

    folder: Path
    notice_at: int = 100
    """Which question for a notice is answered by one."""
    asked: int = 0
    reports: list[tuple[int, float]] = field(default_factory=list)
    """Step and dev loss of each checkpoint."""

    def get_context(self) -> Any:
        return SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)

    def get_checkpoint(self) -> Checkpoint | None:
        return Checkpoint.from_directory(self.folder) if self.folder.exists() else None

    def get_preemption_info(self) -> object:
        self.asked += 1
        return object() if self.asked >= self.notice_at else None

    def report(self, metrics: dict[str, Any], checkpoint: Checkpoint, checkpoint_upload_mode: object) -> None:
        self.reports.append((metrics["step"], metrics["dev_loss"]))
        if not self.folder.exists():
            shutil.copytree(checkpoint.path, self.folder)

    def get_all_reported_checkpoints(self, mode: object) -> None:
        pass

    def run(self, plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch) -> dict[int, float | None]:
        for name in ("get_context", "get_checkpoint", "get_preemption_info", "report", "get_all_reported_checkpoints"):
            monkeypatch.setattr(ray.train, name, getattr(self, name))
        monkeypatch.setattr(worker, "get_device", lambda: CPU)
        monkeypatch.setattr(tempfile, "tempdir", str(self.folder.parent))
        train_worker(plan.model_dump())
        return {row["step"]: row.get("dev_loss") for row in read_metrics(Path(plan.folder, "metrics.jsonl"))}


def test_a_notice_is_answered_by_a_checkpoint_before_anything_is_measured(
    plan: TrainingPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, losses = Training(plan, 0, 1, CPU), {}
    for step in (1, 2, 3, 4):
        undisturbed.advance()
        losses[step] = undisturbed.evaluate()["dev_loss"] if step % 2 == 0 else None
    first = RayTrain(tmp_path / "saved", notice_at=2)  # after the second step
    found = first.run(plan, monkeypatch)
    # The run goes on as long as the node is there. At its end nothing is left to do but to measure.
    assert first.reports == [(2, UNKNOWN), (4, UNKNOWN), (4, pytest.approx(losses[4]))]
    assert found == {1: None, 2: None, 3: None, 4: pytest.approx(losses[4])}

    assert len(list(tmp_path.glob("checkpoint-*"))) == 3  # as after kills: nobody uploads them here
    again = RayTrain(tmp_path / "saved")
    assert again.run(plan, monkeypatch) == pytest.approx(losses)
    assert again.reports == [(2, pytest.approx(losses[2])), (4, pytest.approx(losses[4]))]
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_a_notice_during_an_evaluation_ends_it_and_a_checkpoint_follows(
    plan: TrainingPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during = RayTrain(tmp_path / "saved", notice_at=4)  # two steps, one dev block
    found = during.run(plan, monkeypatch)
    assert during.reports[0] == (2, UNKNOWN)
    assert found[2] is None


def test_an_evaluation_that_was_ended_leaves_no_trace_in_the_training(plan: TrainingPlan) -> None:
    training = Training(plan, 0, 1, CPU)
    training.advance()
    training.advance()
    for blocks in (0, 1):
        answers = iter([False] * blocks + [True])
        assert training.evaluate(lambda answers=answers: next(answers)) == {}
    assert training.answer_questions(lambda: True) == {}
    assert (training.due, training.dev_losses, training.model.training) == (True, [], True)
    assert len(training.dev_blocks) > 1
    assert training.evaluate()["dev_loss"] == training.dev_losses[0]
    assert not training.due
