"""The training step on packed blocks: attention within examples, loss on answer tokens alone. Callable without Ray."""

import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor
from transformers import GlmForCausalLM

from chatglm3 import ModelError, load_model
from chatglm3.quantization import NF4
from pipelines.compute import packed_attention
from pipelines.compute.batches import PackedBatch
from pipelines.compute.cross_entropy import summed_cross_entropy
from pipelines.compute.dora import FactoredDora
from pipelines.compute.fp8_linear import to_fp8

BaseFormat = Literal["nf4", "fp8", "bf16", "fp32"]


def trainable_model(base: str, base_format: BaseFormat, lora: LoraConfig, device: torch.device) -> PeftModel:
    """The frozen base in `base_format` with fresh LoRA adapters in fp32, ready for `answer_loss`.

    ModelError if the GPU cannot multiply in that format.
    """
    if base_format == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ModelError(f"base_format fp8: {torch.cuda.get_device_name(device)} has no 8-bit floats; use nf4 or bf16")
    model = load_model(
        base,
        dtype=torch.float32 if base_format == "fp32" else torch.bfloat16,
        quantization_config=NF4 if base_format == "nf4" else None,
        device_map={"": device},
    )
    return with_adapters(model, base_format, lora)


def with_adapters(model: GlmForCausalLM, base_format: BaseFormat, lora: LoraConfig) -> PeftModel:
    """`trainable_model` of a base that is loaded already: in NF4 for `nf4`, in 16 or 32 bits for the others."""
    model.set_attn_implementation(packed_attention.NAME)
    model.requires_grad_(False)
    adapted = get_peft_model(model, lora)
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            _prepare_adapter(layer, _casts_adapters(model))
    if base_format == "fp8":
        to_fp8(model.model)  # after PEFT, which wraps only layers that it knows
    adapted.train()
    return adapted


def _prepare_adapter(layer: LoraLayer, casts: bool) -> None:
    for name in layer.lora_A:
        if layer.use_dora[name]:
            layer.lora_variant[name] = FactoredDora(layer, name)
        elif casts:
            layer.lora_variant[name] = _ScaledEarly()
    if casts:
        layer.cast_input_dtype_enabled = False  # or PEFT raises their input to fp32


class _ScaledEarly(LoraVariant):
    """PEFT's LoRA with its scale before the second product, where there are `rank` numbers a token, not thousands.

    Behind it, the backward pass would write a scaled copy of the whole output's gradient.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        low_rank = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        added: Tensor = module.lora_B[active_adapter](low_rank * module.scaling[active_adapter])
        return result + added


def base_of(model: PeftModel) -> GlmForCausalLM:
    """The network that the adapters are in."""
    glm = model.get_base_model()
    assert isinstance(glm, GlmForCausalLM)
    return glm


def recompute_layers(model: PeftModel) -> None:
    """Keep only each layer's input and compute the rest again in the backward pass: less memory, a third slower."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def compile_layers(model: PeftModel) -> None:
    """Compile each decoder layer, which takes half a minute once; batches must be padded (`batches.Padding`)."""
    # Every size that padding grows to has three forms: the first layer's, the others', and evaluation's. After eight
    # forms of a function torch would run it uncompiled, for good.
    torch._dynamo.config.recompile_limit = 64
    for layer in base_of(model).model.layers:
        layer.compile(dynamic=False)


def answer_loss(model: PeftModel, batch: PackedBatch) -> Tensor:
    """Sum of the cross-entropy over the block's answer tokens, in fp32; logits exist at those tokens only."""
    glm = base_of(model)
    with adapters_in_base_dtype(glm):
        hidden = glm.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            boundaries=batch.boundaries,
            longest=batch.longest,
        ).last_hidden_state[0]
    return summed_cross_entropy(hidden.index_select(0, batch.predictors), glm.lm_head.weight, batch.targets)


def adapters_in_base_dtype(glm: GlmForCausalLM) -> AbstractContextManager[object]:
    """On a GPU, a 16-bit base gets 16-bit adapters, cast from the fp32 ones at each use.

    So gradients, the optimizer and checkpoints see fp32 adapters, and no copies need be kept in step. In fp32 the
    adapters' products would take longer than the base's.
    """
    return torch.autocast("cuda", torch.bfloat16, enabled=_casts_adapters(glm))


def _casts_adapters(glm: GlmForCausalLM) -> bool:
    embeddings: Tensor = glm.model.embed_tokens.weight
    return embeddings.is_cuda and embeddings.dtype == torch.bfloat16


def run_batches(model: PeftModel, batches: Iterable[PackedBatch], target_count: int, seed: str) -> Tensor:
    """Forward and backward of this worker's batches; returns its share of the mean loss, without waiting for the GPU.

    The loss is divided by `target_count`, the answer tokens of the whole global step, so that gradients add up to
    those of one big batch. Dropout is seeded by `seed` and the block: the same on any worker.
    """
    total = torch.zeros((), device=next(model.parameters()).device)
    for batch in batches:
        seed_dropout(seed, batch)
        loss = answer_loss(model, batch) / target_count
        loss.backward()
        total += loss.detach()
    return total


def seed_dropout(seed: str, batch: PackedBatch) -> None:
    """Seed the generators by step and block, which dropout is a function of then, and of no worker's history."""
    torch.manual_seed(zlib.crc32(f"{seed}:{batch.rows[0]}".encode()))
