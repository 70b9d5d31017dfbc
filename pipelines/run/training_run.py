"""A plan's run by Ray Train: what it is told, and what is said of the faults that end it."""

import os
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster.errors import StageError
from pipelines.run.callbacks import GOES_ON, FreshCount, LastingErrors, ListCopy
from pipelines.run.checkpoint_store import CheckpointStore
from pipelines.run.progress import LossBoard, read_metrics
from pipelines.run.trackers import tracked
from pipelines.run.training_config import TrainConfig
from pipelines.run.training_plan import TrainingPlan
from pipelines.run.worker import train_worker

SECONDS_BETWEEN_RESIZES = 20.0
"""How long a new node may stand idle beside a run of --min_workers; each change of size restarts the workers."""


def run_plan(config: TrainConfig, plan: TrainingPlan, store: CheckpointStore, gpus: int) -> ray.train.Result:
    """Train to the plan's end, from the last checkpoint if there is one. Raises StageError if it cannot go on."""
    folder = Path(plan.folder)
    _tell_where_it_begins(folder, store)
    store.remove_orphans()
    trainer = _trainer(config, plan, store, gpus)
    try:
        with LossBoard(folder / "metrics.jsonl", plan.steps), tracked(config.trackers, folder, config.model_dump()):
            return trainer.fit()
    except SystemExit:  # Ray Train's own answer to Ctrl-C, after it has ended the workers
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        if isinstance(lasting := getattr(error, "controller_failure", None), StageError):
            raise lasting from error
        raise StageError(f"training failed: {_cause(error)}; {GOES_ON}") from error
    except ray.exceptions.RayActorError as error:
        if "CheckpointManagerInitializationError" in str(error):
            raise StageError(
                f"the list of checkpoints in {store.folder} cannot be used: {_cause(error)}; move that folder away, "
                f"and the same command begins again"
            ) from error
        raise StageError(f"training failed: Ray Train's controller died; {GOES_ON}") from error


def _tell_where_it_begins(folder: Path, store: CheckpointStore) -> None:
    kept, rows = store.mend_list(), read_metrics(folder / "metrics.jsonl")
    done = rows[-1]["step"] if rows else 0
    if kept is not None:
        print(
            f"train: resuming: an earlier run of this reached step {max(done, kept)}; "
            f"going on from its checkpoint of step {kept}"
        )
    elif done:
        print(
            f"train: an earlier run of this reached step {done}, but {store.folder} has no checkpoint: beginning again"
        )


def _trainer(config: TrainConfig, plan: TrainingPlan, store: CheckpointStore, gpus: int) -> TorchTrainer:
    # Between two looks, a worker's end goes unnoticed and a checkpoint that has been uploaded does not count yet.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")  # some clouds give no more than 30 s
    callbacks: list[Any] = [LastingErrors(plan.recompute), ListCopy(store)]
    if config.min_workers:
        callbacks.append(FreshCount())
        # A start on a node that is gone is given up sooner. Nodes that are there give their CPUs within a second;
        # another timeout is only another try.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    return TorchTrainer(
        train_worker,
        train_loop_config=plan.model_dump(),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # to mypy, `ray.train` has its older classes
            num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,  # type: ignore[arg-type]
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1},
            elastic_resize_monitor_interval_s=SECONDS_BETWEEN_RESIZES,
        ),
        run_config=RunConfig(
            name=store.run,
            storage_path=store.address,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.keep_checkpoints,
                checkpoint_score_attribute="dev_loss",
                checkpoint_score_order="min",
            ),
            callbacks=callbacks,
        ),
    )


def _cause(error: BaseException) -> str:
    """The last line of the first failed worker's error."""
    failures = getattr(error, "worker_failures", None) or {0: error.__cause__ or error}
    lines = [line.strip() for line in str(next(iter(failures.values()))).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
