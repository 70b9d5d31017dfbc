"""MLflow and W&B: each step once, in one run however often training was resumed, and never a reason to stop."""

import importlib.util
import json
import os
import pty
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.fault_places import free_port
from cluster.errors import StageError
from pipelines.run.trackers import SECONDS_TO_FINISH, TrackerName, require, tracked

mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed; it comes with the extra dev")
wandb = pytest.importorskip("wandb", reason="wandb is not installed; it comes with the extra dev")

SETTINGS = {"learning_rate": 1e-3, "lora": {"rank": 8}}


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stores on the disk, and a run folder to follow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run-0123"
    folder.mkdir()
    return folder


def train_steps(folder: Path, names: list[TrackerName], steps: range, interrupted: bool = False) -> None:
    """What the driver sees of a run: rows that are added to metrics.jsonl, the last ones again after a restart."""
    try:
        with tracked(names, folder, SETTINGS):
            file = folder / "metrics.jsonl"
            kept = file.read_text().splitlines(keepends=True)[: steps.start - 1] if file.exists() else []
            new = [json.dumps({"step": step, "loss": 4 / step, "seconds": 0.5}) + "\n" for step in steps]
            file.write_text("".join([*kept, *new]))
            if interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert interrupted


def wandb_records(file: Path) -> Iterator[object]:
    """The records of an offline run: LevelDB's log format behind seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a record, or the last piece of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_mlflow_has_each_step_once_in_one_run_although_training_was_interrupted(local: Path) -> None:
    train_steps(local, ["mlflow"], range(1, 6), interrupted=True)
    run_id = json.loads((local / "mlflow.json").read_text())["run"]
    assert mlflow.get_run(run_id).info.status == "FAILED"
    train_steps(local, ["mlflow"], range(4, 9))
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "run-0123", "FINISHED")
    assert run.data.params["lora"] == "{'rank': 8}"
    history = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 4 / step) for step in range(1, 9)]
    assert run.data.metrics.keys() == {"loss", "seconds"}  # the names that TensorBoard has


def test_wandb_has_each_step_once_under_one_id_although_training_was_interrupted(local: Path) -> None:
    train_steps(local, ["wandb"], range(1, 6), interrupted=True)
    train_steps(local, ["wandb"], range(4, 9))
    wandb.teardown()  # its service closes the file of a finished run when it comes to it, at its own end at the latest
    run_id = json.loads((local / "wandb.json").read_text())["run"]
    steps, ids = {}, set()
    for file in sorted(local.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                assert record.history.step.num not in steps
                steps[record.history.step.num] = values["loss"]
    assert ids == {run_id}
    assert steps == {step: 4 / step for step in range(1, 9)}


def test_a_server_that_is_gone_is_warned_of_once_and_has_all_steps_when_it_is_back(
    local: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"file://{local.parent}/mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with tracked(["mlflow"], local, SETTINGS):
        (local / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
        time.sleep(5)  # two looks
        warning = capsys.readouterr().err
        assert warning.startswith(f"warning: mlflow lacks metrics, which {local}/metrics.jsonl has: MlflowException:")
        assert warning.count("\n") == 1
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert "warning" not in capsys.readouterr().err
    assert json.loads((local / "mlflow.json").read_text())["step"] == 2


def test_a_server_that_does_not_answer_holds_the_end_of_training_up_for_seconds_only(
    local: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.run.trackers.SECONDS_TO_FINISH", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        train_steps(local, ["mlflow"], range(1, 3))
        assert time.monotonic() - started < 2 * SECONDS_TO_FINISH
    assert "mlflow lacks metrics" in capsys.readouterr().err


def test_wandb_without_a_key_is_warned_of_and_asks_for_none_on_the_terminal(tmp_path: Path) -> None:
    script = "import pathlib, sys; from pipelines.run.trackers import tracked\n"
    script += "with tracked(['wandb'], pathlib.Path(sys.argv[1]), {}): pass"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    terminal, other_end = pty.openpty()
    command = [sys.executable, "-c", script, str(tmp_path)]
    ended = subprocess.run(command, env=env, stdin=other_end, stdout=other_end, stderr=other_end, timeout=60)
    assert ended.returncode == 0
    assert os.read(terminal, 10000).decode().startswith("warning: wandb lacks metrics")
    os.close(terminal)
    os.close(other_end)


def test_a_tracker_that_is_not_installed_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require(["mlflow", "wandb"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require([])
    with pytest.raises(StageError, match=r"^--trackers mlflow: it is not installed; pip install mlflow-skinny, or"):
        require(["mlflow"])
