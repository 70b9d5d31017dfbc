"""Instruction rows and a base model in; a LoRA adapter out, trained on any number of workers."""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint

from cluster import session, storage
from cluster.errors import StageError
from pipelines.model_folders import ModelFolder, open_model
from pipelines.run.checkpoint_store import CheckpointStore
from pipelines.run.memory import CHOICE
from pipelines.run.planning import make_plan
from pipelines.run.trackers import require
from pipelines.run.training_config import BESIDE_THE_CURVE, TrainConfig
from pipelines.run.training_report import write_training_report
from pipelines.run.training_run import run_plan


def train(config: TrainConfig) -> str:
    """Fine-tune an adapter and return its folder."""
    started = time.monotonic()
    data, base = _inputs(config)
    storage.check_output(config.out, "train", (config.data, base.location))
    base_digest = base.weights_digest
    digest = _digest(config, base_digest, data)
    if _finished(config, digest):
        print(f"train: {config.out} is finished already with this data and these settings; nothing to do")
        return config.out
    run = Path(f"{Path(config.out)}.run").resolve() / f"run-{digest[:16]}"
    store = CheckpointStore(_store_address(config, run), run.name)
    session.connect()
    gpus = session.gpus_per_worker(config.use_gpu)
    session.require(config.min_workers or config.workers, 1, gpus)
    store.fetch(run / CHOICE)
    plan = make_plan(config, base, data, run, gpus)
    store.keep(run / CHOICE)
    best, metrics = _published(plan.keep, run_plan(config, plan, store, gpus))
    facts = {
        "base": base.location,
        "base_digest": base_digest,
        "prompt_format": config.prompt_format,
        "prompt_digest": data.receipt.facts["prompt_digest"],
        "preset": data.receipt.facts["preset"],
        "tokenizer": base.tokenizer,
        "dataset": data.receipt.facts["dataset"],
        "run": digest,
    }
    receipt = storage.receipt_of("train", config, inputs={config.data: data.digest}, facts=facts)
    receipt.counts["adapter_of_step"] = metrics["step"]
    with best.as_directory() as checkpoint:
        _publish(config, Path(checkpoint) / "adapter", Path(plan.folder), receipt, gpus, started)
    _tell_of_the_end(config.out, plan.keep, receipt.counts)
    return config.out


def _publish(
    config: TrainConfig, adapter: Path, run: Path, receipt: storage.Receipt, gpus: int, started: float
) -> None:
    try:
        with storage.publish(config.out, receipt) as folder:
            shutil.copytree(adapter, folder, dirs_exist_ok=True)
            shutil.copyfile(run / "metrics.jsonl", folder / "metrics.jsonl")
            shutil.copytree(run / "tensorboard", folder / "tensorboard")
            receipt.counts.update(write_training_report(folder, config.model_dump(), gpus))
            receipt.seconds = round(time.monotonic() - started, 1)
    except OSError as error:
        # Of many files, copytree tells (from, to, why) of each.
        why = error.args[0][0][-1] if isinstance(error, shutil.Error) else error
        raise StageError(
            f"--out {config.out} cannot be written: {why}; mend that, and the same command writes it without training"
        ) from error


def _tell_of_the_end(out: str, keep: str, counts: dict[str, int | float]) -> None:
    kept, lowest = counts["adapter_of_step"], counts.get("lowest_dev_loss_at_step")
    print(f"train: {counts['steps']} steps, curves in {out}/report.html; {out} holds the adapter of step {kept}")
    if keep == "last" and lowest not in (None, kept):
        print(f"train: the dev loss was lowest at step {lowest}: the same command with --keep best takes that adapter")
    print(f"train: next: merge --adapter {out}")


def _inputs(config: TrainConfig) -> tuple[storage.Folder, ModelFolder]:
    """Data and base; raises StageError if they, or the settings, cannot be trained with."""
    data = storage.open_folder(config.data, "prepare")
    base = open_model(config.base, "--base")
    if "quantization_config" in base.config:
        raise StageError(f"--base {config.base} is quantised already; give the 16-bit model it was made from")
    if config.lora.dora and config.strategy == "zero3":
        raise StageError(
            "--lora.dora true: with --strategy zero3 no worker has a row's whole length; give zero2 or ddp"
        )
    if config.base_format == "fp8" and config.strategy == "zero3":
        raise StageError(
            "--base_format fp8: --strategy zero3 would leave it whole on every worker; give ddp, or --base_format nf4"
        )
    require(config.trackers)
    if data.receipt.facts.get("tokenizer", base.tokenizer) != base.tokenizer:
        print(
            f"warning: {config.data} was prepared with another tokenizer than {base.name}'s, so its documents were cut "
            f"to other lengths; prepare again with --tokenizer {config.base}",
            file=sys.stderr,
        )
    return data, base


def _published(keep: str, result: ray.train.Result) -> tuple[Checkpoint, dict[str, Any]]:
    """The newest checkpoint or the one of lowest dev loss, as `keep` says; and its metrics."""
    assert result.checkpoint and result.metrics and result.best_checkpoints  # the last step wrote one at least
    if keep == "best":
        return min(result.best_checkpoints, key=lambda kept: kept[1]["dev_loss"])
    return result.checkpoint, result.metrics


def _store_address(config: TrainConfig, run: Path) -> str:
    if not config.storage:
        return str(run.parent)
    return config.storage if "://" in config.storage else str(Path(config.storage).resolve())


def _digest(config: TrainConfig, base_digest: str, data: storage.Folder) -> str:
    """Identity of the loss curve: data and settings, but not where it is written or on how many workers."""
    beside = {name for name, field in TrainConfig.model_fields.items() if BESIDE_THE_CURVE in field.metadata}
    text = json.dumps([config.model_dump(exclude=beside), base_digest, data.receipt.facts["dataset"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(config: TrainConfig, digest: str) -> bool:
    receipt = storage.read_receipt(config.out) if Path(config.out).is_dir() else None
    return receipt is not None and (receipt.facts.get("run"), receipt.config.get("keep")) == (digest, config.keep)
