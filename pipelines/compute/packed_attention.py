"""Attention within each example of a packed block, registered with transformers under the name `packed`."""

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipelines.compute import flash_attention_4

NAME = "packed"
# torch 2.13 wants to be told that keys and values have fewer heads; 2.11 has no such word and takes them as they are.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention within each packed example.

    query [1, heads, tokens, dim], key and value [1, groups, tokens, dim] -> [1, tokens, heads, dim]. `boundaries` and
    `longest` are a PackedBatch's. The GPU's kernel knows 16-bit numbers only; the rest is computed example by example.
    """
    boundaries: Tensor = kwargs["boundaries"]
    scale: float = kwargs["scaling"]
    if not query.is_cuda or query.dtype == torch.float32:
        return _one_by_one(query, key, value, boundaries, scale), None
    longest: int = kwargs["longest"]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if flash_attention_4.is_there(query.device):
        output, _ = flash_attention_4.attend(query, key, value, boundaries, longest, scale)
    else:
        output = flash_attention_2(query, key, value, boundaries, longest, scale)
    return output[None], None


def flash_attention_2(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scale: float
) -> Tensor:
    """PyTorch's own kernel; arguments and output as `flash_attention_4.attend`'s."""
    causal = (-1, 0)
    output = varlen_attn(
        query, key, value, boundaries, boundaries, longest, longest, scale=scale, window_size=causal, **_GROUPED
    )
    assert isinstance(output, Tensor)
    return output


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float) -> Tensor:
    repeat = query.shape[1] // key.shape[1]  # the CPU's flash kernel knows no groups
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    pieces = [
        F.scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], is_causal=True, scale=scale
        )
        for start, end in pairwise(boundaries.tolist())
        if start < end
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
