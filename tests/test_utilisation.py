"""Utilisation of the matrix roof: FLOPs as PyTorch counts them, GPUs by name, shown only where it is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.random_checkpoint import native_config
from pipelines.compute.batches import to_batch
from pipelines.compute.block_files import BlockFile, write_blocks
from pipelines.compute.blocks import Block
from pipelines.compute.step import answer_loss, trainable_model
from pipelines.run.progress import describe
from pipelines.run.training_config import LoraSettings
from pipelines.run.training_report import summary, write_training_report
from pipelines.run.training_steps import lora_config
from pipelines.run.utilisation import peak_flops, step_flops

LORA = LoraSettings(rank=8, alpha=16, dropout=0.0, targets=["q_proj", "down_proj"])


def test_flops_are_those_that_pytorch_counts(tiny: Path) -> None:
    model = trainable_model(str(tiny), "fp32", lora_config(LORA), torch.device("cpu"))
    model.get_base_model().model.embed_tokens.weight.requires_grad_(True)  # or the first layer's inputs need none
    length = 200
    is_target = np.arange(length) >= 150
    block = Block(np.arange(length, dtype=np.int32) + 3, is_target, [length], ["a"], 50)
    # The kernel that leaves out what causal attention does not see is not counted on a CPU; this one sees all pairs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        answer_loss(model, to_batch(block, torch.device("cpu"))).backward()
    assert counter.get_total_flops() == step_flops(model.config, LORA, length, length**2, 50)


def test_a_token_of_chatglm3_6b_needs_what_the_benchmark_counts_and_its_adapters_and_attention() -> None:
    ranks = [LoraSettings(rank=rank, targets=["q_proj", "k_proj", "v_proj"]) for rank in (4, 8)]
    four, eight = (step_flops(native_config(28), lora, 1, 0, 0) for lora in ranks)
    of_adapters = 6 * 28 * 4 * (3 * 4096 + 4096 + 2 * 256)
    assert (four - of_adapters, eight - four) == (4 * 5_710_544_896, of_adapters)


def test_pairs_are_counted_within_examples(tmp_path: Path) -> None:
    block = Block(np.arange(5, dtype=np.int32), np.ones(5, bool), [2, 3], ["a", "b"], 5)
    write_blocks([block], tmp_path / "blocks.parquet")
    assert BlockFile(tmp_path / "blocks.parquet").attended_counts.tolist() == [3 + 6]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_a_gpu_has_its_data_sheets_peak_and_another_device_none(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (tflops and pytest.approx(tflops * 1e12))


def rows(**more: float) -> list[dict[str, float]]:
    always = {"loss": 1.5, "seconds": 2.0, "tokens": 3000, "waiting_seconds": 0.5, "workers": 4}
    return [{"step": step, **always, **more} for step in (1, 2)]


def test_hours_are_all_that_held_the_workers_and_speed_is_that_of_the_steps() -> None:
    found = rows(saving_seconds=1.0, evaluating_seconds=3.0)
    found[0] |= {"starting_seconds": 20.0, "lost_seconds": 6.0}
    numbers = summary(found, 1)
    assert numbers["gpu_hours"] == pytest.approx(4 * (2 * (2 + 1 + 3) + 20 + 6) / 3600)
    assert numbers["tokens_per_second"] == 1500
    assert (numbers["saving_seconds"], numbers["starting_seconds"], numbers["lost_seconds"]) == (2.0, 20.0, 6.0)
    assert summary(rows(), 0)["worker_hours"] == pytest.approx(4 * 4 / 3600)


def test_line_and_report_show_scores_and_utilisation_where_they_are_known(tmp_path: Path) -> None:
    scores = {"dev_loss": 1.2, "dev_exact_match": 0.25, "dev_f1": 0.5, "answering_seconds": 3.0}
    assert describe(rows(), 4) == "loss 1.500, 1,500 tokens/s, waiting for data 25%, 0:00:04 left"
    assert describe(rows(utilisation=0.5, **scores), 4) == (
        "loss 1.500 dev 1.200 exact match 0.250 F1 0.500, 1,500 tokens/s, 50% of the bf16 roof, "
        "waiting for data 25%, 0:00:10 left"  # what comes between the steps goes on too
    )
    known = summary(rows(utilisation=0.5, **scores), 1)
    assert (known["utilisation"], known["dev_f1"], known["answering_seconds"]) == (0.5, 0.5, 6.0)
    assert not {"utilisation", "dev_f1"} & summary(rows(), 0).keys()
    for number, found in enumerate((rows(), rows(utilisation=0.5, memory_gb=8.0, **scores))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(f"{row}\n".replace("'", '"') for row in found))
        write_training_report(folder, {}, 1)
        page = (folder / "report.html").read_text()
        shown = ["% of the bf16 matrix roof", "GPU memory so far, GB", "dev exact match"]
        assert [text in page for text in shown] == [number == 1] * 3
