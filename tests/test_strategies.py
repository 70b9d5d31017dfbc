"""DeepSpeed's ZeRO gives the curve of plain replication, saves the same adapter, and goes on after a kill."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import StageError
from pipelines.training import TrainConfig, train
from tests.training_runs import SETTINGS, assert_same_curve, kill_a_worker_after_step, scores

pytestmark = pytest.mark.slow


def weights(adapter: str | Path) -> torch.Tensor:
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_zero_gives_the_curve_and_the_adapter_of_ddp_although_a_worker_is_killed(
    undisturbed: str, rows: str, tmp_path: Path, strategy: str
) -> None:
    out = tmp_path / "adapter"
    killer = threading.Thread(target=kill_a_worker_after_step, args=(Path(f"{out}.run"), 5), daemon=True)
    killer.start()
    train(TrainConfig(data=rows, out=str(out), strategy=strategy, workers=2, **SETTINGS))
    killer.join(timeout=1)
    assert not killer.is_alive(), "no worker was killed"
    assert_same_curve(out, undisturbed)
    assert scores(out) == scores(undisturbed)
    torch.testing.assert_close(weights(out), weights(undisturbed), rtol=1e-3, atol=1e-3)


def test_dora_is_refused_where_weights_are_in_pieces(rows: str, tmp_path: Path) -> None:
    settings = {"data": rows, "out": str(tmp_path / "a"), "strategy": "zero3", "lora": {"dora": True}}
    with pytest.raises(StageError, match=r"--lora.dora true: with --strategy zero3"):
        train(TrainConfig.parse(settings, "flags"))
