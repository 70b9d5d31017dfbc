"""The rows that merge measures and calibrates on; where it does without any, it says why."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch

from chatglm3.chat import PromptFormat
from cluster import storage
from cluster.errors import StageError
from pipelines.model_folders import ModelFolder
from pipelines.weights.agreement import shuffled_examples, take
from pipelines.weights.merge_config import MergeConfig

CALIBRATION_TOKENS = 1 << 15
"""GPTQ's own experiments took 2^18, which a GPU does in minutes and two cores do not."""
QUICK_BYTES = 1 << 30  # of a model that a CPU measures in a minute

Wish = Literal["must", "if quick", "not"]
_WISH: dict[bool | None, Wish] = {True: "must", None: "if quick", False: "not"}


def measuring_rows(config: MergeConfig, base: ModelFolder) -> Path | None:
    """The data folder whose dev rows the model is measured on; None where that is not asked for, or not quick.

    StageError if it has none, but is named with --data, or needed.
    """
    wish = "must" if config.onto == "auto" else _WISH[config.measure]
    data, why_not = _choose(config, base, "dev", wish, "--measure true")
    if why_not:
        print(f"merge: not measured, because {why_not}")
    return data


def calibration_rows(config: MergeConfig, base: ModelFolder) -> Path | None:
    """The data folder whose training rows w4a16 is calibrated on; None for another format, and as above."""
    if config.format != "w4a16":
        return None
    data, why_not = _choose(config, base, "train", _WISH[config.calibrate], "--calibrate true")
    if why_not:
        print(f"merge: not calibrated, each value is the nearest, because {why_not}")
    return data


def calibration_ids(data: Path, base: Path, prompt_format: PromptFormat) -> list[list[int]]:
    """Training rows as ids, always the same, CALIBRATION_TOKENS in all."""
    drawn = shuffled_examples(data, "train", base, prompt_format)
    return [example.ids for example in take(drawn, CALIBRATION_TOKENS, lambda example: len(example.ids))]


def training_settings(config: MergeConfig) -> list[dict[str, Any]]:
    """What each adapter was trained with; empty for one without a receipt."""
    receipts = map(storage.read_receipt, config.adapters)
    return [receipt.config if receipt else {} for receipt in receipts]


def data_digest(data: Path) -> str:
    """sha256 that stands for a data folder: of its receipt, or without one of its rows."""
    if (data / storage.RECEIPT).is_file():
        return storage.file_digest(data / storage.RECEIPT)
    files = (f"{file.relative_to(data)} {storage.file_digest(file)}\n" for file in sorted(data.glob("*/*.jsonl")))
    return hashlib.sha256("".join(files).encode()).hexdigest()


def _choose(config: MergeConfig, base: ModelFolder, split: str, wish: Wish, flag: str) -> tuple[Path | None, str]:
    """The folder, or why there is none. `flag` makes merge go by rows where that is not quick."""
    if wish == "not":
        return None, ""
    data, why_not = (config.data, "") if config.data else _rows_of_training(config)
    if not why_not and not any(file.stat().st_size for file in Path(data, split).glob("*.jsonl")):
        why_not = f"{'--data ' if config.data else ''}{data} has no {split} rows to go by"
    if why_not:
        why_not += "; give a folder that prepare wrote with --data DIR"
        if config.data or wish == "must":
            raise StageError(why_not)
        return None, why_not
    size = sum(file.stat().st_size for file in base.path.iterdir())
    if wish == "if quick" and size >= QUICK_BYTES and not torch.cuda.is_available():
        return None, f"{size / 1e9:.1f} GB of weights take long without a GPU; {flag} does it all the same"
    return Path(data), ""


def _rows_of_training(config: MergeConfig) -> tuple[str, str]:
    """The one data folder that all adapters were trained on, or why it is not to be used."""
    receipts = [receipt for receipt in map(storage.read_receipt, config.adapters) if receipt]
    known = sorted({receipt.config["data"] for receipt in receipts if "data" in receipt.config})
    if not known:
        return "", "no receipt names rows to go by"
    if len(known) > 1:
        return "", f"the adapters were trained on different rows ({', '.join(known)})"
    if not all(_is_as_trained_on(known[0], receipt) for receipt in receipts if "data" in receipt.config):
        return "", f"{known[0]} no longer holds the rows that the adapter was trained on"
    return known[0], ""


def _is_as_trained_on(data: str, training: storage.Receipt) -> bool:
    """Whether a data folder is as it was, or was prepared again and has the same rows."""
    now, dataset = storage.read_receipt(data), training.facts.get("dataset")
    if now and dataset and now.facts.get("dataset") == dataset:
        return True
    return training.inputs.get(data) == data_digest(Path(data))
