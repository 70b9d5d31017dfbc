"""Blocks as large as a GPU's free memory allows; what is asked for wins; a resumed run finds what was chosen."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn
from transformers import GlmForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.random_checkpoint import CHATGLM3_6B, native_config
from chatglm3.official import translate_config
from cluster import storage
from cluster.errors import StageError
from pipelines.compute import step
from pipelines.run.callbacks import LastingErrors
from pipelines.run.memory import (
    Memory,
    _fastest,
    _kept_eagerly,
    base_bytes,
    choose_memory,
    linear_shapes,
    needed_gb,
)
from pipelines.run.training_steps import lora_config
from pipelines.training import TrainConfig, _digest

QKV = {"rank": 4, "targets": ["q_proj", "k_proj", "v_proj"]}
MODEL = native_config(28)
SMALL = CHATGLM3_6B | {"hidden_size": 64, "ffn_hidden_size": 176, "kv_channels": 16, "num_attention_heads": 4}


def config(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("base_format", "lora", "tokens", "recompute", "measured"),
    [
        ("nf4", QKV, 8192, True, 7.5),
        ("nf4", QKV, 16384, False, 50.0),
        ("nf4", {}, 16384, False, 70.7),
        ("fp8", QKV, 8192, False, 30.2),
        ("fp8", QKV, 16384, False, 53.2),
        ("nf4", {"dropout": 0.05}, 16384, False, 93.8),  # these two on an H200
        ("fp8", {"dropout": 0.05}, 16384, False, 96.8),
    ],
)
def test_the_estimate_is_within_a_twentieth_of_what_a_gpu_showed(
    base_format: str, lora: dict[str, Any], tokens: int, recompute: bool, measured: float
) -> None:
    wanted = config(base_format=base_format, lora=lora)
    assert needed_gb(MODEL, wanted, tokens, recompute) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("free_gb", "settings", "tokens", "recompute"),
    [
        (80, {}, 16384, False),
        (46, {}, 8192, False),
        (24, {}, 4096, False),
        (15, {}, 16384, True),
        (11, {}, 8192, True),
        (23, {"block_tokens": 6000}, 6000, True),
        (23, {"recompute": True}, 16384, True),
        (11, {"block_tokens": 16384, "recompute": False}, 16384, False),
    ],
)
def test_the_fastest_that_fits_is_chosen_and_what_is_given_wins(
    free_gb: float, settings: dict[str, Any], tokens: int, recompute: bool
) -> None:
    chosen = _fastest(config(**settings), MODEL, 4096, free_gb)
    assert (chosen.block_tokens, chosen.recompute) == (tokens, recompute)


def test_examples_longer_than_the_smallest_block_are_given_room_and_a_gpu_that_is_too_small_is_refused() -> None:
    assert _fastest(config(), MODEL, 5000, 23).block_tokens == 16384
    with pytest.raises(StageError, match=r"in bf16 needs about .* GB even in small blocks, a GPU has 8 GB free"):
        _fastest(config(base_format="bf16"), MODEL, 4096, 8)


def test_workers_that_share_out_the_base_need_room_for_their_part_and_a_layer_once_each_has_loaded_it() -> None:
    layer = 2 * sum(rows * columns for rows, columns in linear_shapes(MODEL).values())
    assert base_bytes(MODEL, "bf16") - base_bytes(MODEL, "bf16", 8) == pytest.approx((28 - 28 / 8 - 1) * layer)
    wanted = {"base_format": "bf16", "workers": 8}
    for strategy, recompute, tokens in (("ddp", True, 4096), ("zero3", True, 16384)):
        chosen = _fastest(config(**wanted, strategy=strategy), MODEL, 4096, 17)
        assert (chosen.recompute, chosen.block_tokens) == (recompute, tokens)
    with pytest.raises(StageError, match="a GPU has 13 GB free"):
        _fastest(config(**wanted, strategy="zero3"), MODEL, 4096, 13)
    with pytest.raises(StageError, match="a GPU has 13 GB free"):  # fp8 is made of the 16-bit base
        _fastest(config(base_format="fp8"), MODEL, 4096, 13)


def test_nodes_that_may_be_lost_leave_more_of_the_base_to_the_others() -> None:
    wanted = {"base_format": "bf16", "workers": 8, "strategy": "zero3"}
    needed = [needed_gb(MODEL, config(**wanted, min_workers=least), 32768, False) for least in (1, 2, 8)]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] > needed[2] + 8


class AttentionKernel(torch.autograd.Function):
    """Keeps what the GPU's kernel does: its inputs, its output, and a sum in fp32 for each head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, output, torch.empty(query.shape[1:3]))
        return output


