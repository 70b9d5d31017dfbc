"""FlashAttention 4 on packed examples, where its package is: on Hopper faster than PyTorch's FlashAttention 2.

Operators of our own, as torch.compile cannot look into the package's functions, and torch.nn.attention's registration
of them is for an earlier beta.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

CAPABILITIES = (9, 10)
"""Major compute capabilities that it has kernels for, both passes: Hopper and Blackwell."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_there(device: torch.device) -> bool:
    """Whether the package is installed and has kernels for this GPU."""
    return _is_installed() and torch.cuda.get_device_capability(device)[0] in CAPABILITIES


@cache
def _is_installed() -> bool:
    try:
        return bool(version("flash-attn-4"))  # not its module: flash-attn 2 brings that too, without what it needs
    except PackageNotFoundError:
        return False


@custom_op("chatglm3::packed_attention", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within each example, in 16 bits.

    query [tokens, heads, dim], key and value [tokens, groups, dim], boundaries [examples + 1] -> as query, and the
    logarithm of each softmax's sum [heads, tokens], which the backward pass needs.
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    output, log_sums, *_ = _flash_attn_fwd(
        *(tensor.contiguous() for tensor in (query, key, value)),
        **_within_examples(boundaries, longest, scale),
        return_lse=True,
    )
    return output, log_sums


@attend.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens, heads = query.shape[:2]
    return query.new_empty(query.shape), query.new_empty((heads, tokens), dtype=torch.float32)


@custom_op("chatglm3::packed_attention_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    boundaries: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    of_query, of_key, of_value, *_ = _flash_attn_bwd(
        *(tensor.contiguous() for tensor in (query, key, value, output, gradient)),
        log_sums,
        **_within_examples(boundaries, longest, scale),
    )
    return of_query, of_key, of_value


@_attend_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return of_query, of_key, of_value


def _within_examples(boundaries: Tensor, longest: int, scale: float) -> dict[str, Any]:
    """What both passes are told."""
    return {
        "cu_seqlens_q": boundaries,
        "cu_seqlens_k": boundaries,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "softmax_scale": scale,
        "causal": True,
    }


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int, float], output: tuple[Tensor, Tensor]) -> None:
    *projections, boundaries, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(*projections, *output, boundaries)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    return *_attend_backward(gradient, *ctx.saved_tensors, ctx.longest, ctx.scale), None, None, None


attend.register_autograd(_backward, setup_context=_keep)
