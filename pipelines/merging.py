"""Base model and adapter in, one servable model folder out."""

import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from pydantic import model_validator
from transformers import GenerationConfig, GlmForCausalLM

from chatglm3 import load_model, load_tokenizer
from chatglm3.adapters import load_adapter
from chatglm3.chat import PromptFormat
from chatglm3.quantization import INT8, NF4
from cluster import storage
from cluster.config import Config
from cluster.errors import StageError
from pipelines.model_folders import ModelFolder, folder_digest, open_model

QUANTIZATION = {"nf4": NF4, "int8": INT8}


class MergeConfig(Config):
    """Fold a LoRA adapter into its 16-bit base and write one model folder to evaluate, chat with and serve.

    --base DIR without --adapter only converts that model to --format.
    """

    adapter: str = "out/adapter"
    """Folder written by train, or a PEFT adapter of the official modelling code (needs --base)."""
    base: str = ""
    """Model that the adapter belongs to, if it is not where it was trained."""
    other_base: bool = False
    """Fold an adapter into weights that it was not trained on."""
    prompt_format: PromptFormat | None = None
    """chat|bare: what an adapter without a receipt was trained with; the predecessor's were with bare."""
    format: Literal["bf16", "nf4", "int8"] = "bf16"
    """Format of the weights."""
    out: str = "out/model"
    """Folder to write."""

    @model_validator(mode="before")
    @classmethod
    def _base_alone_means_no_adapter(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"adapter": "", **values} if values.get("base") else values


def merge(config: MergeConfig) -> str:
    """Fold an adapter into its base model and return the model folder."""
    storage.check_output(config.out, "merge")
    told = _adapter_facts(config)
    base = open_base(config, told)
    paths = [base.path, Path(config.adapter)] if config.adapter else [base.path]
    inputs = {str(path): folder_digest(path) for path in paths}
    receipt = storage.receipt_of("merge", config, inputs=inputs, facts=make_facts(config, base, told))
    with storage.publish(config.out, receipt) as folder:
        model = load_model(base.path)
        if config.adapter:
            model = fold(load_adapter(model, config.adapter))
        in_format(model.to(torch.bfloat16), config.format).save_pretrained(folder)
        write_companions(base.path, folder)
        receipt.counts["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    what = f"{config.adapter} folded into {base.name}" if config.adapter else f"{base.name} converted"
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
    if told.get("tokenizer", base.tokenizer) != base.tokenizer:
        raise StageError(
            f"--adapter {config.adapter} was trained on {told['base']}, whose tokenizer is not that of "
            f"--base {base.name}; give the model it was trained on"
        )
    if "base_digest" in told and told["base_digest"] != base.weights_digest and not config.other_base:
        raise StageError(
            f"{base.name} does not hold the weights that --adapter {config.adapter} was trained on ({told['base']} at "
            f"that time); give those with --base, or fold it into others knowingly with --other_base true"
        )
    return base


def make_facts(config: MergeConfig, base: ModelFolder, told: dict[str, Any]) -> dict[str, Any]:
    """What the receipt tells later stages: what the adapter's told, or without adapter the base's, and the format."""
    if not config.adapter:
        told = base.facts
    prompt_format = told.get("prompt_format", config.prompt_format or "chat")
    if config.prompt_format not in (None, prompt_format):
        raise StageError(
            f"--prompt_format {config.prompt_format}: the receipt says {prompt_format}; leave the flag out"
        )
    origin = base.location if config.adapter else told.get("base", base.location)
    if config.adapter:
        told = told | {"base_digest": base.weights_digest}
    known = {"base": origin, "prompt_format": prompt_format, "tokenizer": base.tokenizer, "format": config.format}
    return told | known


def _adapter_facts(config: MergeConfig) -> dict[str, Any]:
    """What the adapter's receipt says; nothing for an adapter of somebody else, or for none."""
    if not config.adapter:
        if not config.base:
            raise StageError("--adapter and --base are both empty; give one of them")
        return {}
    path = Path(config.adapter)
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


def fold(adapted: PeftModel) -> GlmForCausalLM:
    """The base model with the adapter's updates in its weights: added in fp32 and rounded once, to bf16."""
    name = adapted.active_adapter
    lora = adapted.peft_config[name]
    for field, simple in (("use_dora", False), ("modules_to_save", None), ("bias", "none"), ("lora_bias", False)):
        if getattr(lora, field) not in (simple, []):
            raise StageError(f"adapter_config.json: {field} is {getattr(lora, field)!r}, which cannot be folded in")
    # PEFT's own merge rounds the update to the weights' dtype first, and the sum a second time.
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            weight.data = (weight.float() + layer.get_delta_weight(name)).to(torch.bfloat16)
    return adapted.unload()


def in_format(model: GlmForCausalLM, weight_format: str) -> GlmForCausalLM:
    """A bf16 model with its linear layers, but for the output layer, in `weight_format`; on the GPU if there is one."""
    if weight_format == "bf16":
        return model
    return GlmForCausalLM.from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=torch.bfloat16,
        quantization_config=QUANTIZATION[weight_format],
        device_map={"": "cuda:0" if torch.cuda.is_available() else "cpu"},
    )


def write_companions(base: Path, folder: Path) -> None:
    """The tokenizer, the weights' licence, and where generation stops: at </s>, <|user|> and <|observation|>."""
    for name in ("tokenizer.model", "MODEL_LICENSE"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    tokenizer = load_tokenizer(base)
    GenerationConfig(eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.pad_id).save_pretrained(folder)