class FourBitProduct(torch.autograd.Function):
    """Keeps nothing, as zero.py's; the numbers do not matter here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        return nn.Linear.forward(layer, x)


def bytes_kept(layers: int, tokens: int, wanted: TrainConfig) -> int:
    """All that autograd saves of a forward pass as zero3's on a GPU, each storage once; weights included."""
    glm = GlmForCausalLM(translate_config(Path("."), SMALL | {"num_layers": layers})).bfloat16()
    model = step.with_adapters(glm, "bf16", lora_config(wanted.lora))
    glm.set_attn_implementation("kernel")
    for layer in model.modules():
        if type(layer) is nn.Linear and not layer.weight.requires_grad and wanted.base_format == "nf4":
            layer.forward = lambda x, layer=layer: FourBitProduct.apply(x, layer)
    kept: dict[int, Tensor] = {}
    hidden = torch.randn(1, tokens, glm.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.setdefault(saved.untyped_storage().data_ptr(), saved), lambda saved: saved
    )
    with keep, torch.autocast("cpu", torch.bfloat16):
        glm.model(inputs_embeds=hidden, position_ids=torch.arange(tokens)[None], use_cache=False)
    return sum(saved.untyped_storage().nbytes() for saved in kept.values())


@pytest.mark.parametrize("base_format", ["nf4", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("targets", [["q_proj"], ["o_proj", "down_proj"], list(linear_shapes(MODEL))])
def test_layers_that_are_not_compiled_keep_as_many_bytes_a_token_as_autograd_saves(
    monkeypatch: pytest.MonkeyPatch, base_format: str, dropout: float, targets: list[str]
) -> None:
    monkeypatch.setattr(step, "_casts_adapters", lambda glm: True)  # as on a GPU
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)  # as DeepSpeed does
    ALL_ATTENTION_FUNCTIONS.register("kernel", lambda module, q, k, v, *_, **__: (AttentionKernel.apply(q, k, v), None))
    wanted = config(base_format=base_format, lora={"rank": 8, "targets": targets, "dropout": dropout})
    counted = {(n, tokens): bytes_kept(n, tokens, wanted) for n in (1, 2) for tokens in (64, 128)}
    of_a_layer = {tokens: counted[2, tokens] - counted[1, tokens] for tokens in (64, 128)}
    small = translate_config(Path("."), SMALL)
    # A CPU's dropout has masks of 16 bits, a GPU's of 8.
    wider = sum(linear_shapes(small)[name][1] for name in targets) if dropout else 0
    assert (of_a_layer[128] - of_a_layer[64]) / 64 == _kept_eagerly(small, wanted, 2) + wider


def test_zero3_keeps_more_for_each_token_than_compiled_layers_do() -> None:
    needed = [needed_gb(MODEL, config(strategy=strategy, workers=8), 4096, False) for strategy in ("ddp", "zero3")]
    assert needed == pytest.approx([21.7, 23.3], abs=0.05)  # although zero3's base is in eight parts


def test_a_run_that_had_too_little_memory_goes_on_with_recompute(tmp_path: Path) -> None:
    given = {"base": "6b", "workers": 2}
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")
    with pytest.raises(
        StageError,
        match=r"^training failed: CUDA out of memory. Tried to allocate 2 GiB.; give --recompute true, and the same "
        r"command goes on from the last checkpoint; or smaller --block_tokens, with which it begins again$",
    ):
        LastingErrors(recompute=False).after_exception(None, {0: error})
    with pytest.raises(StageError, match=r"allocate 2 GiB.; give smaller --block_tokens, with which it begins again$"):
        LastingErrors(recompute=True).after_exception(None, {0: error})
    data = storage.Folder(tmp_path, storage.Receipt("prepare", {}, facts={"dataset": "x"}))
    runs = [_digest(config(**given, **more), "y", data) for more in ({}, {"recompute": True}, {"block_tokens": 4096})]
    assert runs[0] == runs[1] != runs[2]


def test_on_a_cpu_blocks_have_4096_tokens_and_a_resumed_run_finds_its_choice_unless_told_otherwise(
    tmp_path: Path,
) -> None:
    file = tmp_path / "run" / "memory.json"
    first = choose_memory(config(), MODEL, 4096, file, gpus=0)
    assert first == Memory(block_tokens=4096, recompute=False)
    assert choose_memory(config(), MODEL, 64, file, gpus=0) == first
    assert choose_memory(config(), MODEL, 8192, file.with_name("longer.json"), gpus=0).block_tokens == 8192
    given = choose_memory(config(recompute=True), MODEL, 64, file, gpus=0)
    assert given == Memory(block_tokens=4096, recompute=True)  # what is given beats what was chosen
    assert choose_memory(config(), MODEL, 64, file, gpus=0) == first
