"""The Ray session a stage runs in: the cluster that is there, or a private one on this machine."""

import logging
import os
import secrets
from typing import Any

import ray

from cluster.errors import StageError


def connect() -> None:
    """Join the cluster of RAY_ADDRESS or of a local `ray start`, else start a private session on this machine."""
    if ray.is_initialized():
        return
    for name in ("ray.data", "ray._private.authentication"):  # plans and hints that are no news to the user
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **quiet)
    except ConnectionError as error:
        if "RAY_ADDRESS" in os.environ:
            raise StageError(f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {error}") from None
        _start_private_session(quiet)


def _start_private_session(quiet: dict[str, Any]) -> None:
    # Ray guards a private session by a token. One of this process alone leaves no token file in the home folder,
    # which would switch a later `ray start` to token mode by surprise.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # With as many workers as CPUs Ray Data gets none and waits for ever; CPUs are only Ray's admission tickets.
    ray.init(num_cpus=max(8, os.cpu_count() or 1), include_dashboard=False, **quiet)


def require(workers: int, cpus_each: float, gpus_each: float) -> None:
    """Raise StageError when the cluster as it stands, with no autoscaler to ask, cannot hold `workers`."""
    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, each in (("CPU", cpus_each), ("GPU", gpus_each)):
        if workers * each > have.get(name, 0) and not _autoscales():
            raise StageError(
                f"{workers} workers need {workers * each:g} {name}, the Ray cluster has {have.get(name, 0):g}; "
                f"lower --workers or add nodes"
            )


def _autoscales() -> bool:
    """Whether this is a cluster of KubeRay or the Ray autoscaler, which may grow when asked."""
    return "RAY_CLUSTER_NAME" in os.environ or "KUBERAY_GEN_RAY_START_CMD" in os.environ
