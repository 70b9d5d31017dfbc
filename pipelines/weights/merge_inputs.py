"""What merge starts from: which base an adapter belongs to, and what the receipts say of both."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatglm3.folder import read_json
from cluster import storage
from cluster.errors import StageError
from pipelines.model_folders import ModelFolder, open_model
from pipelines.weights.merge_config import MergeConfig
from pipelines.weights.merge_verdict import worst_verdict

LICENSE = "chatglm3-6b-model-license"
TRAINED_WITH = ("base_format", "learning_rate", "schedule", "epochs", "max_steps", "batch_size", "seed")


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
        own = [f"{whose}{fact}" for whose in ("", "base_") for fact in ("verdict", "past_by")]
        told = {name: fact for name, fact in base.facts.items() if name not in own}
    prompt_format = told.get("prompt_format", config.prompt_format or "chat")
    if config.prompt_format not in (None, prompt_format):
        raise StageError(
            f"--prompt_format {config.prompt_format}: the receipt says {prompt_format}; leave the flag out"
        )
    origin = base.location if config.adapters else told.get("base", base.location)
    if config.adapters:
        recipes = {path: _recipe(path, told) for path in config.adapters}
        told = told | {"base_digest": base.weights_digest, "recipe": recipes}
    known = {"base": origin, "prompt_format": prompt_format, "tokenizer": base.tokenizer, "format": config.format}
    known["license"] = "apache-2.0" if base.name == "tiny" else base.facts.get("license", LICENSE)
    return told | known | _facts_of_base(base)


def _facts_of_base(base: ModelFolder) -> dict[str, str]:
    """The verdict on the base, lest a model that was refused is within the limits beside itself."""
    verdict = worst_verdict(base.facts)
    if verdict and verdict.state == "past the limits":
        print(
            f"warning: --base {base.name} is {verdict}; what is made of it is measured beside it, not beside the model "
            f"that was trained",
            file=sys.stderr,
        )
    return verdict.facts("base_") if verdict else {}


def told_by_all(config: MergeConfig) -> dict[str, Any]:
    """What all adapters' receipts say alike; nothing for adapters of somebody else, or for none."""
    if not config.adapters and not config.base:
        raise StageError("--adapter and --base are both empty; give one of them")
    told = [_facts_of(Path(path), config) for path in config.adapters]
    for name in ("base_digest", "tokenizer", "prompt_format"):
        if len({facts.get(name) for facts in told}) > 1:
            raise StageError(
                f"--adapter {', '.join(config.adapters)}: they differ in {name}, so they cannot be added up"
            )
    first = told[0] if told else {}
    # One base may have stood at different places: its digest, which is the same, says that it is one.
    return {n: fact for n, fact in first.items() if n == "base" or all(facts.get(n) == fact for facts in told)}


def _recipe(adapter: str, told_by_all: Mapping[str, Any]) -> dict[str, Any]:
    """What the adapter is, how it was trained, and what it was trained on if others were not, as far as it is known."""
    lora = read_json(Path(adapter, "adapter_config.json"))
    targets = lora.get("target_modules")
    targets = " ".join(sorted(targets)) if isinstance(targets, list) else targets
    receipt = storage.read_receipt(adapter)
    trained = receipt.config if receipt else {}
    known = {"rank": lora.get("r"), "alpha": lora.get("lora_alpha"), "targets": targets}
    own = {name: fact for name, fact in (receipt.facts if receipt else {}).items() if name not in told_by_all}
    return known | {name: trained[name] for name in TRAINED_WITH if trained.get(name)} | own


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
