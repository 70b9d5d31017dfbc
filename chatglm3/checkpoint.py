"""ChatGLM3 weights, in the official layout or the native one, as transformers' own GlmForCausalLM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GlmConfig, GlmForCausalLM
from transformers.utils.quantization_config import QuantizationConfigMixin

from chatglm3 import official
from chatglm3.errors import ModelError
from chatglm3.folder import model_folder, read_json
from chatglm3.weights import Weight, open_weights


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantization_config: QuantizationConfigMixin | None = None,
    device_map: Any = None,
) -> GlmForCausalLM:
    """The model in a folder, in evaluation mode.

    `folder` is an official ChatGLM3 download (.bin or safetensors; 16-bit, int8 or int4), a folder written by
    `save_pretrained` (quantised by bitsandbytes or not), or "tiny". Without `dtype` it is the config's; weights
    stored in that dtype stay memory-mapped. `quantization_config` and `device_map` are `from_pretrained`'s.
    ModelError if the folder is incomplete, damaged or of another model family.
    """
    folder = model_folder(folder)
    config = read_config(folder)
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised and quantization_config is not None:
        raise ModelError(f"{folder}/config.json has a quantization_config: load the 16-bit model, or leave yours out")
    if quantised and config.quantization_config.get("quant_method") == "compressed-tensors":
        # Else they stay packed until the first forward pass of the whole model, and an engine runs its layers alone.
        config.quantization_config["dequantize"] = True
    tensors = dict(open_tensors(folder, config))
    # A state dict is the public way in for renamed tensors. A conversion mapping would be undone again on saving,
    # which leaves hybrid folders, and NF4 ones that cannot be loaded.
    model: GlmForCausalLM = GlmForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype or config.dtype,
        quantization_config=quantization_config,
        device_map=device_map,
    )
    # transformers puts "None", which PEFT would look up on the hub whenever it saves an adapter. A path is no better:
    # PEFT would read an official config.json as GLM-4's, find another vocabulary and save the embeddings too.
    model.name_or_path = model.config.name_or_path = ""
    if getattr(model, "is_loaded_in_4bit", False):
        _keep_gradients_right(model)
    return model


def open_tensors(folder: Path, config: GlmConfig) -> Mapping[str, torch.Tensor]:
    """Native name -> tensor of a folder with that config. They stay on disk until they are used; official int8 and
    int4 ones are dequantised whenever they are asked for.

    ModelError if a tensor is missing, left over or of another shape.
    """
    weights = open_weights(folder)
    if _is_official(folder):
        return official.native_tensors(folder, weights, config)
    return _checked(folder, weights, config, quantised=getattr(config, "quantization_config", None) is not None)


def read_config(folder: str | Path) -> GlmConfig:
    """The GlmConfig of an official or native folder. ModelError if it is of another model family."""
    folder = model_folder(folder)
    file = folder / "config.json"
    raw = read_json(file)
    try:
        if _is_official(folder):
            return official.translate_config(folder, raw)
        config = GlmConfig.from_dict(raw)
    except StrictDataclassError as error:
        raise ModelError(f"{file}: {' '.join(str(error).split())}: download the folder again") from None
    if config.pad_token_id != 0:
        raise ModelError(f"{file}: pad_token_id is {config.pad_token_id}, as in GLM-4: use a ChatGLM3-6B folder")
    method = (raw.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
    if method not in ("bitsandbytes", "compressed-tensors"):
        raise ModelError(
            f"{file}: quant_method is {method!r}, of which nothing is known here: merge writes other forms"
        )
    return config


def _is_official(folder: Path) -> bool:
    file = folder / "config.json"
    model_type = read_json(file).get("model_type")
    if model_type not in ("chatglm", "glm"):
        raise ModelError(f"{file}: model_type is {model_type!r}, not 'chatglm' or 'glm': use a ChatGLM3-6B folder")
    return bool(model_type == "chatglm")


def _checked(folder: Path, weights: dict[str, Weight], config: GlmConfig, quantised: bool) -> dict[str, torch.Tensor]:
    """The tensors of a native folder. ModelError where transformers would only warn and make a tensor up."""
    expected = official.native_shapes(config)
    for name in expected:
        if name not in weights and f"{name}_packed" not in weights:
            raise ModelError(f"{folder}: no weight file holds {name}: write or download the folder again, completely")
    for name, (file, tensor) in weights.items():
        if name in expected and tensor.is_floating_point() and tensor.shape != expected[name]:
            shapes = f"{tuple(tensor.shape)}, config.json wants {expected[name]}"
            raise ModelError(f"{file}: {name} is {shapes}: use its own config.json")
        # Quantised tensors have companions: x.weight.absmax (nf4), x.SCB (int8), x.weight_scale (fp8, w4a16).
        if name not in expected and not quantised:
            raise ModelError(f"{file}: {name} is not in the model of config.json: use its own config.json")
    return {name: tensor for name, (_, tensor) in weights.items()}


def _keep_gradients_right(model: GlmForCausalLM) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    A forward pass in evaluation mode would repack them for a kernel that has no gradient, and training after it
    goes on silently with wrong gradients (cosine 0.92 to 0.95 to the right ones, bitsandbytes 0.50).
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
