"""What Ray Train asks us in its controller, whose start waits for what is imported here: no model, no adapters."""

import contextlib
import errno
import sys
from typing import Any

import ray.train
import torch

from chatglm3.errors import ModelError
from cluster.errors import StageError
from pipelines.run.checkpoint_store import CheckpointStore

GOES_ON = "the same command goes on from the last checkpoint"


class ListCopy(ray.train.UserCallback):
    """Lets the copy of the list of checkpoints follow it. Ray Train has written the list before it calls this."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """See UserCallback; called once for all workers."""
        try:
            self._store.copy_list()
        except OSError as error:  # training has its checkpoints; only a list that is torn now would cost them
            print(
                f"train: warning: no copy of the list of checkpoints: {' '.join(str(error).split())}", file=sys.stderr
            )


class FreshCount(ray.train.UserCallback):
    """Counts the nodes anew when workers failed. What Ray Train knows of them is up to 20 s old, which no setting
    changes: it would try to start workers on the node that died until then.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ask Ray's coordinator, which Ray Train asks next, to look."""
        with contextlib.suppress(ImportError, ray.exceptions.RayError):  # it would only be slower
            from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
                get_or_create_autoscaling_coordinator,
            )

            coordinator = get_or_create_autoscaling_coordinator()
            ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=5)


class LastingErrors(ray.train.UserCallback):
    """Ends the run at an error that new workers would only meet again; Ray Train tries again after every error."""

    def __init__(self, recompute: bool) -> None:
        self._recompute = recompute

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise StageError, which ends the run, if all of the workers' errors are such."""
        errors = [getattr(error, "_base_exc", error) for error in worker_exceptions.values()]
        if not all(map(_lasts, errors)):
            return
        error, remedy = errors[0], f"mend that, and {GOES_ON}"
        if isinstance(error, FloatingPointError):
            remedy = "look at these rows, or lower --learning_rate"
        if isinstance(error, torch.OutOfMemoryError):
            remedy = "give smaller --block_tokens, with which it begins again"
            if not self._recompute:
                remedy = f"give --recompute true, and {GOES_ON}; or {remedy.removeprefix('give ')}"
        raise StageError(f"training failed: {' '.join(str(error).split())}; {remedy}")


def _lasts(error: Exception) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    known = (StageError, ModelError, FloatingPointError, ValueError, torch.OutOfMemoryError)
    return full or isinstance(error, known)
