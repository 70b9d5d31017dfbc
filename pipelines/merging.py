"""Base model and adapter in, one servable model folder out."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from transformers import GenerationConfig

from chatglm3 import load_tokenizer
from chatglm3.chat import PromptFormat
from chatglm3.checkpoint import open_tensors, read_config
from cluster import storage
from cluster.config import Config
from cluster.errors import StageError
from pipelines.folding import folded, read_updates
from pipelines.model_folders import ModelFolder, folder_digest, open_model
from pipelines.weight_files import write_weights
from pipelines.weight_formats import QUANTISE, WeightFormat, is_quantised, quantization_config, through_nf4


class MergeConfig(Config):
    """Fold a LoRA adapter into its 16-bit base and write one model folder to evaluate, chat with and serve.

    --base DIR without --adapter only converts that model to --format.
    """

    adapter: str | dict[str, float] = "out/adapter"
    """Folder written by train, or a PEFT adapter of the official modelling code (needs --base). Several adapters of one
    base are added up with factors: "{DIR: 0.7, DIR: 0.3}"."""
    base: str = ""
    """Model that the adapter belongs to, if it is not where it was trained."""
    other_base: bool = False
    """Fold an adapter into weights that it was not trained on."""
    prompt_format: PromptFormat | None = None
    """chat|bare: what an adapter without a receipt was trained with; the predecessor's were with bare."""
    format: WeightFormat = "bf16"
    """Format of the weights. nf4 and int8: bitsandbytes; fp8 and w4a16: compressed-tensors, which vLLM runs fastest."""
    onto: Literal["16bit", "nf4"] = "16bit"
    """What an adapter is added to: the base's own weights, or what NF4 leaves of them, which QLoRA trained it on."""
    out: str = "out/model"
    """Folder to write."""

    @model_validator(mode="before")
    @classmethod
    def _base_alone_means_no_adapter(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"adapter": "", **values} if values.get("base") else values

    @property
    def adapters(self) -> dict[str, float]:
        """Adapter folders and their factors; none for a model that is only converted."""
        if isinstance(self.adapter, dict):
            return self.adapter
        return {self.adapter: 1.0} if self.adapter else {}


