"""Settings, data and a base worked out as a plan: blocks, steps, and what a GPU has memory for."""

import math
import sys
from pathlib import Path
from typing import Any, Literal

from chatglm3.checkpoint import read_config
from cluster import storage
from cluster.errors import StageError
from pipelines.compute.block_files import BlockFile
from pipelines.model_folders import ModelFolder
from pipelines.run.memory import CHOICE, Memory, choose_memory
from pipelines.run.packing import PackingConfig, pack_split
from pipelines.run.spot_checks import draw_questions
from pipelines.run.training_config import TrainConfig
from pipelines.run.training_plan import TrainingPlan

_PACKING_FIELDS = {"prompt_format", "max_input_length", "max_output_length"}


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
    _tell(counts, steps, per_step, memory, config)
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


def _tell(counts: dict[str, Any], steps: int, per_step: int, memory: Memory, config: TrainConfig) -> None:
    fill = counts["tokens"] / counts["blocks"] / memory.block_tokens
    print(
        f"train: {counts['examples']:,} examples, {counts['tokens']:,} tokens in {counts['blocks']:,} blocks "
        f"({fill:.0%} full); {steps:,} steps of {per_step} blocks on {config.workers} workers"
    )
    rounded = rounded_far(counts["blocks"], counts["examples"], per_step, config.batch_size)
    waiting = who_waits(counts["blocks"], counts["examples"], per_step, config.workers)
    for told in filter(None, (rounded, waiting)):
        print(f"train: {told}", file=sys.stderr)


def rounded_far(blocks: int, examples: int, per_step: int, batch_size: int) -> str:
    """How many examples a step takes, where whole blocks hold quite other numbers than `batch_size`; else ""."""
    held = examples / blocks
    if blocks == 1 or 0.75 <= held * per_step / batch_size <= 1.25:
        return ""
    return (
        f"a step takes about {held * per_step:.0f} examples, not --batch_size {batch_size}, as a block holds "
        f"{held:.0f}; smaller --block_tokens come nearer"
    )


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
