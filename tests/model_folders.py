"""Copies of model folders for tests, with something changed."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def copied(folder: Path, target: Path, **fields: object) -> Path:
    """A writable copy of a model folder with other fields in its config.json; None takes a field away."""
    target.mkdir()
    for file in folder.iterdir():
        shutil.copyfile(file, target / file.name)
    config = json.loads((target / "config.json").read_text()) | fields
    (target / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )
    return target


def rewrite(file: Path, **changes: torch.Tensor | None) -> None:
    """Put tensors into a `.bin` or safetensors file, or with None take them out."""
    is_bin = file.suffix == ".bin"
    tensors = torch.load(file, weights_only=True) if is_bin else load_file(file)
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    torch.save(tensors, file) if is_bin else save_file(tensors, file)
