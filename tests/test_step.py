"""The packed training step: exactly the examples one by one, in every base format, on the CPU and on a GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant

from chatglm3 import load_model
from pipelines.compute.batches import Padding, batches_ahead, to_batch
from pipelines.compute.blocks import Block
from pipelines.compute.cross_entropy import CHUNK, summed_cross_entropy
from pipelines.compute.fp8_linear import Fp8Linear
from pipelines.compute.step import (
    _ScaledEarly,
    answer_loss,
    compile_layers,
    recompute_layers,
    run_batches,
    trainable_model,
    with_adapters,
)

DORA_MAGNITUDE = "magnitude_vector.default.weight"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
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


def model_of(base: Path, base_format: str = "fp32", device: torch.device = CPU, lora: LoraConfig = LORA) -> PeftModel:
    model = trainable_model(str(base), base_format, lora, device)  # type: ignore[arg-type]
    chance = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B is zero at the start, which would hide A's gradients
            parameter.data = (torch.randn(parameter.shape, generator=chance) * 0.05).to(device)
    return model


def run_blocks(
    model: PeftModel, blocks: list[Block], target_count: int, seed: str, padding: Padding | None = None
) -> torch.Tensor:
    device = next(model.parameters()).device
    return run_batches(model, batches_ahead(blocks, device, padding), target_count, seed)


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in found.values()])


def lora_with(**settings: Any) -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM", **settings
    )


KINDS = {"lora": LORA, "rslora": lora_with(use_rslora=True), "dora": lora_with(use_dora=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_block_gives_the_loss_and_gradients_of_its_examples_one_by_one(tiny: Path, kind: str) -> None:
    model = model_of(tiny, lora=KINDS[kind])
    blocks = blocks_of(1000, [17, 64, 5, 120, 33])
    total = sum(b.target_count for b in blocks)
    one_by_one = run_blocks(model, blocks, total, "s")
    expected = gradients(model)
    together = run_blocks(model, [packed(blocks)], total, "s")
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)
    assert_near(gradients(model), expected, 1e-5)


def test_a_packed_block_gives_the_loss_of_transformers_own_forward(tiny: Path) -> None:
    model = model_of(tiny).eval()
    (block,) = blocks_of(1000, [90])
    labels = torch.where(torch.from_numpy(block.is_target), torch.from_numpy(block.input_ids).long(), -100)
    ours = answer_loss(model, to_batch(block, CPU)) / block.target_count
    model.get_base_model().set_attn_implementation("eager")
    theirs = model(input_ids=torch.from_numpy(block.input_ids).long()[None], labels=labels[None], use_cache=False).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("base_format", "loss_error", "error"), [("fp32", 1e-6, 1e-5), ("nf4", 5e-3, 0.03)])
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_lora_with_its_scale_before_the_second_product_gives_the_loss_and_gradients_of_pefts_own(
    tiny: Path, base_format: str, loss_error: float, error: float, kind: str
) -> None:
    """As on a GPU, where each product's inputs are cast to 16 bits, and PEFT rounds the scaled output once more."""
    model = model_of(tiny, base_format, lora=KINDS[kind])
    block = packed(blocks_of(1000, [40, 70]))
    with torch.autocast("cpu", torch.bfloat16, enabled=base_format == "nf4"):
        expected = run_blocks(model, [block], 10, "s")
        gradients_of_peft = gradients(model)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_variant["default"], layer.cast_input_dtype_enabled = _ScaledEarly(), False
        loss = run_blocks(model, [block], 10, "s")
    torch.testing.assert_close(loss, expected, rtol=loss_error, atol=0)
    assert distance(flat(gradients(model)), flat(gradients_of_peft)) < error


