"""A Ray cluster of a head and two workers on this machine, its memory in Redis, as KubeRay's pods would be."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.fault_places import BIN, free_port, ray_environment
from benchmarks.processes import below, command_line, end_tree
from tests.waiting import wait_for


@dataclass
class Nodes:
    """The processes of a cluster, and where it is."""

    env: dict[str, str]
    """Of people, jobs and pods."""
    redis: str
    gcs_port: int
    dashboard_port: int
    folder: str
    head: subprocess.Popen[bytes] | None = None
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_head(self) -> None:
        """Start the head, without CPUs, as the manifests have it."""
        options = [f"--port={self.gcs_port}", f"--dashboard-port={self.dashboard_port}", "--num-cpus=0"]
        options += [f"--temp-dir={self.folder}", f"--ray-client-server-port={free_port()}"]
        # What KubeRay makes of gcsFaultToleranceOptions.
        storage = {"RAY_REDIS_ADDRESS": self.redis, "RAY_external_storage_namespace": "tests"}
        self.head = self._start(["--head", *options, f"--redis-password={PASSWORD}"], storage)

    def start_worker(self) -> None:
        """Start a worker with four of Ray's CPUs."""
        patience = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        self.workers.append(self._start([f"--address=127.0.0.1:{self.gcs_port}", "--num-cpus=4"], patience))

    def command(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A command of a person or a pod beside the cluster."""
        command, env = [str(BIN / words[0]), *words[1:]], self.env | env
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)

    def alive(self) -> int:
        """How many nodes there are."""
        listed = self.get("/nodes?view=summary")
        nodes = listed["data"]["summary"] if listed else []
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def get(self, path: str) -> Any:
        """What the dashboard says there; None where it does not answer."""
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(f"http://127.0.0.1:{self.dashboard_port}{path}", timeout=30, trust_env=False)
            return answer.json() if answer.is_success else None

    def kill_gcs(self) -> None:
        """SIGKILL to the head's GCS, with which the head ends."""
        assert self.head
        of_the_head = below(self.head.pid)
        [gcs] = [process for process in of_the_head if "gcs/gcs_server" in command_line(process)]
        gcs.kill()
        self.head.wait(60)
        for process in of_the_head:  # the pod is gone, and all that was in it
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        Path(self.folder, "ray_current_cluster").unlink()

    def _start(self, options: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        common = ["--block", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
        common.append(f"--dashboard-agent-listen-port={free_port()}")
        env = {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"} | env
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([str(BIN / "ray"), "start", *options, *common], env=env, **quiet)


PASSWORD = "of-the-tests"


@contextmanager
def three_nodes() -> Iterator[Nodes]:
    """A head and two workers, ready."""
    redis_port, gcs_port, dashboard_port = free_port(), free_port(), free_port()
    address = f"http://127.0.0.1:{dashboard_port}"
    env = ray_environment() | {"RAY_ADDRESS": address, "RAY_DASHBOARD_ADDRESS": address}
    nodes = Nodes(env, f"127.0.0.1:{redis_port}", gcs_port, dashboard_port, tempfile.mkdtemp(prefix="rk"))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = ["redis-server", "--port", str(redis_port), "--bind", "127.0.0.1", "--save", "", "--requirepass", PASSWORD]
    redis = subprocess.Popen(server, **quiet)
    try:
        nodes.start_head()
        wait_for(lambda: nodes.get("/api/jobs/") is not None, 90)
        for number in (2, 3):  # one after the other: both at once have been seen to take the same ports
            nodes.start_worker()
            wait_for(lambda number=number: nodes.alive() == number, 60)
        yield nodes
    finally:
        for process in [*nodes.workers, nodes.head, redis]:
            if process:
                end_tree(process.pid)
                process.wait()
        shutil.rmtree(nodes.folder, ignore_errors=True)
