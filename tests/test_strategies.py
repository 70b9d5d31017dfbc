"""DeepSpeed's ZeRO gives the curve of plain replication, saves the same adapter, and goes on after a kill."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.train_command import SETTINGS
from chatglm3 import load_model
from chatglm3.quantization import NF4
from cluster import storage
from cluster.errors import StageError
from pipelines.compute.zero import keep_no_weight
from pipelines.model_folders import open_model
from pipelines.run.planning import make_plan
from pipelines.run.training_plan import TrainingPlan
from pipelines.run.training_steps import Training
from pipelines.training import TrainConfig, train
from tests.training_runs import assert_same_curve, kill_a_worker_after_step, scores

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


@contextmanager
def worker(rank: int, world: int, plan: TrainingPlan, folder: str) -> Iterator[Training]:
    """One of several processes, without Ray."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    yield Training(plan, rank, world, torch.device("cpu"))
    dist.barrier()
    dist.destroy_process_group()


def replicated_steps(rank: int, plan: TrainingPlan, folder: str) -> None:
    for world in range(4, rank, -2):  # four of them, and then the first two
        with worker(rank, world, plan, folder) as training:
            rows = losses_and_scores(training)
        if rank == world - 1:  # any of them
            Path(folder, f"{world}.json").write_text(json.dumps(rows))


def test_one_two_and_four_workers_give_the_same_curve(rows: str, tmp_path: Path, ray_cluster: None) -> None:
    # Eight blocks a step would go up in four workers; with seven or so, shares are unequal.
    settings = SETTINGS | {"batch_size": 26, "score_rows": 6, "score_tokens": 8}
    data = storage.open_folder(rows, "prepare")
    plan = make_plan(TrainConfig(data=rows, **settings), open_model("tiny", "--base"), data, tmp_path / "run-x", 0)
    assert plan.blocks_per_step == 7
    expected = losses_and_scores(Training(plan, 0, 1, torch.device("cpu")))
    torch.multiprocessing.spawn(replicated_steps, (plan, str(tmp_path)), nprocs=4)
    for world in (2, 4):
        assert json.loads((tmp_path / f"{world}.json").read_text()) == pytest.approx(expected, rel=1e-5)


def sharded_steps(rank: int, plan: TrainingPlan, folder: str) -> None:
    with worker(rank, 2, plan, folder) as training:
        rows = losses_and_scores(training)
        weights = [m.weight for m in training.model.modules() if isinstance(m, Linear4bit)]
        stored = {(str(weight.dtype), weight.ds_numel / weight.ds_tensor.numel()) for weight in weights}
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps([rows, len(weights), *stored]))


def losses_and_scores(training: Training) -> list[float]:
    """Losses of three steps and of the dev rows; the answers' F1 in between."""
    losses = [training.advance()["loss"] for _ in range(2)]
    scores = training.answer_questions()["dev_f1"], training.evaluate()["dev_loss"]
    return [*losses, *scores, training.advance()["loss"]]


def test_zero3_shares_out_an_nf4_base_and_gives_the_curve_of_ddp(rows: str, tmp_path: Path, ray_cluster: None) -> None:
    settings = SETTINGS | {"base_format": "nf4", "score_rows": 4, "score_tokens": 8}
    config = TrainConfig(data=rows, **settings)
    data = storage.open_folder(rows, "prepare")
    plan = make_plan(config, open_model("tiny", "--base"), data, tmp_path / "run-x", 0)
    expected = losses_and_scores(Training(plan, 0, 1, torch.device("cpu")))
    zero3 = plan.model_copy(update={"strategy": "zero3"})
    torch.multiprocessing.spawn(sharded_steps, (zero3, str(tmp_path)), nprocs=2)
    found, layers, stored = json.loads((tmp_path / "found.json").read_text())
    # DeepSpeed's own F.linear rounds to 16 bits before it adds the bias.
    assert found == pytest.approx(expected, rel=5e-3)
    assert layers == 6 * 6
    assert stored == ["torch.uint8", 2.0]  # 4-bit numbers in bytes, half of them here


def sharded_and_saved(rank: int, plan: TrainingPlan, folder: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"  # which DeepSpeed asks for when it is imported
    import deepspeed

    initialize = deepspeed.initialize

    def of_a_large_model(config: dict[str, Any], **rest: Any) -> Any:
        """With no room for what a later layer needs, so that layers are let go, and fetched ahead."""
        limits = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 3000}
        config["zero_optimization"] |= limits
        return initialize(config=config, **rest)

    deepspeed.initialize = of_a_large_model
    with worker(rank, 2, plan, folder) as training:
        losses = saved_losses(training, Path(folder) if rank == 0 else None)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(losses))


def saved_losses(training: Training, folder: Path | None) -> list[float]:
    """Losses before, at and after a checkpoint into `folder`."""
    losses = [training.advance()["loss"] for _ in range(2)] + [training.evaluate()["dev_loss"]]
    training.save(folder)
    return [*losses, training.advance()["loss"]]


def test_zero3_saves_whole_adapters_although_an_evaluation_left_layers_on_their_way(
    rows: str, tmp_path: Path, ray_cluster: None
) -> None:
    data = storage.open_folder(rows, "prepare")
    plan = make_plan(TrainConfig(data=rows, **SETTINGS), open_model("tiny", "--base"), data, tmp_path / "run-x", 0)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    whole.mkdir()
    pieces.mkdir()
    expected = saved_losses(Training(plan, 0, 1, torch.device("cpu")), whole)
    zero3 = plan.model_copy(update={"strategy": "zero3"})
    torch.multiprocessing.spawn(sharded_and_saved, (zero3, str(pieces)), nprocs=2)
    assert json.loads((pieces / "found.json").read_text()) == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(weights(pieces / "adapter"), weights(whole / "adapter"), rtol=1e-3, atol=1e-3)


def test_a_four_bit_layer_lets_its_gathered_weight_go_between_the_passes(tiny: Path) -> None:
    model = load_model(tiny, dtype=torch.bfloat16, quantization_config=NF4, device_map={"": "cpu"})
    layer = model.train().model.layers[0].mlp.down_proj
    x = torch.randn(5, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    keep_no_weight(layer)
    y = layer(x)
    gathered, weight = layer.weight.data.clone(), StorageWeakRef(layer.weight.data.untyped_storage())
    layer.weight.data = torch.empty(0, dtype=torch.uint8)  # as DeepSpeed does behind a layer
    assert weight.expired()
    layer.weight.data = gathered  # and before its backward pass
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"lora": {"dora": True}}, r"^--lora.dora true: with --strategy zero3 no worker has .*; give zero2 or ddp$"),
        ({"base_format": "fp8"}, r"^--base_format fp8: --strategy zero3 would leave it whole .*; give ddp, or --base_"),
    ],
)
def test_what_cannot_be_in_pieces_is_refused_with_zero3(
    rows: str, tmp_path: Path, setting: dict[str, Any], said: str
) -> None:
    settings = {"data": rows, "out": str(tmp_path / "a"), "strategy": "zero3"} | setting
    with pytest.raises(StageError, match=said):
        train(TrainConfig.parse(settings, "flags"))
