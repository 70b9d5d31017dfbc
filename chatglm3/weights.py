"""Weight files of a folder as tensors that stay on disk until they are used."""

import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from chatglm3.errors import ModelError
from chatglm3.folder import read_json


class Weight(NamedTuple):
    """A tensor, and the file that it is a mapped part of."""

    file: Path
    tensor: torch.Tensor


def open_weights(folder: Path) -> dict[str, Weight]:
    """Every tensor of a folder's safetensors or `.bin` files by name, safetensors first.

    Pages are read when a tensor is used, so that opening costs no memory. ModelError if a file is missing, cut
    short, left over, or repeats a tensor.
    """
    weights: dict[str, Weight] = {}
    for file in shard_files(folder):
        for name, tensor in read_shard(file).items():
            if name in weights:
                raise ModelError(f"{file}: {name} stands in {weights[name].file.name} too: download the folder again")
            weights[name] = Weight(file, tensor)
    return weights


def shard_files(folder: Path) -> list[Path]:
    """The weight files that a folder's index names, or its only one. ModelError if it has others."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        present = sorted(folder.glob(f"{stem}*{suffix}"))
        if not present:
            continue
        if index.exists():
            named = [folder / name for name in sorted(set(_weight_map(index).values()))]
        else:
            named = [folder / f"{stem}{suffix}"]
        for file in named:
            if not file.is_file():
                raise ModelError(f"{file} is missing: download it again (or its index, {index.name})")
        for file in present:
            if file not in named:
                raise ModelError(f"{file} is not named in {index.name}: it is of another download; delete it")
        return named
    raise ModelError(f"{folder} holds neither model*.safetensors nor pytorch_model*.bin: download the weights")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map is missing or empty: download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{index}: weight_map sends {name} to {file!r}, not to a file of the folder")
    return weight_map


def read_shard(file: Path) -> dict[str, torch.Tensor]:
    """Memory-mapped tensors by name of one weight file. ModelError if it is damaged or holds other things."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        else:
            tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError) as error:
        reason = " ".join(str(error).split(". ")[0].split())
        raise ModelError(f"{file} is damaged or cut short ({reason}): download it again") from None
    except pickle.UnpicklingError:
        raise ModelError(f"{file} holds code besides tensors: do not load it; get it from a source you trust") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ModelError(f"{file} holds something other than named tensors: download it again")
    return tensors