@pytest.mark.parametrize("base_format", ["fp32", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_gives_the_loss_and_gradients_of_pefts_own(tiny: Path, base_format: str, dropout: float) -> None:
    model = model_of(tiny, base_format, lora=lora_with(use_dora=True, use_rslora=True, lora_dropout=dropout))
    block = packed(blocks_of(1000, [40, 70]))
    loss = run_blocks(model, [block], 10, "s")
    found = gradients(model)
    assert {name.split(".lora_")[1] for name in found} == {"A.default.weight", "B.default.weight", DORA_MAGNITUDE}
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_variant["default"] = DoraLinearVariant()
    error = 1e-5 if base_format == "fp32" else 0.03  # of 16-bit activations
    expected = run_blocks(model, [block], 10, "s")
    torch.testing.assert_close(loss, expected, rtol=error, atol=0)
    assert distance(flat(found), flat(gradients(model))) < 5 * error


def test_a_dora_adapter_is_merged_into_the_function_that_was_trained(tiny: Path, tmp_path: Path) -> None:
    model = model_of(tiny, lora=lora_with(use_dora=True)).eval()
    batch = to_batch(packed(blocks_of(1000, [40, 70])), CPU)
    expected = answer_loss(model, batch)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    merged = PeftModel.from_pretrained(load_model(tiny, dtype=torch.float32), tmp_path).merge_and_unload()
    plain = with_adapters(merged, "fp32", LORA).eval()  # fresh adapters add nothing
    torch.testing.assert_close(answer_loss(plain, batch), expected, rtol=1e-5, atol=0)


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


def test_padding_changes_no_loss_and_no_gradient(tiny: Path) -> None:
    model = model_of(tiny)
    block = packed(blocks_of(1000, [40, 70]))
    together = run_batches(model, [to_batch(block, CPU)], 10, "s")
    expected = gradients(model)
    padded = to_batch(block, CPU, Padding(300, longest=80, examples=4))
    assert padded.boundaries.tolist() == [0, 40, 110, 190, 270, 300, 300, 300, 300]
    torch.testing.assert_close(run_batches(model, [padded], 10, "s"), together, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_blocks_are_padded_to_one_size_which_grows_by_powers_of_two() -> None:
    padding = Padding(4096)
    sizes = []
    for lengths in ([1000, 900], [40] * 50, [2049], [10] * 70, [4000, 90], [5000]):
        padded = padding.lengths(lengths)
        assert (sum(padded), len(padded)) == (padding.tokens, padding.examples)
        sizes.append((padding.tokens, padding.longest, padding.examples))
    assert sizes == [(4096, 2048, 64)] * 2 + [(4096, 4096, 64), (4096, 4096, 128), (4096, 4096, 128), (8192, 8192, 128)]


def test_a_mean_of_16_bit_cross_entropies_has_gradients_that_are_rounded_once() -> None:
    hidden = torch.randn(7, 8).bfloat16().requires_grad_()
    weight, targets = torch.randn(50, 8).bfloat16(), torch.randint(0, 50, (7,))
    (of_sum,) = torch.autograd.grad(summed_cross_entropy(hidden, weight, targets), hidden)
    (of_mean,) = torch.autograd.grad(summed_cross_entropy(hidden, weight, targets) / 1027, hidden)
    scale = torch.tensor(1.0) / 1027  # off by 0.1 % in 16 bits
    assert torch.equal(of_mean, (of_sum.float() * scale).bfloat16())


def test_cross_entropy_in_chunks_is_that_of_all_logits_at_once() -> None:
    hidden = torch.randn(2 * CHUNK + 100, 32, requires_grad=True)
    weight, targets = torch.randn(50, 32), torch.randint(0, 50, (2 * CHUNK + 100,))
    whole = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    (expected,) = torch.autograd.grad(whole / 7, hidden)
    loss = summed_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss / 7, hidden)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def fp8_products(device: torch.device, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and input gradient of an fp8 layer, and those of a product with its dequantised weight."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 384, dtype=dtype)
    x, gradient = torch.randn(2, 100, 256, dtype=dtype), torch.randn(2, 100, 384, dtype=dtype)
    linear, x, gradient = linear.to(device), x.to(device).requires_grad_(), gradient.to(device)
    layer = Fp8Linear(linear)
    y = layer(x)
    weight = layer.weight.float() * layer.scales
    exact = F.linear(x.float(), weight, linear.bias.float())
    return [y, *torch.autograd.grad(y, x, gradient)], [exact, *torch.autograd.grad(exact, x, gradient.float())]


def distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.detach() - expected.detach()).norm() / expected.detach().norm())


def test_an_fp8_layer_rounds_activations_and_their_gradients_by_three_percent_and_its_weight_once() -> None:
    for value, exact in zip(*fp8_products(CPU, torch.float32), strict=True):
        assert 0.01 < distance(value, exact) < 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_an_fp8_base_gives_the_loss_and_gradients_of_the_fp32_one_within_its_rounding(tiny: Path, kind: str) -> None:
    block = packed(blocks_of(1000, [40, 70]))
    model, fp8 = model_of(tiny, lora=KINDS[kind]), model_of(tiny, "fp8", lora=KINDS[kind])
    expected, loss = (run_blocks(m, [block], block.target_count, "s") for m in (model, fp8))
    assert loss.item() == pytest.approx(expected.item(), rel=0.03)
    layers = [name for name, module in fp8.named_modules() if isinstance(module, Fp8Linear)]
    assert len(layers) == 6 * 6  # every linear layer of 6 decoder layers, with an adapter or not
    assert F.cosine_similarity(flat(gradients(model)), flat(gradients(fp8)), dim=0) > 0.98


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return CUDA


def with_sdpa(model: PeftModel, blocks: list[Block], target_count: int) -> torch.Tensor:
    """`run_blocks` by transformers' own forward, loss and attention, one example after another."""
    glm = model.get_base_model()
    glm.set_attn_implementation("sdpa")
    total = torch.zeros((), device=glm.device)
    for block in blocks:
        ids = torch.from_numpy(block.input_ids).long()
        labels = torch.where(torch.from_numpy(block.is_target), ids, -100)
        with torch.autocast("cuda", torch.bfloat16, enabled=glm.dtype == torch.bfloat16):
            loss = model(input_ids=ids[None].to(glm.device), labels=labels[None].to(glm.device), use_cache=False).loss
        (loss * block.target_count / target_count).backward()
        total += loss.detach() * block.target_count / target_count
    glm.set_attn_implementation("packed")
    return total


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], error: float) -> None:
    """The difference of each gradient to the expected one, in terms of its own length."""
    assert found.keys() == expected.keys()
    distances = {name: distance(gradient.float(), expected[name].float()) for name, gradient in found.items()}
    assert max(distances.values()) < error, distances