def merge(config: MergeConfig) -> str:
    """Fold an adapter into its base model and return the model folder."""
    storage.check_output(config.out, "merge")
    told = _told_by_all(config)
    base = open_base(config, told)
    paths = [base.path, *map(Path, config.adapters)]
    inputs = {str(path): folder_digest(path) for path in paths}
    receipt = storage.receipt_of("merge", config, inputs=inputs, facts=make_facts(config, base, told))
    with storage.publish(config.out, receipt, _digest(config, base, inputs)) as folder:
        _write_model(folder, base, config)
        write_companions(base.path, folder)
        receipt.counts["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    names = " + ".join(name if factor == 1 else f"{factor} x {name}" for name, factor in config.adapters.items())
    what = f"{names} folded into {base.name}" if names else f"{base.name} converted"
    size = f"{receipt.counts['bytes'] / 1e6:,.1f} MB"
    print(f"merge: {what}, {config.format}, {size} in {receipt.seconds} s -> {config.out}")
    return config.out


def open_base(config: MergeConfig, told: dict[str, Any]) -> ModelFolder:
    """The model to start from. `told` is what the adapter's receipt says.

    Raises StageError if the weights are quantised by bitsandbytes, or the adapter was trained with another tokenizer
    or, unless that is asked for, on other weights.
    """
    base = open_model(config.base or told["base"], "--base")
    if "quantization_config" in base.config:
        raise StageError(f"--base {base.name} is quantised already; give the 16-bit model it was made from")
    if bits := base.config.get("quantization_bit"):
        print(f"merge: {base.name} is in the official int{bits} format; it is dequantised first", file=sys.stderr)
    adapter = ", ".join(config.adapters)
    if told.get("tokenizer", base.tokenizer) != base.tokenizer:
        raise StageError(
            f"--adapter {adapter} was trained on {told['base']}, whose tokenizer is not that of "
            f"--base {base.name}; give the model it was trained on"
        )
    if "base_digest" in told and told["base_digest"] != base.weights_digest and not config.other_base:
        raise StageError(
            f"{base.name} does not hold the weights that --adapter {adapter} was trained on ({told['base']} at "
            f"that time); give those with --base, or fold it into others knowingly with --other_base true"
        )
    return base


def make_facts(config: MergeConfig, base: ModelFolder, told: dict[str, Any]) -> dict[str, Any]:
    """What the receipt tells later stages: what the adapter's told, or without adapter the base's, and the format."""
    if not config.adapters:
        told = base.facts
    prompt_format = told.get("prompt_format", config.prompt_format or "chat")
    if config.prompt_format not in (None, prompt_format):
        raise StageError(
            f"--prompt_format {config.prompt_format}: the receipt says {prompt_format}; leave the flag out"
        )
    origin = base.location if config.adapters else told.get("base", base.location)
    if config.adapters:
        told = told | {"base_digest": base.weights_digest, "onto": config.onto}
    known = {"base": origin, "prompt_format": prompt_format, "tokenizer": base.tokenizer, "format": config.format}
    return told | known


def _told_by_all(config: MergeConfig) -> dict[str, Any]:
    """What the adapters' receipts say; nothing for adapters of somebody else, or for none."""
    if not config.adapters and not config.base:
        raise StageError("--adapter and --base are both empty; give one of them")
    told = {path: _facts_of(Path(path), config) for path in config.adapters}
    for name in ("base_digest", "tokenizer", "prompt_format"):
        if len({facts.get(name) for facts in told.values()}) > 1:
            raise StageError(f"--adapter {', '.join(told)}: they differ in {name}, so they cannot be added up")
    return next(iter(told.values()), {})


def _facts_of(path: Path, config: MergeConfig) -> dict[str, Any]:
    if storage.read_receipt(path) or not (path / "adapter_config.json").is_file():
        return storage.open_folder(path, "train").receipt.facts
    if not config.base:
        raise StageError(
            f"--adapter {path} has no receipt to say what it was trained on; give that model as --base DIR"
        )
    if not config.prompt_format:
        print(
            f"merge: {path} has no receipt; taken for an adapter of the chat format "
            f"(the predecessor's were trained on bare text: --prompt_format bare)",
            file=sys.stderr,
        )
    return {}


def _digest(config: MergeConfig, base: ModelFolder, inputs: dict[str, str]) -> str:
    """Stands for the weights that are made."""
    made = [base.weights_digest, inputs, config.adapters, config.format, config.onto]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def _write_model(folder: Path, base: ModelFolder, config: MergeConfig) -> None:
    """Weights and config.json. Memory holds one file's tensors beside the mapped ones, whatever the model's size."""
    settings = read_config(base.path)
    tensors = open_tensors(base.path, settings)
    updates = read_updates(config.adapters, settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # for quantising: a minute on two cores, a second there

    def make(name: str) -> dict[str, torch.Tensor]:
        weight = tensors[name]
        if name in updates:
            if config.onto == "nf4":
                weight = through_nf4(weight.bfloat16())
            weight = folded(weight, updates[name])  # rounded once, here: PEFT's own merge rounds twice
        weight = weight.bfloat16()
        if config.format == "bf16" or not is_quantised(name):
            return {name: weight.contiguous()}
        made = QUANTISE[config.format](name, weight.to(device))
        return {part: tensor.cpu().contiguous() for part, tensor in made.items()}

    write_weights(folder, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, make)
    settings.architectures, settings.dtype = ["GlmForCausalLM"], torch.bfloat16
    settings.name_or_path = ""
    if method := quantization_config(config.format):
        settings.quantization_config = method
    settings.save_pretrained(folder)


def write_companions(base: Path, folder: Path) -> None:
    """The tokenizer, the weights' licence, and where generation stops: at </s>, <|user|> and <|observation|>."""
    for name in ("tokenizer.model", "MODEL_LICENSE"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    tokenizer = load_tokenizer(base)
    GenerationConfig(eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.pad_id).save_pretrained(folder)
