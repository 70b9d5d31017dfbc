"""Formats of linear layers' weights on disk, each as tensors of one matrix and the config.json entry that names it.

bitsandbytes' are laid out as transformers saves them, fp8 and w4a16 as compressed-tensors does, which vLLM runs.
"""

from collections.abc import Callable
from typing import Any, Literal

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from chatglm3.quantization import INT8, NF4

WeightFormat = Literal["bf16", "nf4", "int8", "fp8", "w4a16"]
Tensors = dict[str, Tensor]

GROUP = 128  # columns that share a scale in w4a16
FP8_MAX = 448.0


def is_quantised(name: str) -> bool:
    """Whether a format applies to a native tensor: to the layers' matrices, not to embeddings and output layer."""
    return name.endswith("_proj.weight")


def nf4(name: str, weight: Tensor) -> Tensors:
    """4-bit NormalFloat in blocks of 64, the blocks' scales quantised to 8 bits (arXiv:2305.14314)."""
    packed, state = _to_nf4(weight)
    return {name: packed, **{f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}


def through_nf4(weight: Tensor) -> Tensor:
    """The values of a bf16 weight after it was quantised to NF4: what QLoRA trains an adapter on."""
    return bnb.dequantize_4bit(*_to_nf4(weight))


def _to_nf4(weight: Tensor) -> tuple[Tensor, Any]:
    """Packed values, and bitsandbytes' description of them."""
    return bnb.quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")


def int8(name: str, weight: Tensor) -> Tensors:
    """8-bit integers with a scale a row (LLM.int8(), arXiv:2208.07339)."""
    values, row_maxima, _ = bnb.int8_vectorwise_quant(weight.half())
    module = name.removesuffix(".weight")
    return {name: values, f"{module}.SCB": row_maxima, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}


def fp8(name: str, weight: Tensor) -> Tensors:
    """8-bit floats (e4m3) with a scale a row; activations get theirs a token at run time."""
    scale = (weight.float().abs().amax(1, keepdim=True) / FP8_MAX).clamp(min=1e-12).bfloat16()
    values = (weight.float() / scale.float()).clamp(-FP8_MAX, FP8_MAX)
    return {name: values.to(torch.float8_e4m3fn), f"{name}_scale": scale}


def w4a16(name: str, weight: Tensor) -> Tensors:
    """4-bit integers, each the nearest, with a scale for GROUP columns of a row."""
    scale = group_scales(weight)
    return packed_int4(name, nearest_int4(weight, spread(scale)).to(torch.int32), scale)


def nearest_int4(weight: Tensor, scale: Tensor) -> Tensor:
    """The values from -8 to 7 that come nearest to a weight when they are multiplied with the scale."""
    return (weight.float() / scale.float()).round().clamp(-8, 7)


def spread(scale: Tensor) -> Tensor:
    """Scales [rows, columns / GROUP] to every column, in fp32."""
    return scale.float().repeat_interleave(GROUP, 1)


def group_scales(weight: Tensor) -> Tensor:
    """Scales [rows, columns / GROUP] at which each group's largest value is just inside of 4 bits."""
    return (weight.float().reshape(len(weight), -1, GROUP).abs().amax(2) / 7.5).clamp(min=1e-12).bfloat16()


def packed_int4(name: str, values: Tensor, scale: Tensor) -> Tensors:
    """int32 values from -8 to 7 [rows, columns], eight to an int32, the first in the lowest bits."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    packed = ((values + 8).unflatten(1, (-1, 8)) << shifts).sum(2, dtype=torch.int32)  # no two share a bit
    shape = torch.tensor(values.shape, dtype=torch.int64)
    return {f"{name}_packed": packed, f"{name}_scale": scale, f"{name}_shape": shape}


QUANTISE: dict[str, Callable[[str, Tensor], Tensors]] = {"nf4": nf4, "int8": int8, "fp8": fp8, "w4a16": w4a16}
"""Format -> the tensors that stand for a bf16 matrix [rows, columns] of that name."""


def quantization_config(weight_format: WeightFormat) -> dict[str, Any] | None:
    """What config.json says of a format; None for bf16."""
    if weight_format == "bf16":
        return None
    if weight_format in ("nf4", "int8"):
        return (NF4 if weight_format == "nf4" else INT8).to_dict()
    weights = {"symmetric": True, "dynamic": False}
    if weight_format == "fp8":
        group = {
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", **weights},
            "input_activations": {**weights, "num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    else:
        group = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if weight_format == "fp8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": ["lm_head"],
    }
