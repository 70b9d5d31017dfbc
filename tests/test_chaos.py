"""Training under faults: whatever is killed, cut or full, the curve is an undisturbed run's, step by step."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import chaos, fault_places, faults
from benchmarks.processes import end_tree
from benchmarks.train_command import SETTINGS, Run, curve
from cluster import storage
from pipelines.model_folders import open_model
from pipelines.preparation import PrepareConfig, prepare
from pipelines.run.planning import make_plan
from pipelines.run.progress import read_metrics
from pipelines.run.training_steps import Training
from pipelines.training import TrainConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a file system, which root in a container often may not."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        return False
    subprocess.run(["umount", "-l", str(folder)], check=True)
    return True


def may_link() -> bool:
    """Whether this process may make network namespaces and cables between them."""
    try:
        fault_places.Link().remove()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.mark.parametrize(
    "fault", ["controller", "full-disk", "link", "raylet", "slow-folder", "slow-store", "store-cut"]
)
def test_the_curve_is_that_of_an_undisturbed_run(fault: str, rows: str, tmp_path: Path, undisturbed: str) -> None:
    if fault in ("slow-store", "store-cut") and not fault_places.moto_server():
        pytest.skip("no S3 server: `make test-store` has one")
    if fault == "full-disk" and not may_mount(tmp_path / "disk"):
        pytest.skip("no right to mount a small disk")
    if fault == "slow-folder" and not (shutil.which("bindfs") and may_mount(tmp_path / "disk")):
        pytest.skip("no bindfs (apt-get install bindfs), or no right to mount it")
    if fault == "link" and not may_link():
        pytest.skip("no right to make a network namespace, or no `ip` (iproute2)")
    outcome = chaos.meet(fault, rows, tmp_path, {}, [loss for _, loss in curve(Path(undisturbed))])
    assert outcome.worst < 1e-3
    # Those since the last checkpoint that counts: an interval and what its upload took.
    assert outcome.steps_lost <= 3 * SETTINGS["save_steps"]
    assert outcome.pause < 10  # no upload is waited for: one takes eleven seconds and more in the slow places
    if fault == "link":
        assert outcome.seconds < 60  # with Ray's own settings it is more than two minutes


def test_a_worker_a_quarter_as_fast_only_slows_a_run_over_real_shards_down(
    shared: Path, tmp_path: Path, ray_cluster: None
) -> None:
    raw, data = str(shared / "data" / "multidoc-sample"), str(tmp_path / "data")
    prepare(PrepareConfig(raw=raw, out=data, max_tokens=1024))
    flags = {"batch_size": 4, "max_steps": 3, "score_rows": 0}
    config = TrainConfig.model_validate(SETTINGS | flags | {"data": data})
    plan = make_plan(config, open_model("tiny", "--base"), storage.open_folder(data, "prepare"), tmp_path / "run-x", 0)
    alone = Training(plan, 0, 1, torch.device("cpu"))
    expected = [alone.advance()["loss"] for _ in range(3)]
    run = Run(data, tmp_path / "adapter", flags)
    try:
        run.start()
        run.wait(1)
        assert run.process
        with faults.held_back(run.processes("RayTrainWorker")[-1]):
            assert run.process.wait(timeout=400) == 0
    finally:
        assert run.process
        end_tree(run.process.pid)
    found = read_metrics(run.out / "metrics.jsonl")
    assert [row["loss"] for row in found] == pytest.approx(expected, rel=1e-4)
    assert {row["workers"] for row in found} == {2}
