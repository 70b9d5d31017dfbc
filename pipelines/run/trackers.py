"""Training's metrics in MLflow or Weights & Biases too, when asked for; whatever befalls these, the run goes on.

The driver sends what stands in metrics.jsonl, so that no worker waits for a server or needs its key. Where and under
which name is said by the packages' own variables: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, WANDB_API_KEY,
WANDB_PROJECT, WANDB_MODE and so on.
"""

import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from cluster.errors import StageError
from pipelines.run.progress import read_metrics

TrackerName = Literal["mlflow", "wandb"]
PACKAGES: dict[TrackerName, str] = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_TO_FINISH = 20.0
ROWS_AT_ONCE = 50  # MLflow takes a thousand values in one request
Settings = Mapping[str, Any]


def require(names: Sequence[TrackerName]) -> None:
    """Raise StageError if the package of a tracker is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise StageError(f"--trackers {name}: it is not installed; pip install {PACKAGES[name]}, or leave it out")


@contextmanager
def tracked(names: Sequence[TrackerName], folder: Path, settings: Settings) -> Iterator[None]:
    """Send the metrics of a run folder to the trackers while it trains. Resumed, it goes on in the same runs there."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_Follower(name, folder, settings))
        yield


class Tracker(Protocol):
    """One run in a tracker, made or opened again by its id; its methods may raise anything."""

    run_id: str

    def log(self, rows: Sequence[dict[str, float]]) -> None:
        """Record steps: the metrics of each, `step` among them."""

    def finish(self, succeeded: bool) -> None:
        """Mark the run as ended."""


class _Mlflow:
    def __init__(self, run_id: str | None, folder: Path, settings: Settings) -> None:
        import mlflow

        self._api = mlflow
        self.run_id: str = mlflow.start_run(run_id=run_id, run_name=None if run_id else folder.name).info.run_id
        try:
            if not run_id:
                mlflow.log_params(dict(settings))
        except BaseException:
            mlflow.end_run("FAILED")  # or the next try is told that a run is active already
            raise

    def log(self, rows: Sequence[dict[str, float]]) -> None:
        now = int(1000 * time.time())
        metrics = [
            self._api.entities.Metric(name, value, now, int(row["step"]))
            for row in rows
            for name, value in row.items()
            if name != "step"
        ]
        self._api.MlflowClient().log_batch(self.run_id, metrics)

    def finish(self, succeeded: bool) -> None:
        self._api.end_run("FINISHED" if succeeded else "FAILED")


class _Wandb:
    def __init__(self, run_id: str | None, folder: Path, settings: Settings) -> None:
        import wandb

        quiet = wandb.Settings(
            silent=True, console="off", init_timeout=SECONDS_TO_FINISH, finish_timeout=SECONDS_TO_FINISH
        )
        wandb.setup(settings=quiet)  # or, without a key, it would ask for one on the terminal of the progress bar
        self._run = wandb.init(
            id=run_id, name=folder.name, resume="allow", dir=folder, config=dict(settings), settings=quiet
        )
        self.run_id: str = self._run.id

    def log(self, rows: Sequence[dict[str, float]]) -> None:
        for row in rows:
            step = int(row["step"])
            self._run.log({name: value for name, value in row.items() if name != "step"}, step=step, commit=True)

    def finish(self, succeeded: bool) -> None:
        self._run.finish(exit_code=int(not succeeded))


_TRACKERS: dict[TrackerName, Callable[[str | None, Path, Settings], Tracker]] = {"mlflow": _Mlflow, "wandb": _Wandb}


class _Follower:
    """A thread that sends a run's new rows to one tracker, each step once; after a failure it tries again."""

    def __init__(self, name: TrackerName, folder: Path, settings: Settings) -> None:
        self._name, self._folder, self._settings = name, folder, settings
        self._state = folder / f"{name}.json"
        state = json.loads(self._state.read_text(encoding="utf-8")) if self._state.is_file() else {}
        self._run_id: str | None = state.get("run")
        self._sent: int = state.get("step", 0)
        self._tracker: Tracker | None = None
        self._warned = self._succeeded = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._succeeded = kind is None
        self._stop.set()
        self._thread.join(1.5 * SECONDS_TO_FINISH)
        if self._thread.is_alive():
            self._warn("it takes too long to answer")

    def _follow(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(SECONDS_BETWEEN_LOOKS)
            self._try(self._send)
        self._try(self._finish)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # there is no list of what these packages, their servers and networks can raise
            self._warn(" ".join(f"{type(error).__name__}: {error}".split()))

    def _finish(self) -> None:
        if self._tracker:
            self._tracker.finish(self._succeeded)

    def _send(self) -> None:
        rows = [row for row in read_metrics(self._folder / "metrics.jsonl") if row["step"] > self._sent]
        if not self._stop.is_set():
            rows = rows[:-1]  # the newest is not whole before the next has come: its dev loss may have been put off
        if not rows:
            return
        self._tracker = self._tracker or _TRACKERS[self._name](self._run_id, self._folder, self._settings)
        self._run_id = self._tracker.run_id
        self._keep()
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            self._tracker.log(some)
            self._sent = some[-1]["step"]
            self._keep()

    def _keep(self) -> None:
        partial = self._state.with_suffix(".partial")
        partial.write_text(json.dumps({"run": self._run_id, "step": self._sent}), encoding="utf-8")
        os.replace(partial, self._state)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            print(
                f"warning: {self._name} lacks metrics, which {self._folder}/metrics.jsonl has: {reason}",
                file=sys.stderr,
            )
        self._warned = True
