"""Instruction rows and a base model in; a LoRA adapter out, trained on any number of workers."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Literal

import ray.train
from pydantic import Field
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from chatglm3 import ModelError
from chatglm3.chat import PromptFormat
from chatglm3.checkpoint import read_config
from cluster import session, storage
from cluster.config import Config
from cluster.errors import StageError
from pipelines.block_files import BlockFile
from pipelines.memory import Memory, choose_memory
from pipelines.model_folders import ModelFolder, open_model
from pipelines.packing import PackingConfig, pack_split
from pipelines.progress import LossBoard
from pipelines.spot_checks import draw_questions
from pipelines.step import BaseFormat
from pipelines.strategies import Strategy
from pipelines.trackers import TrackerName, require, tracked
from pipelines.training_report import write_training_report
from pipelines.worker import TrainingPlan, train_worker

SECONDS_BETWEEN_RESIZES = 20.0
"""How long a new node may stand idle beside a run of --min_workers; each change of size restarts the workers."""


class LoraSettings(Config):
    """Low-rank adapters (arXiv:2106.09685)."""

    rank: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: int = Field(32, ge=1)
    """Scale of the update: alpha / rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout before the update."""
    targets: list[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"], min_length=1
    )
    """Linear layers that get an adapter."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps high ranks learning (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Learn each weight row's length apart from its direction (DoRA, arXiv:2402.09353); slower."""


class TrainConfig(Config):
    """Fine-tune ChatGLM3 by QLoRA on prepared rows.

    Checkpoints go to OUT.run; a killed run goes on from the last one when the same command is given again. The
    predecessor's flags and its --train_args_json file are accepted too.
    """

    data: str = "out/data"
    """Folder written by prepare."""
    base: str = "tiny"
    """Model folder: an official ChatGLM3 download, a folder written by merge, or tiny."""
    out: str = "out/adapter"
    """Folder to write; OUT.run beside it holds checkpoints. Nodes of a cluster must share it."""
    prompt_format: PromptFormat = "chat"
    """chat: ChatGLM3's own turns; bare: the predecessor's plain text."""
    base_format: BaseFormat = "nf4"
    """Format of the frozen base. nf4: QLoRA with double quantisation, the smallest; fp8: the fastest, on GPUs of
    compute capability 8.9 and later (Ada, Hopper)."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    epochs: float = Field(2.0, gt=0)
    """Passes over the training rows."""
    max_steps: int = Field(0, ge=0)
    """Stop after so many optimizer steps; 0: all epochs."""
    batch_size: int = Field(32, ge=1)
    """Examples per optimizer step over all workers, rounded to whole blocks."""
    block_tokens: int | None = Field(None, ge=16)
    """Tokens of a packed block, which is what a worker computes at once; more is faster and takes more memory. Unless
    given: 16,384, 8,192 or 4,096, whichever a GPU has memory for; 4,096 on CPU."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which it rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    eval_steps: int = Field(0, ge=0)
    """Measure the loss on the dev rows every so many steps; 0: after each epoch."""
    score_rows: int = Field(32, ge=0)
    """Dev questions, always the same, that are answered and scored too whenever the dev loss is measured; 0: none."""
    score_tokens: int = Field(128, ge=1)
    """Longest of these answers in tokens."""
    patience: int = Field(0, ge=0)
    """Stop after so many evaluations without a lower dev loss, and keep the adapter that had the lowest; 0: go on to
    the last step, and keep its adapter."""
    save_steps: int = Field(50, ge=0)
    """Write a checkpoint every so many steps; 0: after each epoch. Each evaluation and a node's notice that it will be
    taken away write one too. Training goes on meanwhile."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints stay: those of lowest dev loss, and always the newest."""
    storage: str = ""
    """Where checkpoints go, a folder or an address such as s3://bucket/path; unless given, OUT.run."""
    recompute: bool | None = None
    """Compute activations again in the backward pass: less memory, a third slower. Unless given: if a GPU has no
    memory for blocks of 4,096 tokens otherwise."""
    max_input_length: int = Field(1024, ge=3)
    """Prompt ids that are kept (bare format only; the chat format cuts nothing)."""
    max_output_length: int = Field(512, ge=2)
    """Answer ids that are kept (bare format only)."""
    strategy: Strategy = "ddp"
    """ddp: every worker holds the whole base, right while one GPU has room for it (ChatGLM3-6B in NF4: 4 GB); zero2:
    DeepSpeed shards gradients and optimizer; zero3: the base too, at a gather for each layer. The curve is the same."""
    workers: int = Field(1, ge=1)
    """Worker processes. The loss curve does not depend on it."""
    min_workers: int | None = Field(None, ge=1)
    """Go on with as few workers as this when nodes are lost, and with more again when there are nodes for them; unless
    given, wait for all of --workers."""
    use_gpu: bool | None = None
    """Give each worker a GPU; unless given, whether the cluster has GPUs now (nodes scaled to zero do not count)."""
    max_failures: int = Field(3, ge=0)
    """How often dead workers are replaced."""
    trackers: list[TrackerName] = Field([])
    """Where metrics go besides TensorBoard, such as [mlflow, wandb]. Their own environment variables say to which
    server and project, and hold the keys."""
    seed: int = 42
    """Seed of the adapter's start, the order of blocks and dropout."""


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
    session.connect()
    gpus = session.gpus_per_worker(config.use_gpu)
    session.require(config.min_workers or config.workers, 1, gpus)
    run = Path(f"{Path(config.out)}.run").resolve() / f"run-{digest[:16]}"
    plan = make_plan(config, base, data, run, gpus)
    result = _fit(config, plan, gpus)
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
    with storage.publish(config.out, receipt) as folder:
        with _published(config, result).as_directory() as checkpoint:
            shutil.copytree(Path(checkpoint) / "adapter", folder, dirs_exist_ok=True)
        for name in ("metrics.jsonl", "tensorboard"):
            _copy(Path(plan.folder) / name, folder / name)
        receipt.counts.update(write_training_report(folder, config.model_dump(), gpus))
        receipt.seconds = round(time.monotonic() - started, 1)
    steps = receipt.counts["steps"]
    print(f"train: {steps} steps, curves in {config.out}/report.html; next: merge --adapter {config.out}")
    return config.out


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
    require(config.trackers)
    if data.receipt.facts.get("tokenizer", base.tokenizer) != base.tokenizer:
        print(
            f"warning: {config.data} was prepared with another tokenizer than {base.name}'s, so its documents were cut "
            f"to other lengths; prepare again with --tokenizer {config.base}",
            file=sys.stderr,
        )
    return data, base


