"""The Ray session a stage runs in: the cluster that is there, or a private one on this machine."""

import logging
import os
import secrets
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from cluster.errors import StageError


def connect() -> None:
    """Join the cluster of RAY_ADDRESS or of a local `ray start`, else start a private session on this machine."""
    if ray.is_initialized():
        return
    for name in ("ray.data", "ray._private.authentication"):  # plans and hints that are no news to the user
        logging.getLogger(name).setLevel(logging.ERROR)
    # It tells of a way to pass `max_restarts` to Ray Data that does not exist yet.
    warnings.filterwarnings("ignore", message="`ray_remote_args", category=RayDeprecationWarning)
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS") or _local_cluster()
    if address is None:
        _start_private_session(quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError) as error:
        raise StageError(f"no Ray cluster answers at {address}: {error}; correct or unset RAY_ADDRESS") from None
    except (RuntimeError, RayError) as error:  # another version of Ray or Python, or a token that is missing or wrong
        raise StageError(f"the Ray cluster at {address} refuses this program: {error}") from None


def _local_cluster() -> str | None:
    """Address of the cluster that `ray start --head` started on this machine, if it is up.

    Not Ray's "auto", which also joins other people's private sessions, whose token we lack.
    """
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    try:
        address = file.read_text().strip()
        host, port = address.rsplit(":", 1)
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):  # no such file, or left by a cluster that was killed
        return None
    return address


def _start_private_session(quiet: dict[str, Any]) -> None:
    # Ray guards a private session by a token. One of this process alone leaves no token file in the home folder,
    # which would switch a later `ray start` to token mode by surprise.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with _environment("RAY_API_SERVER_ADDRESS", _NO_API):
        # With as many workers as CPUs Ray Data gets none and waits for ever; CPUs are only Ray's admission tickets.
        ray.init(num_cpus=max(8, os.cpu_count() or 1), include_dashboard=False, **quiet)


# Ray Train ends a run whose controller the dashboard does not know. A private session has no dashboard, and asks any
# other cluster at port 8265 unless it is told of another: here of one where nobody answers, which ends nothing.
_NO_API = "http://127.0.0.1:9"


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable for the processes that are started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def gpus_per_worker(use_gpu: bool | None) -> int:
    """GPUs of a worker, 1 or 0: as asked or, unless asked, 1 where the cluster has GPUs now."""
    return int(bool(ray.cluster_resources().get("GPU")) if use_gpu is None else use_gpu)


def require(workers: int, cpus_each: float, gpus_each: float) -> None:
    """Raise StageError when the cluster as it stands, with no autoscaler to ask, cannot hold `workers`."""
    have = ray.cluster_resources()
    for name, each in (("CPU", cpus_each), ("GPU", gpus_each)):
        if workers * each > have.get(name, 0) and not _autoscales():
            raise StageError(
                f"{workers} workers need {workers * each:g} {name}, the Ray cluster has {have.get(name, 0):g}; "
                f"lower --workers or add nodes{', or give --use_gpu false' if name == 'GPU' else ''}"
            )
    free, needed = ray.available_resources().get("GPU", 0), workers * gpus_each
    if free < needed <= have.get("GPU", 0):  # not where an autoscaler is to bring them
        print(f"waiting: {needed:g} GPU needed, others hold all but {free:g}", file=sys.stderr)


def _autoscales() -> bool:
    """Whether this is a cluster of KubeRay or the Ray autoscaler, which may grow when asked."""
    return "RAY_CLUSTER_NAME" in os.environ or "KUBERAY_GEN_RAY_START_CMD" in os.environ
