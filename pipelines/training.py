"""Instruction rows and a base model in; a LoRA adapter out, trained on any number of workers."""

import hashlib
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import ray.train
from pydantic import Field, model_validator
from ray.train import Checkpoint

from chatglm3.chat import PromptFormat
from chatglm3.checkpoint import read_config
from cluster import session, storage
from cluster.config import Config
from cluster.errors import StageError
from pipelines.block_files import BlockFile
from pipelines.checkpoint_store import CheckpointStore
from pipelines.memory import CHOICE, Memory, choose_memory
from pipelines.model_folders import ModelFolder, open_model
from pipelines.one_or_more import ONE_OR_MORE
from pipelines.packing import PackingConfig, pack_split
from pipelines.spot_checks import draw_questions
from pipelines.step import BaseFormat
from pipelines.strategies import Strategy
from pipelines.trackers import TrackerName, require
from pipelines.training_report import write_training_report
from pipelines.training_run import run_plan
from pipelines.worker import TrainingPlan

BESIDE_THE_CURVE = "beside the curve"
"""Marks the settings that do not change a loss curve: a run goes on when they do. What stands in the folders of data
and base does change it, but not where these are."""


class LoraSettings(Config):
    """Low-rank adapters (arXiv:2106.09685)."""

    rank: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: int = Field(32, ge=1)
    """Scale of the update: alpha / rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout before the update."""
    targets: Annotated[
        list[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]], ONE_OR_MORE
    ] = Field(["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"], min_length=1)
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

    data: Annotated[str, BESIDE_THE_CURVE] = "out/data"
    """Folder written by prepare."""
    base: Annotated[str, BESIDE_THE_CURVE] = "tiny"
    """Model folder: an official ChatGLM3 download, a folder written by merge, or tiny."""
    out: Annotated[str, BESIDE_THE_CURVE] = "out/adapter"
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
    """Measure the loss on the dev rows every so many steps; 0: after each epoch. A node's notice that it will be taken
    away puts it off until the run has restarted; at the last step it follows the checkpoint."""
    score_rows: Annotated[int, BESIDE_THE_CURVE] = Field(32, ge=0)
    """Dev questions, always the same, that are answered and scored too whenever the dev loss is measured; 0: none."""
    score_tokens: Annotated[int, BESIDE_THE_CURVE] = Field(128, ge=1)
    """Longest of these answers in tokens."""
    patience: int = Field(0, ge=0)
    """Stop after so many evaluations without a lower dev loss, and keep the adapter that had the lowest; 0: go on to
    the last step."""
    keep: Annotated[Literal["last", "best"], BESIDE_THE_CURVE] = "last"
    """Which adapter is OUT's: that of the last step, or of the lowest dev loss. Given to a finished run, best takes
    the best of the checkpoints that are left."""
    save_steps: Annotated[int, BESIDE_THE_CURVE] = Field(50, ge=0)
    """Write a checkpoint every so many steps; 0: after each epoch. Each evaluation and a node's notice that it will be
    taken away write one too. Training goes on meanwhile; what falls due during an upload is skipped, but the best one
    so far of --keep best and --patience, for which training waits until that upload has ended."""
    keep_checkpoints: Annotated[int, BESIDE_THE_CURVE] = Field(2, ge=1)
    """How many checkpoints stay: those of lowest dev loss, and always the newest."""
    storage: Annotated[str, BESIDE_THE_CURVE] = ""
    """Where checkpoints go, a folder or an address such as s3://bucket/path; unless given, OUT.run."""
    recompute: Annotated[bool | None, BESIDE_THE_CURVE] = None
    """Compute activations again in the backward pass: less memory, a third slower. Unless given: if a GPU has no
    memory for blocks of 4,096 tokens otherwise."""
    max_input_length: int = Field(1024, ge=3)
    """Prompt ids that are kept (bare format only; the chat format cuts nothing)."""
    max_output_length: int = Field(512, ge=2)
    """Answer ids that are kept (bare format only)."""
    strategy: Annotated[Strategy, BESIDE_THE_CURVE] = "ddp"
    """ddp: every worker holds the whole base, right while one GPU has room for it (ChatGLM3-6B in NF4: 4 GB); zero2:
    DeepSpeed shards gradients and optimizer; zero3: the base too (not fp8), for one that no GPU has room for: it
    gathers each layer, and layers are not compiled, so they are slower and keep more for each token. The curve is the
    same."""
    workers: Annotated[int, BESIDE_THE_CURVE] = Field(1, ge=1)
    """Worker processes. The loss curve does not depend on it."""
    min_workers: Annotated[int | None, BESIDE_THE_CURVE] = Field(None, ge=1)
    """Go on with as few workers as this when nodes are lost, and with more again when there are nodes for them; unless
    given, wait for all of --workers."""
    use_gpu: Annotated[bool | None, BESIDE_THE_CURVE] = None
    """Give each worker a GPU; unless given, whether the cluster has GPUs now (nodes scaled to zero do not count)."""
    max_failures: Annotated[int, BESIDE_THE_CURVE] = Field(3, ge=0)
    """How often dead workers are replaced."""
    trackers: Annotated[list[TrackerName], ONE_OR_MORE, BESIDE_THE_CURVE] = Field([])
    """Where metrics go besides TensorBoard, such as mlflow or mlflow,wandb. Their own environment variables say to
    which server and project, and hold the keys."""
    seed: int = 42
    """Seed of the adapter's start, the order of blocks and dropout."""

    @model_validator(mode="after")
    def _can_have_so_few(self) -> Self:
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers {self.min_workers} is more than workers {self.workers}; it is the least of them"
            )
        return self


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
    if keep == "best":
        return min(result.best_checkpoints, key=lambda kept: kept[1]["dev_loss"])
    return result.checkpoint, result.metrics