def _published(config: TrainConfig, result: ray.train.Result) -> Checkpoint:
    """The newest checkpoint or, with `patience`, the one of lowest dev loss."""
    if not config.patience:
        return result.checkpoint
    return min(result.best_checkpoints, key=lambda kept: kept[1]["dev_loss"])[0]


def make_plan(config: TrainConfig, base: ModelFolder, data: storage.Folder, folder: Path, gpus: int) -> TrainingPlan:
    """Pack the data and work out what every worker must know; raises StageError when there is nothing to train on."""
    longest = int(data.receipt.config.get("max_tokens") or 0)
    memory = choose_memory(config, read_config(base.path), longest, folder / "memory.json", gpus)
    sized = {"block_tokens": memory.block_tokens}
    packing = PackingConfig(tokenizer=base.location, **config.model_dump(include=_PACKING_FIELDS), **sized)
    blocks = {split: str(pack_split(data, split, packing, folder.parent / "blocks")) for split in ("train", "dev")}
    counts = storage.open_folder(Path(blocks["train"]).parent).receipt.counts
    if not BlockFile(blocks["train"]).target_counts.any():
        raise StageError(f"--data {config.data} holds no training rows with an answer; run prepare again")
    questions = folder / "questions.jsonl"
    has_questions = draw_questions(data.path / "dev", config.score_rows, questions)
    per_step = max(1, round(config.batch_size * counts["blocks"] / counts["examples"]))
    steps_per_epoch = math.ceil(counts["blocks"] / per_step)
    steps = min(math.ceil(config.epochs * steps_per_epoch), config.max_steps or 10**12)
    _tell(counts, steps, per_step, memory, config.workers)
    return TrainingPlan(
        **config.model_dump(include=set(TrainingPlan.model_fields) - {"base", "block_tokens", "recompute"}),
        base=base.location,
        block_tokens=memory.block_tokens,
        recompute=memory.recompute,
        folder=str(folder),
        train_blocks=blocks["train"],
        dev_blocks=blocks["dev"],
        blocks_per_step=per_step,
        steps=steps,
        save_every=config.save_steps or steps_per_epoch,
        eval_every=config.eval_steps or steps_per_epoch,
        questions=str(questions) if has_questions else "",
    )


