"""Blocks as large as a GPU's free memory allows; what is asked for wins; a resumed run finds what was chosen."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.random_checkpoint import native_config
from cluster.errors import StageError
from pipelines.memory import Memory, _fastest, choose_memory, linear_shapes, needed_gb
from pipelines.training import TrainConfig

QKV = {"rank": 4, "targets": ["q_proj", "k_proj", "v_proj"]}
MODEL = native_config(28)


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
    ],
)
def test_the_estimate_is_within_a_twentieth_of_what_an_h100_showed(
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


def test_workers_that_share_out_the_base_need_room_for_their_part_and_a_layer() -> None:
    wanted = {"base_format": "bf16", "workers": 8, "strategy": "zero3"}
    layer = 2 * sum(rows * columns for rows, columns in linear_shapes(MODEL).values()) / 1e9
    found = {
        strategy: needed_gb(MODEL, config(**wanted | {"strategy": strategy}), 4096, True)
        for strategy in ("ddp", "zero2", "zero3")
    }
    assert found["zero2"] == found["ddp"]
    assert found["ddp"] - found["zero3"] == pytest.approx((28 - 28 / 8 - 1) * layer)
    assert needed_gb(MODEL, config(**wanted, min_workers=1), 4096, True) == found["ddp"]  # nodes may be lost
    with pytest.raises(StageError, match="a GPU has 12 GB free"):
        _fastest(config(**wanted | {"strategy": "ddp"}), MODEL, 4096, 12)
    assert _fastest(config(**wanted), MODEL, 4096, 12).block_tokens == 16384


def test_on_a_cpu_blocks_have_4096_tokens_and_a_resumed_run_finds_its_choice(tmp_path: Path) -> None:
    file = tmp_path / "run" / "memory.json"
    first = choose_memory(config(), MODEL, 4096, file, gpus=0)
    assert first == Memory(block_tokens=4096, recompute=False)
    assert choose_memory(config(block_tokens=64), MODEL, 64, file, gpus=0) == first
