"""The application under `serve run`, as a process of its own on the session's Ray."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
import torch
import yaml
from ray import serve

from benchmarks.fault_places import free_port
from benchmarks.processes import below
from chatglm3 import load_model, load_tokenizer
from cluster.storage import Receipt, publish
from tests.waiting import wait_for

PROJECT = Path(__file__).resolve().parents[1]
SERVE = Path(sys.executable).with_name("serve")


def write_endless_model(tiny: Path, folder: Path) -> Path:
    """A native folder of the tiny model, made unable to end an answer by itself."""
    model = load_model(tiny, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[list(load_tokenizer(tiny).stop_ids)] = 0
    with publish(folder, Receipt("merge", {})) as partial:
        model.save_pretrained(partial)
        shutil.copy(tiny / "tokenizer.model", partial)
    return folder


@contextmanager
def served(config: dict[str, Any], folder: Path) -> Iterator[str]:
    """The URL of what a Serve config serves, on a free port. `folder` gets the config file and the log."""
    config["http_options"] = {"host": "127.0.0.1", "port": (port := free_port())}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("wb") as log:
        address = ray.get_runtime_context().gcs_address
        command = [SERVE, "run", "--address", address, folder / "serve.yaml"]
        process = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log)
    try:
        wait_for(lambda: _is_up(f"http://127.0.0.1:{port}"), 240, lambda: (folder / "log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # seen once, with an idle replica; why, is not known
            process.kill()
            serve.shutdown()
        # The next one would be ignored before: a replica may take its graceful_shutdown_timeout_s.
        wait_for(lambda: not below(os.getpid(), "ray::ServeController"), 180)


def replicas(application: str, deployment: str = "") -> set[int]:
    """Process ids of the replicas of an application, or of one of its deployments."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        title = f"ray::ServeReplica:{application}:{deployment}"
        if any(part.startswith(title) for part in process.info["cmdline"] or ()):
            found.add(process.pid)
    return found


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=30).json() == {"status": "ok"}
    except (httpx.HTTPError, ValueError):
        return False
