"""A model folder on disk: where it is, and what its JSON files say."""

import json
from pathlib import Path
from typing import Any

from chatglm3.errors import ModelError


def model_folder(folder: str | Path) -> Path:
    """Path of a model folder; "tiny" is the built-in model. ModelError if it is not a folder."""
    if folder == "tiny":
        from chatglm3.tiny import FOLDER

        return Path(FOLDER)
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"{folder} is not a folder: download the model and give the folder that holds its config.json")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ModelError if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: download the folder again, completely") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object: download it again")
    return content
