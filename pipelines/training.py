"""Instruction rows and a base model in; a LoRA adapter out, trained on any number of workers."""

import hashlib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import ray.train
from pydantic import Field
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from chatglm3 import ModelError
from chatglm3.chat import PromptFormat
from chatglm3.checkpoint import read_config
from cluster import session, storage
from cluster.config import Config
from cluster.errors import StageError
from pipelines.block_files import BlockFile
from pipelines.memory import Memory, choose_memory
from pipelines.model_folders import open_model
from pipelines.packing import PackingConfig, pack_split
from pipelines.progress import LossBoard, draw_losses
from pipelines.step import BaseFormat
from pipelines.worker import TrainingPlan, train_worker


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
    save_steps: int = Field(50, ge=0)
    """Write a checkpoint every so many steps; 0: after each epoch."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints stay in OUT.run."""
    recompute: bool | None = None
    """Compute activations again in the backward pass: less memory, a third slower. Unless given: if a GPU has no
    memory for blocks of 4,096 tokens otherwise."""
    max_input_length: int = Field(1024, ge=3)
    """Prompt ids that are kept (bare format only; the chat format cuts nothing)."""
    max_output_length: int = Field(512, ge=2)
    """Answer ids that are kept (bare format only)."""
    workers: int = Field(1, ge=1)
    """Worker processes. The loss curve does not depend on it."""
    use_gpu: bool | None = None
    """Give each worker a GPU; unless given, whether the cluster has GPUs now (nodes scaled to zero do not count)."""
    max_failures: int = Field(3, ge=0)
    """How often dead workers are replaced."""
    seed: int = 42
    """Seed of the adapter's start, the order of blocks and dropout."""


def train(config: TrainConfig) -> str:
    """Fine-tune an adapter and return its folder."""
    started = time.monotonic()
    data = storage.open_folder(config.data, "prepare")
    base = open_model(config.base, "--base")
    if "quantization_config" in base.config:
        raise StageError(f"--base {config.base} is quantised already; give the 16-bit model it was made from")
    storage.check_output(config.out, "train", (config.data, base.location))
    base_digest = base.weights_digest
    digest = _digest(config, base_digest, data)
    if _finished(config, digest):
        print(f"train: {config.out} is finished already with this data and these settings; nothing to do")
        return config.out
    session.connect()
    gpus = session.gpus_per_worker(config.use_gpu)
    session.require(config.workers, 1, gpus)
    run = Path(f"{Path(config.out)}.run").resolve() / f"run-{digest[:16]}"
    longest = int(data.receipt.config.get("max_tokens") or 0)
    memory = choose_memory(config, read_config(base.path), longest, run / "memory.json", gpus)
    plan = make_plan(config, memory, base.location, data, run)
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
        shutil.copytree(Path(result.checkpoint.path) / "adapter", folder, dirs_exist_ok=True)
        for name in ("metrics.jsonl", "tensorboard"):
            _copy(Path(plan.folder) / name, folder / name)
        receipt.counts.update(steps=plan.steps, **draw_losses(folder / "metrics.jsonl", folder / "loss.png"))
        receipt.seconds = round(time.monotonic() - started, 1)
    print(f"train: {plan.steps} steps, loss curve in {config.out}/loss.png; next: merge --adapter {config.out}")
    return config.out


def make_plan(config: TrainConfig, memory: Memory, base: str, data: storage.Folder, folder: Path) -> TrainingPlan:
    """Pack the data and work out what every worker must know; raises StageError when there is nothing to train on."""
    sized = {"block_tokens": memory.block_tokens}
    packing = PackingConfig(tokenizer=base, **config.model_dump(include=_PACKING_FIELDS), **sized)
    blocks = {split: str(pack_split(data, split, packing, folder.parent / "blocks")) for split in ("train", "dev")}
    counts = storage.open_folder(Path(blocks["train"]).parent).receipt.counts
    if not BlockFile(blocks["train"]).target_counts.any():
        raise StageError(f"--data {config.data} holds no training rows with an answer; run prepare again")
    per_step = max(1, round(config.batch_size * counts["blocks"] / counts["examples"]))
    steps_per_epoch = math.ceil(counts["blocks"] / per_step)
    steps = min(math.ceil(config.epochs * steps_per_epoch), config.max_steps or 10**12)
    fill = counts["tokens"] / counts["blocks"] / memory.block_tokens
    print(
        f"train: {counts['examples']:,} examples, {counts['tokens']:,} tokens in {counts['blocks']:,} blocks "
        f"({fill:.0%} full); {steps:,} steps of {per_step} blocks on {config.workers} workers"
    )
    if per_step < config.workers:
        print(
            f"train: a step has {per_step} blocks, so {config.workers - per_step} of {config.workers} workers will be "
            f"idle; raise --batch_size or lower --block_tokens"
        )
    return TrainingPlan(
        **config.model_dump(include=set(TrainingPlan.model_fields) - {"base", "block_tokens", "recompute"}),
        base=base,
        block_tokens=memory.block_tokens,
        recompute=memory.recompute,
        folder=str(folder),
        train_blocks=blocks["train"],
        dev_blocks=blocks["dev"],
        blocks_per_step=per_step,
        steps=steps,
        save_every=config.save_steps or steps_per_epoch,
        eval_every=config.eval_steps or steps_per_epoch,
    )


_PACKING_FIELDS = {"prompt_format", "max_input_length", "max_output_length"}


def _fit(config: TrainConfig, plan: TrainingPlan, gpus: int) -> ray.train.Result:
    folder = Path(plan.folder)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=plan.model_dump(),
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=bool(gpus), resources_per_worker=_share(gpus)),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            callbacks=[LastingErrors()],
        ),
    )
    try:
        with LossBoard(folder / "metrics.jsonl", plan.steps):
            return trainer.fit()
    except SystemExit:  # Ray Train's own answer to Ctrl-C, after it has ended the workers
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        if isinstance(lasting := getattr(error, "controller_failure", None), StageError):
            raise lasting from error
        raise StageError(
            f"training failed: {_cause(error)}; the same command goes on from the last checkpoint"
        ) from error


class LastingErrors(ray.train.UserCallback):
    """Ends the run at an error that new workers would only meet again; Ray Train tries again after every error."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise StageError, which ends the run, if all of the workers' errors are such."""
        errors = [getattr(error, "_base_exc", error) for error in worker_exceptions.values()]
        if not all(isinstance(error, (StageError, ModelError, FloatingPointError, ValueError)) for error in errors):
            return
        error, remedy = errors[0], "mend that, and the same command goes on from the last checkpoint"
        if isinstance(error, FloatingPointError):
            remedy = "lower --learning_rate, or look at these rows"
        raise StageError(f"training failed: {' '.join(str(error).split())}; {remedy}")


def _share(gpus: int) -> dict[str, float]:
    return {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}


def _cause(error: BaseException) -> str:
    """The last line of the first failed worker's error."""
    failures = getattr(error, "worker_failures", None) or {0: error.__cause__ or error}
    lines = [line.strip() for line in str(next(iter(failures.values()))).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _digest(config: TrainConfig, base_digest: str, data: storage.Folder) -> str:
    """Identity of the loss curve: data and settings, but not where it is written or on how many workers."""
    settings = config.model_dump(
        exclude={"out", "data", "base", "workers", "use_gpu", "max_failures", "keep_checkpoints", "save_steps"}
    )
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
