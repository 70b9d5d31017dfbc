"""Many short trainings in, the best settings out: rank, learning rate and layers, by Ray Tune's ASHA."""

import csv
import hashlib
import itertools
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from cluster import session, storage
from cluster.config import Config
from cluster.errors import StageError
from pipelines.compute.block_files import BlockFile
from pipelines.model_folders import open_model
from pipelines.one_or_more import ONE_OR_MORE
from pipelines.report_page import as_svg, drawing, grid, write_page
from pipelines.run.memory import CHOICE
from pipelines.run.planning import make_plan
from pipelines.run.training_config import TrainConfig
from pipelines.run.training_plan import TrainingPlan
from pipelines.run.training_steps import Training

TARGETS = {
    "qkv": ["q_proj", "k_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
}
EVALUATIONS = 8  # of each trial, at which it may be stopped


class SweepConfig(Config):
    """Try settings of train on the same rows and write the best as run.yaml.

    Each trial is one worker with one GPU, if there are any, and holds the whole base, whatever --train.strategy says;
    as many run at once as the cluster has room for. After an eighth of its steps, and then at each evaluation, a trial
    goes on only if its dev loss is among the best third of those that came as far (ASHA, arXiv:1810.05934). Neither
    workers nor strategies nor GPUs change a loss curve, so the best settings are the best on any cluster.
    """

    train: TrainConfig = TrainConfig()
    """Settings of all trials, as of the train stage; --train.data and --train.base above all."""
    ranks: Annotated[list[int], ONE_OR_MORE] = Field([8, 16, 32], min_length=1)
    """Ranks to try; alpha is twice the rank."""
    learning_rates: Annotated[list[float], ONE_OR_MORE] = Field([3e-4, 1e-3, 3e-3], min_length=1)
    """Learning rates to try."""
    targets: Annotated[list[Literal["qkv", "attention", "all"]], ONE_OR_MORE] = Field(["qkv", "all"], min_length=1)
    """Layers with adapters to try."""
    trials: int = Field(8, ge=1)
    """How many combinations, drawn at random, each at most once."""
    at_once: int = Field(0, ge=0)
    """Trials at a time; 0: as many as the cluster has room for."""
    out: str = "out/sweep"
    """Folder to write: run.yaml, trials.csv, report.html."""


def sweep(config: SweepConfig) -> str:
    """Find good settings and return the folder that holds them as run.yaml."""
    if config.train.trackers:
        raise StageError("--train.trackers: trials are not tracked; leave it out, and give it to train with run.yaml")
    data = storage.open_folder(config.train.data, "prepare")
    base = open_model(config.train.base, "--train.base")
    storage.check_output(config.out, "sweep", (config.train.data, base.location))
    session.connect()
    gpus = session.gpus_per_worker(config.train.use_gpu)
    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()
    run = Path(f"{Path(config.out)}.run").resolve() / f"sweep-{digest[:16]}"
    (run / CHOICE).unlink(missing_ok=True)  # nothing is resumed, and GPUs or rows may be others than the last time
    largest: dict[str, Any] = {
        "rank": max(config.ranks),
        "targets": max(config.targets, key=lambda name: len(TARGETS[name])),
    }
    alone: dict[str, Any] = {"workers": 1, "min_workers": None, "strategy": "ddp", "score_rows": 0}
    alone["lora"] = config.train.lora.model_copy(update=_lora(largest))  # which every trial must have memory for
    plan = make_plan(config.train.model_copy(update=alone), base, data, run, gpus)
    if not BlockFile(plan.dev_blocks).target_counts.any():
        raise StageError(f"--train.data {config.train.data} has no dev rows to judge by; prepare with a --dev_share")
    receipt = storage.receipt_of("sweep", config, inputs={config.train.data: data.digest})
    results = sorted(_run_trials(config, plan, run, gpus), key=lambda trial: trial["dev_loss"])
    with storage.publish(config.out, receipt) as folder:
        _write(folder, config, plan.block_tokens, results)
        receipt.counts.update(trials=len(results), dev_loss=results[0]["dev_loss"])
    best = results[0]
    found = f"rank {best['rank']}, learning rate {best['learning_rate']:g}, {best['targets']}"
    print(f"sweep: best of {len(results)}: {found}, dev loss {best['dev_loss']:.4f}")
    print(f"sweep: all trials in {config.out}/report.html; next: train --config {config.out}/run.yaml")
    return config.out


def _run_trials(config: SweepConfig, plan: TrainingPlan, run: Path, gpus: int) -> Iterator[dict[str, Any]]:
    """The settings of each trial with its lowest dev loss and its (step, dev loss) points."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose first lines no setting turns off
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, plan=plan.model_dump(), on_gpu=bool(gpus)), {"cpu": 1, "gpu": gpus}
        ),
        param_space={"settings": tune.grid_search(draw_trials(config))},
        tune_config=tune.TuneConfig(
            metric="dev_loss",
            mode="min",
            scheduler=ASHAScheduler(
                time_attr="step", max_t=plan.steps, grace_period=max(1, plan.steps // EVALUATIONS), reduction_factor=3
            ),
            search_alg=BasicVariantGenerator(max_concurrent=config.at_once),
        ),
        run_config=tune.RunConfig(name="trials", storage_path=str(run), verbose=0),
    )
    grid_of_results = tuner.fit()
    if failed := grid_of_results.num_errors:
        why = " ".join(str(grid_of_results.errors[0]).split())[-300:]
        if len(grid_of_results) == failed:
            raise StageError(f"every trial failed: {why}")
        print(f"sweep: {failed} of {len(grid_of_results)} trials failed and are left out: {why}", file=sys.stderr)
    for number in range(len(grid_of_results)):
        result = grid_of_results[number]
        if result.error is None:
            assert result.config and result.metrics_dataframe is not None  # it has told of its last step at least
            points = result.metrics_dataframe[["step", "dev_loss"]].to_numpy().tolist()
            yield result.config["settings"] | {"dev_loss": min(loss for _, loss in points), "points": points}


def draw_trials(config: SweepConfig) -> list[dict[str, Any]]:
    """The combinations to try: all of them, or as many as there are to be trials, drawn by the seed."""
    names = ("rank", "learning_rate", "targets")
    every = [
        dict(zip(names, each, strict=True))
        for each in itertools.product(config.ranks, config.learning_rates, config.targets)
    ]
    return random.Random(config.train.seed).sample(every, min(config.trials, len(every)))


def _trial(config: dict[str, Any], plan: dict[str, Any], on_gpu: bool) -> None:
    """One training without checkpoints, which are cheaper to do again than to keep."""
    settings = config["settings"]
    plan = plan | {"learning_rate": settings["learning_rate"], "lora": plan["lora"] | _lora(settings)}
    device = torch.device("cuda" if on_gpu else "cpu")  # a node shows its GPUs to trials that were given none too
    training = Training(TrainingPlan(**plan), rank=0, world=1, device=device)
    every = max(1, training.plan.steps // EVALUATIONS)
    while not training.done:
        training.advance()
        if training.step % every == 0 or training.done:
            tune.report(training.evaluate() | {"step": training.step})


def _lora(settings: dict[str, Any]) -> dict[str, Any]:
    """What a trial's settings are as train's."""
    return {"rank": settings["rank"], "alpha": 2 * settings["rank"], "targets": TARGETS[settings["targets"]]}


def _write(folder: Path, config: SweepConfig, block_tokens: int, results: list[dict[str, Any]]) -> None:
    """run.yaml of the best, trials.csv, report.html."""
    best, names = results[0], ["rank", "learning_rate", "targets", "dev_loss"]
    chosen = config.train.model_dump(exclude_unset=True, exclude={"out"})
    chosen |= {"learning_rate": best["learning_rate"], "lora": chosen.get("lora", {}) | _lora(best)}
    chosen["block_tokens"] = block_tokens  # which say how many examples a step takes
    (folder / "run.yaml").write_text(yaml.safe_dump({"train": chosen}, sort_keys=False), encoding="utf-8")
    rows = [[f"{trial[name]:.6g}" if name == "dev_loss" else trial[name] for name in names] for trial in results]
    with (folder / "trials.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    heads = ["", *(name.replace("_", " ") for name in names), "stopped at step"]
    lines = [
        [place, *row, trial["points"][-1][0]] for place, (row, trial) in enumerate(zip(rows, results, strict=True), 1)
    ]
    sections = {"Trials, the best first": grid(heads, lines), "Dev loss": _draw(folder / "trials.png", results)}
    write_page(folder / "report.html", "Sweep", sections)


def _draw(picture: Path, results: list[dict[str, Any]]) -> str:
    with drawing() as plt:
        figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
        for trial in results:
            label = f"{trial['rank']}, {trial['learning_rate']:g}, {trial['targets']}"
            axes.plot(*zip(*trial["points"], strict=True), "o-", label=label, alpha=0.8, markersize=3)
        axes.set(xlabel="step", ylabel="dev loss", yscale="log", title="rank, learning rate, layers")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(picture, dpi=120)
        page = as_svg(figure)
        plt.close(figure)
        return page