def _tell(counts: dict[str, Any], steps: int, per_step: int, memory: Memory, workers: int) -> None:
    fill = counts["tokens"] / counts["blocks"] / memory.block_tokens
    print(
        f"train: {counts['examples']:,} examples, {counts['tokens']:,} tokens in {counts['blocks']:,} blocks "
        f"({fill:.0%} full); {steps:,} steps of {per_step} blocks on {workers} workers"
    )
    if per_step < workers:
        print(
            f"train: a step has {per_step} blocks, so {workers - per_step} of {workers} workers will be "
            f"idle; raise --batch_size or lower --block_tokens"
        )


_PACKING_FIELDS = {"prompt_format", "max_input_length", "max_output_length"}


def _fit(config: TrainConfig, plan: TrainingPlan, gpus: int) -> ray.train.Result:
    folder = Path(plan.folder)
    if config.min_workers:
        # A start on a node that is gone is given up sooner. Nodes that are there give their CPUs within a second;
        # another timeout is only another try.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=plan.model_dump(),
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,
            use_gpu=bool(gpus),
            resources_per_worker=_share(gpus),
            elastic_resize_monitor_interval_s=SECONDS_BETWEEN_RESIZES,
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=_storage(config, folder),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.keep_checkpoints,
                checkpoint_score_attribute="dev_loss",
                checkpoint_score_order="min",
            ),
            callbacks=[LastingErrors(), FreshCount()] if config.min_workers else [LastingErrors()],
        ),
    )
    try:
        with LossBoard(folder / "metrics.jsonl", plan.steps), tracked(config.trackers, folder, config.model_dump()):
            return trainer.fit()
    except SystemExit:  # Ray Train's own answer to Ctrl-C, after it has ended the workers
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        if isinstance(lasting := getattr(error, "controller_failure", None), StageError):
            raise lasting from error
        raise StageError(
            f"training failed: {_cause(error)}; the same command goes on from the last checkpoint"
        ) from error


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


def _lasts(error: Exception) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return full or isinstance(error, (StageError, ModelError, FloatingPointError, ValueError))


class LastingErrors(ray.train.UserCallback):
    """Ends the run at an error that new workers would only meet again; Ray Train tries again after every error."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise StageError, which ends the run, if all of the workers' errors are such."""
        errors = [getattr(error, "_base_exc", error) for error in worker_exceptions.values()]
        if not all(map(_lasts, errors)):
            return
        error, remedy = errors[0], "mend that, and the same command goes on from the last checkpoint"
        if isinstance(error, FloatingPointError):
            remedy = "look at these rows, or lower --learning_rate"
        raise StageError(f"training failed: {' '.join(str(error).split())}; {remedy}")


def _storage(config: TrainConfig, folder: Path) -> str:
    if not config.storage:
        return str(folder.parent)
    return config.storage if "://" in config.storage else str(Path(config.storage).resolve())


def _share(gpus: int) -> dict[str, float]:
    return {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}


def _cause(error: BaseException) -> str:
    """The last line of the first failed worker's error."""
    failures = getattr(error, "worker_failures", None) or {0: error.__cause__ or error}
    lines = [line.strip() for line in str(next(iter(failures.values()))).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


_CURVE_IGNORES = {"out", "workers", "min_workers", "use_gpu", "strategy", "max_failures"}
_CURVE_IGNORES |= {"save_steps", "keep_checkpoints", "storage", "score_rows", "score_tokens", "trackers"}


def _digest(config: TrainConfig, base_digest: str, data: storage.Folder) -> str:
    """Identity of the loss curve: data and settings, but not where it is written or on how many workers."""
    settings = config.model_dump(exclude={"data", "base"} | _CURVE_IGNORES)
    text = json.dumps([settings, base_digest, data.receipt.facts["dataset"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(config: TrainConfig, digest: str) -> bool:
    receipt = storage.read_receipt(config.out) if Path(config.out).is_dir() else None
    return receipt is not None and receipt.facts.get("run") == digest


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
