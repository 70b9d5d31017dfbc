"""Places that can fail, for the benchmarks of faults: a cluster of two nodes, an S3 server and a line to it, a disk."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent


def ray_environment() -> dict[str, str]:
    """The environment of a Ray cluster on this machine that notices within seconds that a node is lost."""
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    env |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
    return env | {"RAY_health_check_failure_threshold": "3"}


@contextmanager
def several_nodes(
    head_cpus: int = 1, workers: int = 1
) -> Iterator[tuple[dict[str, str], list[subprocess.Popen[bytes]]]]:
    """A Ray cluster on this machine, workers with a CPU each: the environment to join it, and its nodes, head first."""
    env = ray_environment()
    port, folder = free_port(), tempfile.mkdtemp(prefix="rc")
    address = f"127.0.0.1:{port}"
    common = "--block --object-store-memory=100000000 --node-ip-address=127.0.0.1"
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        head = f"--head --num-cpus={head_cpus} --port={port} --temp-dir={folder} --include-dashboard=false"
        head += f" --ray-client-server-port={free_port()}"
        for options in (head, *[f"--address={address} --num-cpus=1"] * workers):
            command = [str(BIN / "ray"), "start", *options.split(), *common.split()]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            nodes.append(subprocess.Popen(command, env=env, **quiet))
            time.sleep(8)
        yield {**env, "RAY_ADDRESS": address}, nodes
    finally:
        for node in nodes:
            end_tree(node.pid)
            node.wait()
        shutil.rmtree(folder, ignore_errors=True)


def end_tree(pid: int) -> None:
    """SIGKILL to a process and all below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Line:
    """A TCP line to a server, which can be slow or cut."""

    def __init__(self, target: int) -> None:
        self.delay_s, self.cut, self.target = 0.0, False, target
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            if self.cut:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.target))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.delay_s)
                if self.cut:
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def moto_server() -> str | None:
    """The S3 server's command, if it is told: one that lies about may be too old."""
    return os.environ.get("MOTO_SERVER")


@contextmanager
def object_store() -> Iterator[tuple[Line, str, dict[str, str]]]:
    """An S3 server with a bucket behind a Line; its address for --storage, and the keys."""
    command = moto_server()
    assert command, "set $MOTO_SERVER: see the head of benchmarks/chaos.py"
    port = free_port()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([command, "-H", "127.0.0.1", "-p", str(port)], **quiet)
    try:
        bucket = urllib.request.Request(f"http://127.0.0.1:{port}/runs", method="PUT")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + 60
        while True:
            try:
                direct.open(bucket, timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "moto_server does not start"
                time.sleep(0.3)
        line = Line(port)
        place = f"s3://runs/team?endpoint_override=127.0.0.1:{line.port}&scheme=http&region=us-east-1"
        keys = {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        yield line, place, keys
    finally:
        end_tree(server.pid)
        server.wait()


@contextmanager
def small_disk() -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = Path(tempfile.mkdtemp(prefix="small-disk-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()
