"""When a training writes a checkpoint, and how it is handed to Ray Train, which uploads it while training goes on."""

import shutil
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode

from pipelines.compute.exchange import any_worker
from pipelines.run.progress import MetricsLog

Urgency = Literal["when idle", "in turn", "at once"]
"""Behind a checkpoint that is still uploading: not at all, once that counts, or without waiting for it."""
# Checkpoints are kept by their dev loss. Ray Train writes infinity as null, which it cannot read.
UNKNOWN = sys.float_info.max


class Saver:
    """A training's checkpoints. All workers call the same methods in the same order; the first one writes.

    Training does not stand still for a slow store: a checkpoint that falls due during an upload is skipped. Only the
    best one of a run that is to keep it waits, and training with it. So a fault costs the steps since the last
    checkpoint that counts: those of one upload and one interval at most.
    """

    def __init__(self, write: Callable[[Path | None], None], run_folder: str, rank: int, device: torch.device) -> None:
        """`write` puts a checkpoint into a folder; with None it takes part in what another worker writes."""
        self._write, self._rank, self._device = write, rank, device
        self._counts = threading.Event()
        """Whether the last checkpoint is in Ray Train's list, so that a restart would find it."""
        self._counts.set()
        # Named after the run: what a killed worker left goes when the next one begins. Ray Train removes the others.
        self._prefix = f"checkpoint-{zlib.crc32(run_folder.encode()):08x}-"
        if rank == 0:
            for left in Path(tempfile.gettempdir()).glob(f"{self._prefix}*"):
                shutil.rmtree(left, ignore_errors=True)
        self._folder: str | None = None
        self._written = False

    def save(self, urgency: Urgency) -> dict[str, float]:
        """Write a checkpoint where it can be handed over from, or skip it; returns what is to be recorded of it."""
        started = time.monotonic()
        if urgency == "when idle" and any_worker(not self._counts.is_set(), self._device):
            return {}
        if urgency == "in turn":
            self._counts.wait()
        if self._rank == 0:
            self._folder = tempfile.mkdtemp(prefix=self._prefix)
        self._write(Path(self._folder) if self._folder else None)
        self._written = True
        return {"saving_seconds": time.monotonic() - started}

    def report(self, metrics: dict[str, float], log: MetricsLog | None) -> None:
        """Hand over what `save` wrote, if it did, and the curve with it."""
        if not self._written:
            return
        if self._folder and log:
            log.copy_to(Path(self._folder))
        ray.train.report(
            {"dev_loss": UNKNOWN} | metrics,
            checkpoint=Checkpoint.from_directory(self._folder) if self._folder else None,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        )
        self._written = False
        self._counts = threading.Event()
        threading.Thread(target=self._wait, args=(self._counts,), daemon=True).start()

    def _wait(self, counts: threading.Event) -> None:
        """In a thread: the coordinator that is asked may itself be waiting for the store."""
        try:
            ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
        finally:
            counts.set()
