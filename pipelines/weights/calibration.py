"""How far off the outputs of matrices in w4a16 are: calibration.json in the model folder, for a run that goes on."""

import json
from collections.abc import Mapping
from pathlib import Path

from chatglm3.folder import read_json
from pipelines.weights.gptq import Calibrated

FILE = "calibration.json"


def write_errors(folder: Path, found: Calibrated) -> None:
    """Say it, and write it down."""
    errors = {"gptq_error": round(found.error, 6), "nearest_error": round(found.error_of_nearest, 6)}
    print(f"merge: {errors_text(errors)}")
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(json.dumps(errors) + "\n", encoding="utf-8")


def read_errors(folder: Path) -> dict[str, float]:
    """What was written down; nothing for a model that was not calibrated."""
    return read_json(folder / FILE) if (folder / FILE).is_file() else {}


def errors_text(errors: Mapping[str, float]) -> str:
    """In words; empty for a model that was not calibrated."""
    if not errors:
        return ""
    gptq, nearest = errors["gptq_error"], errors["nearest_error"]
    return f"w4a16 by GPTQ: outputs off by {gptq:.2%}, with the nearest values {nearest:.2%}"
