"""The packed training step: exactly the examples one by one, and right gradients after an evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel

from pipelines.blocks import Block
from pipelines.step import answer_loss, recompute_layers, run_blocks, to_batch, trainable_model

CPU = torch.device("cpu")
LORA = LoraConfig(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"], task_type="CAUSAL_LM"
)


def blocks_of(vocabulary: int, lengths: list[int], seed: int = 0) -> list[Block]:
    """One block per example: random ids, the last third are targets."""
    chance = np.random.default_rng(seed)
    blocks = []
    for number, length in enumerate(lengths):
        is_target = np.arange(length) >= length * 2 // 3
        ids = chance.integers(3, vocabulary, length).astype(np.int32)
        blocks.append(Block(ids, is_target, [length], [f"row {number}"], int(is_target.sum())))
    return blocks


def packed(blocks: list[Block]) -> Block:
    return Block(
        np.concatenate([b.input_ids for b in blocks]),
        np.concatenate([b.is_target for b in blocks]),
        [n for b in blocks for n in b.lengths],
        [row for b in blocks for row in b.rows],
        sum(b.target_count for b in blocks),
    )


def model_of(base: Path, base_format: str = "fp32") -> PeftModel:
    torch.manual_seed(1)
    model = trainable_model(str(base), base_format, LORA, CPU)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide A's gradients
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_a_packed_block_gives_the_loss_and_gradients_of_its_examples_one_by_one(tiny: Path) -> None:
    model = model_of(tiny)
    blocks = blocks_of(1000, [17, 64, 5, 120, 33])
    total = sum(b.target_count for b in blocks)
    one_by_one = run_blocks(model, blocks, total, "s")
    expected = gradients(model)
    together = run_blocks(model, [packed(blocks)], total, "s")
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_packed_block_gives_the_loss_of_transformers_own_forward(tiny: Path) -> None:
    model = model_of(tiny).eval()
    (block,) = blocks_of(1000, [90])
    labels = torch.where(torch.from_numpy(block.is_target), torch.from_numpy(block.input_ids).long(), -100)
    ours = answer_loss(model, to_batch(block, CPU)) / block.target_count
    model.get_base_model().set_attn_implementation("eager")
    theirs = model(input_ids=torch.from_numpy(block.input_ids).long()[None], labels=labels[None], use_cache=False).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_recomputing_activations_changes_no_gradient(tiny: Path) -> None:
    model = model_of(tiny)
    block = packed(blocks_of(1000, [40, 70]))
    run_blocks(model, [block], 10, "s")
    expected = gradients(model)
    recompute_layers(model)
    run_blocks(model, [block], 10, "s")
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_nf4_gradients_stay_right_after_an_evaluation(tiny: Path) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in eval mode, and then trains on wrong gradients."""
    block = packed(blocks_of(1000, [40, 70]))
    fresh = model_of(tiny, "nf4")
    run_blocks(fresh, [block], 10, "s")
    expected = gradients(fresh)
    evaluated = model_of(tiny, "nf4")
    evaluated.eval()
    with torch.no_grad():
        answer_loss(evaluated, to_batch(block, CPU))
    evaluated.train()
    run_blocks(evaluated, [block], 10, "s")
    for name, gradient in gradients(evaluated).items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.9999, name
        torch.testing.assert_close(gradient.norm(), expected[name].norm(), rtol=1e-3, atol=0, msg=name)


def test_dropout_is_the_same_whatever_ran_before(tiny: Path) -> None:
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = trainable_model(str(tiny), "fp32", lora, CPU)
    first, second = blocks_of(1000, [30, 40])
    run_blocks(model, [second], 1, "42:7")
    expected = gradients(model)
    run_blocks(model, [first], 1, "42:7")
    model.zero_grad()
    run_blocks(model, [second], 1, "42:7")
    assert all(torch.equal(g, expected[name]) for name, g in gradients(model).items())


@pytest.mark.gpu
def test_variable_length_attention_on_the_gpu_equals_the_cpu(tiny: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    block = packed(blocks_of(1000, [64, 200, 9]))
    torch.manual_seed(1)
    on_cpu = answer_loss(trainable_model(str(tiny), "bf16", LORA, CPU), to_batch(block, CPU))
    cuda = torch.device("cuda")
    on_gpu = answer_loss(trainable_model(str(tiny), "bf16", LORA, cuda), to_batch(block, cuda))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-2, atol=0)
