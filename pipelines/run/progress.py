"""Training to look at: metrics.jsonl and TensorBoard from the worker, a bar at the driver."""

import json
import shutil
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 20  # without a terminal, a bar becomes lines
DEV_METRICS = {"dev_loss": "dev", "dev_exact_match": "exact match", "dev_f1": "F1"}
BESIDE_STEPS = ("evaluating_seconds", "answering_seconds", "saving_seconds", "starting_seconds", "lost_seconds")
"""What workers do beside the steps' own `seconds`; lost are steps that a fault had computed again."""


class MetricsLog:
    """The first worker's record of every step, as JSON lines and for TensorBoard; goes on after a restart.

    A worker on a node that is cut off does not know that another has its place. Whoever came last writes: from then
    on an older one's `begin` fails, and what it writes after its `begin` goes to a file without a name.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for older in folder.glob("metrics.*.partial"):
            older.unlink(missing_ok=True)
        self._folder, self._rewritten = folder, folder / f"metrics.{uuid.uuid4().hex}.partial"
        self._rewritten.touch()

    def begin(self, step: int, workers: int, checkpoint: Path | None = None) -> None:
        """Go on behind `step`. What later steps had taken, which are computed again, is counted as lost to the next.

        Steps that are not here are in `checkpoint`, by `copy_to`. FileNotFoundError if another worker has come since.
        """
        path = self._folder / FILE
        # Steps after the checkpoint are computed again: the curve must hold each step once.
        rows, saved = _rows(path), _rows(checkpoint / FILE) if checkpoint else []
        here = {row["step"] for row in rows}
        missing = [row for row in saved if row["step"] not in here]
        kept = sorted(missing + [row for row in rows if row["step"] <= step], key=lambda row: row["step"])
        lost = sum(held_seconds(row) * row["workers"] for row in rows if row["step"] > step)
        if lost:
            kept.append({"step": step + 1, "workers": workers, "lost_seconds": lost / workers})
        self._file = self._rewritten.open("r+", encoding="utf-8", buffering=1)  # makes no file where there is none
        self._file.writelines(json.dumps(row) + "\n" for row in kept)
        self._file.flush()
        self._rewritten.replace(path)  # a worker killed in between must not leave a curve that has lost its beginning
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)
        for row in missing:
            self._draw(row)

    def write(self, metrics: dict[str, Any]) -> None:
        """Record one step, or more of it: lines of the same step are one row to those who read."""
        self._file.write(json.dumps(metrics) + "\n")
        self._draw(metrics)

    def copy_to(self, checkpoint: Path) -> None:
        """Let the curve so far go where a checkpoint goes: the run's own folder may be lost."""
        shutil.copyfile(self._folder / FILE, checkpoint / FILE)

    def _draw(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, metrics["step"])
        self._board.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics file that are done, a row for each."""
    return [row for row in _rows(path) if "loss" in row]


def _rows(path: Path) -> list[dict[str, Any]]:
    """What is known of each step. A killed worker may have left half a line."""
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        if line.endswith("}\n"):
            more = json.loads(line)
            row = rows.setdefault(more["step"], {})
            row |= more | {name: row[name] + more[name] for name in BESIDE_STEPS if name in row and name in more}
    return list(rows.values())


def held_seconds(row: dict[str, Any]) -> float:
    """How long a row's step held its workers, with all that was done beside it."""
    return float(row.get("seconds", 0) + sum(row.get(name, 0) for name in BESIDE_STEPS))


def mean_utilisation(rows: list[dict[str, Any]]) -> float | None:
    """Of the bf16 matrix roof over those steps; None where a device's roof is not known."""
    known = [row for row in rows if "utilisation" in row]
    seconds = sum(row["seconds"] for row in known)
    return sum(row["utilisation"] * row["seconds"] for row in known) / seconds if known else None


class LossBoard:
    """A progress bar beside `trainer.fit()`: follows the metrics file in a thread of the driver."""

    def __init__(self, path: Path, steps: int) -> None:
        self._path, self._steps = path, steps
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "LossBoard":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        terminal = sys.stdout.isatty()
        columns = (
            SpinnerColumn(),
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
        )
        last_line = time.monotonic()
        with Progress(*columns, disable=not terminal) as progress:
            task = progress.add_task("starting workers", total=self._steps)
            stopping = False
            while not stopping:
                stopping = self._stop.wait(1.0)
                rows = read_metrics(self._path)
                if not rows:
                    continue
                done, line = rows[-1]["step"], describe(rows, self._steps)
                progress.update(task, completed=done, description=line)
                if not terminal and (stopping or time.monotonic() - last_line > SECONDS_BETWEEN_LINES):
                    print(f"train: step {done}/{self._steps} {line}", flush=True)
                    last_line = time.monotonic()


def describe(rows: list[dict[str, Any]], steps: int) -> str:
    """Means of the last ten steps, and how long the rest will take."""
    recent = rows[-10:]
    loss, seconds, tokens = (sum(row[name] for row in recent) for name in ("loss", "seconds", "tokens"))
    last = {name: row[name] for row in rows for name in DEV_METRICS if name in row}
    dev = "".join(f" {DEV_METRICS[name]} {value:.3f}" for name, value in last.items())
    between = sum(row.get(name, 0) for row in rows for name in BESIDE_STEPS[:3]) / len(rows)
    left = timedelta(seconds=round((steps - rows[-1]["step"]) * (seconds / len(recent) + between)))
    waiting = sum(row["waiting_seconds"] for row in recent) / seconds
    utilisation = f"{used:.0%} of the bf16 roof, " if (used := mean_utilisation(recent)) is not None else ""
    return (
        f"loss {loss / len(recent):.3f}{dev}, {tokens / seconds:,.0f} tokens/s, "
        f"{utilisation}waiting for data {waiting:.0%}, {left} left"
    )
