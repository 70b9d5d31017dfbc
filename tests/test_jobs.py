"""Stages as Ray jobs on a cluster started by `ray start`: they succeed, fail with one line, stop without leftovers."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.fault_places import BIN, free_port
from benchmarks.processes import end_tree
from chatglm3.tiny.knowledge import write_shards

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a person beside a running `ray start --head`."""
    dashboard = free_port()
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    env["RAY_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    temporary = tmp_path_factory.getbasetemp().parent / f"r{dashboard}"  # short: sockets lie below it
    options = f"--head --block --port={free_port()} --dashboard-port={dashboard} --num-cpus=4 --temp-dir={temporary}"
    options += " --object-store-memory=200000000 --node-ip-address=127.0.0.1 "
    options += f"--ray-client-server-port={free_port()} --dashboard-agent-listen-port={(agent := free_port())}"
    head = subprocess.Popen(
        [str(BIN / "ray"), "start", *options.split()],
        env={name: value for name, value in env.items() if name != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(dashboard)
        wait_for_port(agent)  # which starts the jobs
        yield env
    finally:
        end_tree(head.pid)
        head.wait()


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"nobody listens on port {port}")


def submit(environment: dict[str, str], *arguments: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ray"), "job", "submit", "--working-dir", "."]
    command += [] if wait else ["--no-wait", "--submission-id", "stopped"]
    command += ["--", "python", "-m", "pipelines", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.timeout(600)
def test_the_stages_run_as_ray_jobs(environment: dict[str, str], tmp_path: Path) -> None:
    write_shards(tmp_path / "raw", "demo", 60, seed=3)
    stages = (
        f"prepare --raw {tmp_path}/raw --out {tmp_path}/data",
        f"train --data {tmp_path}/data --out {tmp_path}/adapter --max_steps 2 --workers 2 --use_gpu false",
        f"merge --adapter {tmp_path}/adapter --out {tmp_path}/model --format nf4",
        f"evaluate --model {tmp_path}/model --data {tmp_path}/data --out {tmp_path}/evaluation",
        f"predict --model {tmp_path}/model 你好",
    )
    for stage in stages:
        result = submit(environment, *stage.split())
        assert result.returncode == 0, f"{stage}\n{result.stdout}\n{result.stderr}"
        assert "succeeded" in result.stdout + result.stderr
    for name in ("data", "adapter", "model", "evaluation"):
        assert (tmp_path / name / "receipt.json").is_file()


def test_a_failed_stage_ends_the_job_with_one_clear_line(environment: dict[str, str], tmp_path: Path) -> None:
    result = submit(environment, "train", "--data", f"{tmp_path}/none", "--out", f"{tmp_path}/adapter")
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert output.count("python -m pipelines: error:") >= 1
    assert f"{tmp_path}/none: there is no such folder; run prepare first" in output
    assert "Traceback" not in output
    assert "failed" in output
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_job_leaves_no_half_written_folder(environment: dict[str, str], tmp_path: Path) -> None:
    write_shards(tmp_path / "raw", "demo", 20_000, seed=3)
    submit(environment, "prepare", "--raw", f"{tmp_path}/raw", "--out", f"{tmp_path}/data", wait=False)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".data.partial-*")):
        assert time.monotonic() < deadline, "prepare did not start"
        time.sleep(0.02)
    stopped = subprocess.run(
        [str(BIN / "ray"), "job", "stop", "stopped"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert stopped.returncode == 0, stopped.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
