"""Places that can fail, for the benchmarks of faults: clusters of two nodes, an S3 server and a line to it, a disk."""

import contextlib
import os
import random
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

from benchmarks.processes import end_tree

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
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        nodes.append(_start_head(env, "127.0.0.1", port, folder, head_cpus))
        for _ in range(workers):
            nodes.append(_start_node(env, "127.0.0.1", f"--address=127.0.0.1:{port} --num-cpus=1"))
        yield {**env, "RAY_ADDRESS": f"127.0.0.1:{port}"}, nodes
    finally:
        for node in nodes:
            end_tree(node.pid)
            node.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start_head(env: dict[str, str], ip: str, port: int, folder: str, cpus: int) -> subprocess.Popen[bytes]:
    options = f"--head --num-cpus={cpus} --port={port} --temp-dir={folder} --include-dashboard=false"
    return _start_node(env, ip, f"{options} --ray-client-server-port={free_port()}")


def _start_node(env: dict[str, str], ip: str, options: str, within: str = "") -> subprocess.Popen[bytes]:
    """Start a node by a command that is given `within` another one, and wait until it is there."""
    common = f"--block --object-store-memory=100000000 --node-ip-address={ip}"
    command = [*within.split(), str(BIN / "ray"), "start", *options.split(), *common.split()]
    node = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_until_started(node)
    return node


def wait_until_started(node: subprocess.Popen[bytes]) -> None:
    """Wait until `ray start --block`, whose output is piped, says that the cluster knows its node."""
    assert node.stdout
    for line in node.stdout:
        if b"Ray runtime started" in line:
            return  # what it says from now on, that it waits and at its end why, fits in a pipe that nobody reads
    raise ChildProcessError(f"no Ray node: {node.args}")


class Link:
    """The cable between this machine and a namespace that is another host to Ray. It needs root.

    The cable's end here is plugged into a bridge: pulled out, packets of both sides vanish without an error, and each
    still reaches its own address.
    """

    HERE, THERE = "198.18.77.1", "198.18.77.2"  # of the range for benchmarks, RFC 2544

    def __init__(self) -> None:
        self.host, self.bridge, self.cable = (f"{kind}{os.getpid()}" for kind in ("host", "br", "cable"))
        try:
            self._lay()
        except subprocess.CalledProcessError:  # no module for bridges, say
            self.remove()
            raise

    def _lay(self) -> None:
        _ip(f"netns add {self.host}")
        _ip(f"link add {self.bridge} type bridge")
        _ip(f"address add {self.HERE}/30 dev {self.bridge}")
        _ip(f"link set {self.bridge} up")
        _ip(f"link add {self.cable} type veth peer name eth0 netns {self.host}")
        _ip(f"link set {self.cable} master {self.bridge} up")
        _ip(f"-n {self.host} address add {self.THERE}/30 dev eth0")
        for device in ("eth0", "lo"):
            _ip(f"-n {self.host} link set {device} up")

    def cut(self) -> None:
        """Pull the cable out."""
        _ip(f"link set {self.cable} down")

    def mend(self) -> None:
        """Plug it in again."""
        _ip(f"link set {self.cable} up")

    def processes_there(self) -> list[int]:
        """Ids of what runs on the other host."""
        return [int(pid) for pid in _ip(f"netns pids {self.host}").split()]

    def remove(self) -> None:
        """Take all of it away; processes there must have ended."""
        for command in (f"link delete {self.bridge}", f"netns delete {self.host}"):
            with contextlib.suppress(subprocess.CalledProcessError):  # it was not there yet
                _ip(command)


def _ip(command: str) -> str:
    return subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True).stdout


@contextmanager
def two_hosts() -> Iterator[tuple[dict[str, str], Link]]:
    """A Ray cluster of two nodes with a CPU each, and the link between them; the environment to join it from here."""
    link, nodes = Link(), []
    env, port, folder = ray_environment(), free_port(), tempfile.mkdtemp(prefix="rc")
    address = f"{link.HERE}:{port}"
    try:
        gloo = {"GLOO_SOCKET_IFNAME": link.bridge}  # it would take the one that the machine's name leads to
        nodes.append(_start_head(env | gloo, link.HERE, port, folder, cpus=1))
        options, within = f"--address={address} --num-cpus=1", f"ip netns exec {link.host}"
        nodes.append(_start_node(env | {"GLOO_SOCKET_IFNAME": "eth0"}, link.THERE, options, within))
        yield {**env, "RAY_ADDRESS": address}, link
    finally:
        for node in nodes:
            end_tree(node.pid)
            node.wait()
        for pid in link.processes_there():
            end_tree(pid)
        link.remove()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port of this machine that nobody listens on, and none of those that systems and Ray hand out on their own."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


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
def folder_for_checkpoints() -> Iterator[Path]:
    """A folder that `throttle` can make slow."""
    folder = Path(tempfile.mkdtemp(prefix="slow-folder-"))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], stderr=subprocess.DEVNULL)  # it may not have been throttled
        shutil.rmtree(folder, ignore_errors=True)


def throttle(folder: Path, bytes_a_second: int) -> None:
    """Lay a file system over the folder that shows what is in it and takes so many bytes a second (bindfs, root)."""
    place = [str(folder), str(folder)]
    subprocess.run(["bindfs", "-o", "nonempty", f"--write-rate={bytes_a_second}", *place], check=True)


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
