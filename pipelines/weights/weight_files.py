"""Model weights written file by file, so that memory holds one file's tensors and a killed run goes on behind it."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster.progress import track

FILE_BYTES = 1 << 30  # of the tensors in 16 bits
Shapes = Mapping[str, tuple[int, ...]]


def write_weights(folder: Path, shapes: Shapes, make: Callable[[str], dict[str, Tensor]]) -> None:
    """Write `model*.safetensors`, and their index if there are several, of the tensors that `make` gives for each name.

    Files that are there already are kept: what is in a file depends on `shapes` alone, and it appears whole.
    """
    folder.mkdir(exist_ok=True)
    files = _files(folder, shapes)
    for file, group in track(files.items(), "write weights", len(files)):
        if not _is_whole(file):
            tensors = {name: tensor for each in group for name, tensor in make(each).items()}
            partial = file.with_suffix(".partial")
            save_file(tensors, partial, metadata={"format": "pt"})
            _flush(partial)
            partial.rename(file)
            del tensors
    if len(files) > 1:
        _write_index(folder, list(files))


def are_written(folder: Path, shapes: Shapes) -> bool:
    """Whether all files of these weights are there, so that none is left to be made."""
    return all(map(_is_whole, _files(folder, shapes)))


def _files(folder: Path, shapes: Shapes) -> dict[Path, list[str]]:
    """The files, and the names of the tensors in each."""
    groups = _groups(shapes)
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    files = [folder / name for name in names] if len(groups) > 1 else [folder / "model.safetensors"]
    return dict(zip(files, groups, strict=True))


def _is_whole(file: Path) -> bool:
    """Whether the file is there and as long as its header says: a machine that went down may have cut it."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _flush(file: Path) -> None:
    """To the disk, lest after a power cut the renamed file is empty."""
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _groups(shapes: Shapes) -> list[list[str]]:
    """Names in order, as many to a group as have FILE_BYTES together."""
    groups: list[list[str]] = [[]]
    room = FILE_BYTES
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if size > room and groups[-1]:
            groups.append([])
            room = FILE_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def _write_index(folder: Path, files: list[Path]) -> None:
    weight_map: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            weight_map |= dict.fromkeys(shard.keys(), file.name)
    size = sum(file.stat().st_size for file in files)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
