"""The models that stages are given: `tiny`, an official ChatGLM3 folder, or a folder that merge wrote."""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatglm3 import load_tokenizer, official
from chatglm3.chat import PromptFormat
from chatglm3.checkpoint import read_config
from chatglm3.documents import format_digest
from chatglm3.errors import ModelError
from chatglm3.folder import model_folder, read_json
from chatglm3.weights import open_weights
from cluster import storage
from cluster.errors import StageError

SAMPLE = 2048  # values of each tensor that stand for it: half a row of a 6B model's matrix


@dataclass(frozen=True)
class ModelFolder:
    """A model and what its receipt says of it; an official folder has no receipt, and so no facts."""

    name: str
    """What the user called it."""
    path: Path
    config: dict[str, Any]
    """Its config.json."""
    facts: dict[str, Any]

    @property
    def location(self) -> str:
        """How to refer to it from other folders and nodes: `tiny`, or the absolute path."""
        return self.name if self.name == "tiny" else str(self.path.resolve())

    @property
    def tokenizer(self) -> str:
        """Fingerprint of its tokenizer."""
        return load_tokenizer(self.path).fingerprint

    @property
    def weights_digest(self) -> str:
        """sha256 over names, shapes and a sample of each tensor, rounded to bf16: read in a moment at any size.

        It is the same for a model's `.bin`, safetensors, official, native, 16-bit and fp32 folders. Raises ModelError
        for an incomplete or damaged folder.
        """
        weights = open_weights(self.path)
        tensors: Mapping[str, torch.Tensor] = {name: tensor for name, (_, tensor) in weights.items()}
        if self.config["model_type"] == "chatglm" and "quantization_bit" not in self.config:
            tensors = official.native_tensors(self.path, weights, read_config(self.path))
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            start = max(0, tensor.numel() - SAMPLE) // 2
            sample = tensor.reshape(-1)[start : start + SAMPLE].to(torch.bfloat16)
            digest.update(f"{name} {tuple(tensor.shape)} ".encode() + sample.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def prompt_format(self) -> PromptFormat:
        """What the model was tuned with; official models are asked in the official chat format."""
        found: PromptFormat = self.facts.get("prompt_format", "chat")
        return found


def open_model(reference: str, flag: str) -> ModelFolder:
    """The model that `flag` refers to. Raises StageError or ModelError where there is none that can be used."""
    if reference != "tiny" and not Path(reference).is_dir():
        raise StageError(f"{reference}: there is no such model folder; give the right one with {flag}")
    path = model_folder(reference)
    receipt = storage.read_receipt(path)
    if (path / "adapter_config.json").is_file():
        remedy = f"fold it into its base first: merge --adapter {reference} --out DIR"
        raise StageError(f"{flag} {reference} is an adapter, but a model is needed here; {remedy}")
    if receipt and receipt.stage != "merge":
        raise StageError(
            f"{flag} {reference} was written by {receipt.stage}, but a model written by merge is needed here"
        )
    config = read_json(path / "config.json")
    if config.get("model_type") not in ("chatglm", "glm"):
        raise ModelError(
            f"{path / 'config.json'}: model_type is {config.get('model_type')!r}, but only ChatGLM3 is supported; "
            f"give an official chatglm3-6b folder or one that merge wrote"
        )
    if config["model_type"] == "glm" and not receipt:
        raise StageError(f"{flag} {reference} has no {storage.RECEIPT}: merge did not finish there; run it again")
    return ModelFolder(reference, path, config, receipt.facts if receipt else {})


def folder_digest(path: Path) -> str:
    """sha256 that stands for a model's or an adapter's folder: of its receipt, which pins what it was made from.

    Without one, of a model's configuration, or of an adapter's configuration and weights.
    """
    if (path / storage.RECEIPT).is_file():
        return storage.file_digest(path / storage.RECEIPT)
    if (path / "config.json").is_file():
        return storage.file_digest(path / "config.json")
    files = sorted(path.glob("adapter_*"))
    return hashlib.sha256("".join(f"{file.name} {storage.file_digest(file)}\n" for file in files).encode()).hexdigest()


def warn_of_other_wording(model: ModelFolder, digest: str = "", whose: str = "this version's") -> None:
    """Say so on stderr if the model was tuned on document prompts that are worded otherwise than it will be asked.

    `digest` is that of the questions' wording, if they were written before; `whose` says whose it is.
    """
    asked = digest or format_digest()
    if model.facts.get("prompt_digest", asked) != asked:
        print(
            f"warning: {model.name} was tuned with another wording of the document prompt than {whose}; "
            f"expect worse answers until it is tuned again",
            file=sys.stderr,
        )
