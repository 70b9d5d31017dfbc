"""The training step on packed blocks: attention within examples, loss on answer tokens alone. Callable without Ray."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GlmForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatglm3 import load_model
from chatglm3.quantization import NF4
from pipelines.blocks import Block

BaseFormat = Literal["nf4", "bf16", "fp32"]


@dataclass(frozen=True)
class PackedBatch:
    """One block on a device: input_ids and position_ids [1, tokens], boundaries [examples + 1], answer places."""

    input_ids: Tensor
    position_ids: Tensor
    boundaries: Tensor
    longest: int
    predictors: Tensor
    """Indices of the tokens that predict a target, [targets]."""
    targets: Tensor
    """The ids they are to predict, [targets]."""


def trainable_model(base: str, base_format: BaseFormat, lora: LoraConfig, device: torch.device) -> PeftModel:
    """The frozen base in `base_format` with fresh LoRA adapters in fp32, ready for `answer_loss`."""
    model = load_model(
        base,
        dtype=torch.float32 if base_format == "fp32" else torch.bfloat16,
        quantization_config=NF4 if base_format == "nf4" else None,
        device_map={"": device},
    )
    model.set_attn_implementation("packed")
    model.requires_grad_(False)
    adapted = get_peft_model(model, lora)
    adapted.train()
    return adapted


def recompute_layers(model: PeftModel) -> None:
    """Keep only each layer's input and compute the rest again in the backward pass: less memory, a third slower."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def to_batch(block: Block, device: torch.device) -> PackedBatch:
    """A block as tensors on `device`."""
    lengths = torch.tensor(block.lengths)
    # A target is predicted by the token before it; an example's first token is never a target.
    targets = torch.from_numpy(block.is_target.copy()).nonzero().flatten()
    ids = torch.from_numpy(block.input_ids.astype("int64"))
    return PackedBatch(
        input_ids=ids[None].to(device),
        position_ids=torch.cat([torch.arange(n) for n in block.lengths])[None].to(device),
        boundaries=F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32),
        longest=max(block.lengths),
        predictors=(targets - 1).to(device),
        targets=ids[targets].to(device),
    )


def answer_loss(model: PeftModel, batch: PackedBatch) -> Tensor:
    """Sum of the cross-entropy over the block's answer tokens, in fp32; logits exist at those tokens only."""
    glm: GlmForCausalLM = model.get_base_model()
    hidden = glm.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        boundaries=batch.boundaries,
        longest=batch.longest,
    ).last_hidden_state[0]
    return F.cross_entropy(glm.lm_head(hidden[batch.predictors]).float(), batch.targets, reduction="sum")


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention within each packed example; registered with transformers as `packed`.

    query [1, heads, tokens, dim], key and value [1, groups, tokens, dim] -> [1, tokens, heads, dim].
    """
    boundaries: Tensor = kwargs["boundaries"]
    scale: float = kwargs["scaling"]
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        longest: int = kwargs["longest"]
        output = varlen_attn(
            *flat, boundaries, boundaries, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=True
        )
        return output[None], None
    repeat = query.shape[1] // key.shape[1]  # the CPU's flash kernel knows no groups
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    pieces = [
        F.scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], is_causal=True, scale=scale
        )
        for start, end in pairwise(boundaries.tolist())
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)


def sum_over_workers(parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
    """Add up gradients (in place) and `loss` over all workers in one exchange; returns the total loss.

    The gradients of LoRA adapters are a few megabytes, so one flat buffer beats overlapped buckets, and a worker
    may have any number of blocks, none included.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return loss
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([loss.reshape(1), *(g.float().flatten() for g in gradients)])
    dist.all_reduce(flat)
    sizes = [p.numel() for p in parameters]
    for parameter, gradient in zip(parameters, flat[1:].split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    return flat[0]


def run_blocks(model: PeftModel, blocks: Iterable[Block], target_count: int, seed: str) -> Tensor:
    """Forward and backward of this worker's blocks; returns its share of the mean loss.

    The loss is divided by `target_count`, the answer tokens of the whole global step, so that gradients add up to
    those of one big batch. Dropout is seeded by `seed` and the block: the same on any worker.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for block in blocks:
        torch.manual_seed(zlib.crc32(f"{seed}:{block.rows[0]}".encode()))
        loss = answer_loss(model, to_batch(block, device)) / target_count
        loss.backward()
        total += loss.detach()
    return total