def make_plan(config: TrainConfig, base: ModelFolder, data: storage.Folder, folder: Path, gpus: int) -> TrainingPlan:
    """Pack the data and work out what every worker must know; raises StageError when there is nothing to train on."""
    longest = int(data.receipt.config.get("max_tokens") or 0)
    memory = choose_memory(config, read_config(base.path), longest, folder / CHOICE, gpus)
    sized = {"block_tokens": memory.block_tokens}
    packing = PackingConfig(tokenizer=base.location, **config.model_dump(include=_PACKING_FIELDS), **sized)
    blocks = {split: str(pack_split(data, split, packing, folder.parent / "blocks")) for split in ("train", "dev")}
    counts = storage.open_folder(Path(blocks["train"]).parent).receipt.counts
    if not BlockFile(blocks["train"]).target_counts.any():
        raise StageError(f"--data {config.data} holds no training rows with an answer; run prepare again")
    keep: Literal["last", "best"] = "best" if config.patience else config.keep
    if keep == "best" and not BlockFile(blocks["dev"]).target_counts.any():
        raise StageError(
            f"--patience and --keep best go by the dev loss, but --data {config.data} has no dev rows; "
            f"prepare it with a --dev_share, or leave them out"
        )
    questions = folder / "questions.jsonl"
    has_questions = draw_questions(data.path / "dev", config.score_rows, questions)
    per_step = max(1, round(config.batch_size * counts["blocks"] / counts["examples"]))
    steps_per_epoch = math.ceil(counts["blocks"] / per_step)
    steps = min(math.ceil(config.epochs * steps_per_epoch), config.max_steps or 10**12)
    _tell(counts, steps, per_step, memory, config.workers)
    return TrainingPlan(
        **config.model_dump(include=set(TrainingPlan.model_fields) - {"base", "block_tokens", "recompute", "keep"}),
        base=base.location,
        block_tokens=memory.block_tokens,
        recompute=memory.recompute,
        keep=keep,
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
    if waiting := who_waits(counts["blocks"], counts["examples"], per_step, workers):
        print(f"train: {waiting}", file=sys.stderr)


def who_waits(blocks: int, examples: int, per_step: int, workers: int) -> str:
    """How many workers wait in each step for others with one block more, and what would help; "" if none does."""
    per_step = min(per_step, blocks)
    rounds, waiting = -(-per_step // workers), -per_step % workers
    if not waiting:
        return ""
    even = workers * min(max(1, round(per_step / workers)), blocks // workers)
    remedy = f"--batch_size {round(even * examples / blocks)} makes it {even}" if even else f"--workers {blocks} do"
    share = {1: "all", 2: "half"}.get(rounds, f"1/{rounds}")
    return f"{per_step} blocks a step on {workers} workers: {waiting} wait for {share} of each step; {remedy}"


_PACKING_FIELDS = {"prompt_format", "max_input_length", "max_output_length"}


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
