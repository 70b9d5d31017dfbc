"""LoRA adapters for the native model: ours, and old ones that were trained on the official module names."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from transformers import GlmConfig, GlmForCausalLM

from chatglm3 import official
from chatglm3.errors import ModelError
from chatglm3.folder import model_folder, read_json
from chatglm3.weights import read_shard

Tensors = dict[str, torch.Tensor]

_PREFIX = "base_model.model."
_AXES = {"A.weight": 1, "B.weight": 0, "magnitude_vector": 0}
"""Of what an adapter has for a layer, where the layer's features are: those it reads, else those it writes."""
_CONVERTIBLE: dict[str, tuple[object, ...]] = {
    "alpha_pattern": ({}, None),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian"),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "use_dora": (False,),
}
"""Values that an old adapter can have: others speak of official modules, or of more than A and B."""


def load_adapter(model: GlmForCausalLM, folder: str | Path) -> PeftModelForCausalLM:
    """The model with a LoRA adapter on it, in evaluation mode. ModelError if the adapter is of another base."""
    config, tensors = native_adapter(folder, model.config)
    adapted = PeftModelForCausalLM(model, config)
    try:
        report: Any = set_peft_model_state_dict(adapted, tensors)
    except RuntimeError as error:
        raise ModelError(f"{folder}: {' '.join(str(error).split())}: use the base it was trained on") from None
    absent = [name for name in report.missing_keys if ".lora_" in name]
    if faults := absent + report.unexpected_keys:
        raise ModelError(f"{folder}: {faults[0]} is only in adapter or base: use the base it was trained on")
    adapted.eval()
    return adapted


def native_adapter(folder: str | Path, base: GlmConfig) -> tuple[LoraConfig, Tensors]:
    """PEFT config and tensors (under PEFT's names) of an adapter, for the native model that `base` describes.

    An adapter on the official modules is converted exactly: the A of query_key_value goes to q, k and v, its B is
    split by rows. ModelError if the adapter is incomplete, not LoRA, or of a base with other shapes.
    """
    folder = model_folder(folder)
    file = folder / "adapter_config.json"
    raw = read_json(file)
    if raw.get("peft_type") != "LORA":
        raise ModelError(f"{file}: peft_type is {raw.get('peft_type')!r}: only LORA adapters can be loaded")
    config = LoraConfig.from_pretrained(str(folder))
    tensors = _open_tensors(folder)
    if any(name.startswith(f"{_PREFIX}transformer.") for name in tensors):
        for field, values in _CONVERTIBLE.items():
            if raw.get(field, values[0]) not in values:
                raise ModelError(
                    f"{file}: {field} {raw[field]!r} cannot be converted: merge it with its own code first"
                )
        tensors = _converted(folder, tensors, base)
        config.target_modules = {name.split(".")[-3] for name in tensors}
        config.base_model_name_or_path = None
    _check_shapes(folder, tensors, base)
    return config, tensors


def lora_scale(config: LoraConfig, module: str, rank: int) -> float:
    """What B A of a module (under PEFT's name) is multiplied with: alpha / rank, or alpha / sqrt(rank) in rsLoRA."""
    alphas = config.alpha_pattern or {}
    alpha: float = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _open_tensors(folder: Path) -> Tensors:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return read_shard(folder / name)
    raise ModelError(f"{folder} holds no adapter_model.safetensors: give the folder that training wrote")


def _converted(folder: Path, tensors: Tensors, base: GlmConfig) -> Tensors:
    layout = official.layout(base)
    native: Tensors = {}
    for name, tensor in tensors.items():
        module, _, matrix = name.removeprefix(_PREFIX).rpartition(".lora_")
        target = layout.get(f"{module}.weight")
        if target is None or matrix not in ("A.weight", "B.weight"):
            raise ModelError(f"{folder}: the base has no place for {name}: use the base it was trained on")
        names = [f"{_PREFIX}{part.removesuffix('.weight')}.lora_{matrix}" for part in target.parts]
        if matrix == "A.weight":
            native |= dict.fromkeys(names, tensor)
        elif len(tensor) == target.shape[0]:
            native |= zip(names, torch.split(tensor, list(target.parts.values())), strict=True)
        else:
            raise ModelError(f"{folder}: {name} has {len(tensor)} rows, the base {target.shape[0]}: use its own base")
    return native


def _check_shapes(folder: Path, tensors: Tensors, base: GlmConfig) -> None:
    shapes = official.native_shapes(base)
    for name, tensor in tensors.items():
        module, _, matrix = name.removeprefix(_PREFIX).rpartition(".lora_")
        if matrix not in _AXES:
            continue
        shape = shapes.get(f"{module}.weight")
        if shape is None:
            raise ModelError(f"{folder}: the base has no {module}: use the base it was trained on")
        if tensor.ndim != (1 if matrix == "magnitude_vector" else 2):
            raise ModelError(f"{folder}: {name} is no matrix of an adapter, its shape is {tuple(tensor.shape)}")
        wanted, found = shape[_AXES[matrix]], tensor.shape[_AXES[matrix]]
        if wanted != found:
            raise ModelError(f"{folder}: {name} is for {found} features, the base has {wanted}: use its own base")
        other = tensors.get(name.replace(".lora_A.", ".lora_B.")) if matrix == "A.weight" else None
        if other is not None and other.ndim == 2 and len(tensor) != other.shape[1]:
            raise ModelError(f"{folder}: {name} has rank {len(tensor)}, its lora_B {other.shape[1]}; train it anew")