LENGTHS = [17, 64, 5, 500, 33, 128, 129]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("base_format", "loss_error", "error"), [("fp32", 1e-5, 1e-4), ("bf16", 5e-3, 0.1), ("nf4", 5e-3, 0.1)]
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_a_packed_block_gives_the_loss_and_gradients_of_its_examples_one_by_one(
    tiny: Path, gpu: torch.device, base_format: str, loss_error: float, error: float, padded: bool, kind: str
) -> None:
    model = model_of(tiny, base_format, gpu, KINDS[kind])
    blocks = blocks_of(1000, LENGTHS)
    block = packed(blocks)
    one_by_one = with_sdpa(model, blocks, block.target_count)
    expected = gradients(model)
    together = run_blocks(model, [block], block.target_count, "s", Padding(2048, 512) if padded else None)
    torch.testing.assert_close(together, one_by_one, rtol=loss_error, atol=0)
    assert_near(gradients(model), expected, error)


@pytest.mark.gpu
def test_on_a_gpu_the_fp32_step_is_the_cpus(tiny: Path, gpu: torch.device) -> None:
    block = packed(blocks_of(1000, LENGTHS))
    here, there = model_of(tiny), model_of(tiny, "fp32", gpu)
    expected, loss = (run_blocks(m, [block], block.target_count, "s") for m in (here, there))
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=0)
    assert_near({name: g.cpu() for name, g in gradients(there).items()}, gradients(here), 1e-4)


@pytest.mark.gpu
def test_on_a_gpu_an_fp8_layer_is_as_exact_as_on_the_cpu(gpu: torch.device) -> None:
    for value, exact in zip(*fp8_products(gpu, torch.bfloat16), strict=True):
        assert 0.01 < distance(value, exact) < 0.04


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("base_format", ["nf4", "fp8", "bf16"])
def test_compiled_layers_give_the_eager_gradients_and_are_not_compiled_again(
    tiny: Path, gpu: torch.device, base_format: str, recompute: bool, kind: str
) -> None:
    torch._dynamo.reset()
    first, second = (packed(blocks_of(1000, lengths, 3)) for lengths in (LENGTHS, [300, 21, 77]))
    model = model_of(tiny, base_format, gpu, KINDS[kind])
    eager = run_blocks(model, [first], 100, "s", Padding(1024))
    expected = gradients(model)
    compile_layers(model)
    if recompute:
        recompute_layers(model)
    padding = Padding(1024)
    torch.testing.assert_close(run_blocks(model, [first], 100, "s", padding), eager, rtol=5e-3, atol=0)
    # fp8 rounds a value that is a hair's breadth off to another number, 6 % away.
    assert_near(gradients(model), expected, 0.3 if base_format == "fp8" else 0.1)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run_blocks(model, [second, first, second], 100, "t", padding)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu(tiny: Path, gpu: torch.device) -> None:
    model = model_of(tiny, "nf4", gpu)
    blocks = [packed(blocks_of(1000, LENGTHS, seed)) for seed in range(3)]
    run_blocks(model, blocks, 100, "s", padding := Padding(1024))  # the first use of a kernel may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_blocks(model, blocks, 100, "s", padding)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_batches_sent_ahead_arrive_whole(gpu: torch.device) -> None:
    blocks = [packed(blocks_of(1000, LENGTHS, seed)) for seed in range(20)]
    torch.cuda._sleep(100_000_000)  # the GPU lags behind, so that a copy in flight would be seen
    for batch, block in zip(batches_ahead(blocks, gpu, Padding(1024)), blocks, strict=True):
        expected = to_batch(block, CPU, Padding(1024))
        torch.cuda._sleep(10_000_000)
        doubled = batch.input_ids * 2
        assert torch.equal(doubled.cpu(), expected.input_ids * 2)
        assert torch.equal(batch.targets.cpu(), expected.targets)
        assert torch.equal(batch.boundaries.cpu(), expected.boundaries)
