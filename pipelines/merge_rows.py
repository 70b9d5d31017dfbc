"""The rows that merge measures and calibrates on; where it does without any, it says why."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch

from cluster import storage
from cluster.errors import StageError
from pipelines.merge_config import MergeConfig
from pipelines.model_folders import ModelFolder

QUICK_BYTES = 1 << 30  # of a model that a CPU measures in a minute

Wish = Literal["must", "if quick", "not"]
_WISH: dict[bool | None, Wish] = {True: "must", None: "if quick", False: "not"}


def measuring_rows(config: MergeConfig, base: ModelFolder) -> Path | None:
    """The data folder whose dev rows the model is measured on; None where that is not asked for, or not quick.

    StageError if it has none, but is named with --data, or needed.
    """
    wish = "must" if config.onto == "auto" else _WISH[config.measure]
    data, why_not = _choose(config, base, "dev", wish)
    if why_not:
        print(f"merge: not measured, because {why_not.format('--measure true')}")
    return data


def calibration_rows(config: MergeConfig, base: ModelFolder) -> Path | None:
    """The data folder whose training rows w4a16 is calibrated on; None for another format, and as above."""
    if config.format != "w4a16":
        return None
    data, why_not = _choose(config, base, "train", _WISH[config.calibrate])
    if why_not:
        print(f"merge: not calibrated, each value is the nearest, because {why_not.format('--calibrate true')}")
    return data


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


def _choose(config: MergeConfig, base: ModelFolder, split: str, wish: Wish) -> tuple[Path | None, str]:
    """The folder, or why there is none; {} in that stands for the flag that makes merge do it all the same."""
    if wish == "not":
        return None, ""
    known = {settings["data"] for settings in training_settings(config) if "data" in settings}
    data = config.data or (known.pop() if len(known) == 1 else "")
    has_rows = bool(data) and any(file.stat().st_size for file in Path(data, split).glob("*.jsonl"))
    if not has_rows and (config.data or wish == "must"):
        raise StageError(
            f"{f'--data {data}' if data else '--data is empty, which'} has no {split} rows to go by; {_GIVE}"
        )
    if not data:
        return None, f"no receipt names rows to go by; {_GIVE}"
    if not has_rows:
        return None, f"{data}, which the adapter was trained on, has no {split} rows now; {_GIVE}"
    size = sum(file.stat().st_size for file in base.path.iterdir())
    if wish == "if quick" and size >= QUICK_BYTES and not torch.cuda.is_available():
        return None, f"{size / 1e9:.1f} GB of weights take long without a GPU; {{}} does it all the same"
    return Path(data), ""


_GIVE = "give a folder that prepare wrote with --data DIR"
