"""What Ray adds to a training step on this machine: the same steps of the tiny model bare and through TorchTrainer.

    python -m benchmarks.ray_cost                  # two minutes on two cores
    python -m benchmarks.ray_cost --steps 100

`step` is what a worker computes (Training.advance), exchanges with other workers included; `beside it`
is all from the end of one step to the beginning of the next: metrics.jsonl and TensorBoard in every row, and under
Ray its question whether a node will be taken away, in which all workers take part. Checkpoints are written at the end
only. Medians, and the 95th percentile in brackets, in milliseconds; the first ten steps warm up.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.train_command import SETTINGS, prepare_rows
from cluster import session, storage
from pipelines.model_folders import open_model
from pipelines.run.planning import make_plan
from pipelines.run.progress import MetricsLog, read_metrics
from pipelines.run.training_steps import Training
from pipelines.training import TrainConfig, train

WARM_UP = 10


def settings(steps: int) -> dict[str, object]:
    """A step is one block for each of two workers."""
    once = {"max_steps": WARM_UP + steps, "epochs": 1000.0, "eval_steps": 10**6, "save_steps": 10**6, "score_rows": 0}
    return SETTINGS | once


def train_bare(data: str, folder: Path, steps: int) -> Path:
    """The steps without Ray; the folder of their metrics."""
    config = TrainConfig(data=data, **settings(steps))
    plan = make_plan(config, open_model("tiny", "--base"), storage.open_folder(data, "prepare"), folder / "run", 0)
    training = Training(plan, 0, 1, torch.device("cpu"))
    log = MetricsLog(folder / "run")
    log.begin(0, workers=1)
    while not training.done:
        log.write(training.advance())
    return folder / "run"


def train_by_ray(data: str, folder: Path, steps: int, workers: int) -> Path:
    """The same through TorchTrainer."""
    return Path(train(TrainConfig(data=data, out=str(folder / "adapter"), workers=workers, **settings(steps))))


def line(name: str, folder: Path) -> str:
    """A line of the table, from a folder with metrics.jsonl and TensorBoard's file, which has the time of day."""
    inside = np.array([row["seconds"] for row in read_metrics(folder / "metrics.jsonl")])[1:]
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    beside = np.diff([event.wall_time for event in board.Scalars("epoch")]) - inside
    # The last step is followed by what ends a run.
    columns = (1000 * times[WARM_UP - 1 : -1] for times in (inside, beside))
    return f"| {name} | " + " | ".join(f"{np.median(c):.1f} ({np.quantile(c, 0.95):.1f})" for c in columns) + " |"


def main() -> None:
    """Read the command line, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="steps that count (default: 60)")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = prepare_rows(folder)
        session.connect()
        lines = [line("bare", train_bare(data, folder / "bare", steps))]
        for workers in (1, 2):
            name = f"TorchTrainer, {workers} worker{'s' * (workers > 1)}"
            lines.append(line(name, train_by_ray(data, folder / str(workers), steps, workers)))
    print("| | step, ms | beside it, ms |\n|---|--:|--:|", *lines, sep="\n")


if __name__ == "__main__":
    main()
