"""What Ray Train calls on each worker, one process per GPU: when to measure, when to save, what to tell of it."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import get_device

from pipelines.compute.exchange import any_worker
from pipelines.run.progress import MetricsLog
from pipelines.run.saving import Saver, Urgency
from pipelines.run.training_plan import TrainingPlan
from pipelines.run.training_steps import Training, never


def train_worker(settings: dict[str, Any]) -> None:
    """Train this worker's share from the last checkpoint to the plan's last step."""
    started = time.monotonic()
    plan = TrainingPlan(**settings)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    log = MetricsLog(Path(plan.folder)) if rank == 0 else None  # before the model's minutes: a later worker must win
    checkpoint = ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
        start = Path(folder) if folder else None
        training = Training(plan, rank, world, get_device(), start)
        if log:
            log.begin(training.step, world, start)
    once = {"starting_seconds": time.monotonic() - started}

    def noticed() -> bool:
        """Whether a node is about to be taken away. Not all workers are told at the same moment."""
        return any_worker(ray.train.get_preemption_info() is not None, training.device)

    saver, warned = Saver(training.save, plan.folder, rank, training.device), False
    put_off = training.due  # by a notice, until after the restart, or until nothing else is left to do
    while put_off or not training.done:
        metrics = once | ({"step": training.step} if put_off else training.advance())
        warning = noticed()
        if training.due and (put_off or not warning):
            stop = never if put_off else noticed
            metrics |= training.evaluate(stop) | training.answer_questions(stop)
            warning = warning or noticed()
        if urgency := _urgency(training, "dev_loss" in metrics, warning > warned):
            metrics |= saver.save(urgency)
        if log:
            log.write(metrics)  # before the checkpoint counts: a curve may lose its end, but no step before it
        saver.report(metrics, log)
        once, warned, put_off = {}, warning, training.due and training.step >= plan.steps


def _urgency(training: Training, evaluated: bool, warned: bool) -> Urgency | None:
    """Whether a checkpoint is due now, and what it may wait for."""
    if training.done or warned:
        return "at once"
    if evaluated and training.plan.keep == "best" and training.dev_losses[-1] == min(training.dev_losses):
        return "in turn"
    return "when idle" if evaluated or training.step % training.plan.save_every == 0 else None
