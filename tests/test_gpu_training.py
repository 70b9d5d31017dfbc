"""Training, merging and answering on a GPU: compiled layers in every base format, through Ray, beside a CPU's."""

import asyncio
import gc
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from chatglm3 import load_model, load_tokenizer
from chatglm3.chat import prompt_ids
from chatglm3.engines import AdapterFolders, Engine, Sampling, complete, load_engine
from chatglm3.engines.transformers_engine import TransformersEngine
from cluster import storage
from pipelines.merging import MergeConfig, merge
from pipelines.model_folders import open_model
from pipelines.run.memory import Memory
from pipelines.run.planning import make_plan
from pipelines.run.progress import read_metrics
from pipelines.run.training_plan import TrainingPlan
from pipelines.run.training_steps import Training
from pipelines.run.utilisation import peak_flops
from pipelines.training import TrainConfig, train
from tests.training_runs import curve, kill_a_worker_after_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("ray_cluster"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FORMATS = ["nf4", "fp8", "bf16"]
STEPS, HALF = 20, 10
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "epochs": 10.0,
    "batch_size": 8,
    "block_tokens": 1024,
    "save_steps": 2,
    "eval_steps": 4,
    "score_rows": 8,
    "score_tokens": 24,
    "lora": {"dropout": 0.05},  # it draws numbers, which a restart has to draw again
}
Near = Callable[[list[float], list[float], float], None]
RERUN = 0.02
"""By how much a loss may differ between runs of the same steps: attention's backward pass adds up in any order."""
ACROSS = 0.05
"""By how much from the loss that a CPU computes in fp32."""


def plan_of(rows: str, folder: Path, gpus: int = 0, **settings: Any) -> TrainingPlan:
    config = TrainConfig.model_validate({"data": rows} | SETTINGS | settings)
    data = storage.open_folder(rows, "prepare")
    return make_plan(config, open_model("tiny", "--base"), data, folder / "run-x", gpus)


def losses(training: Training, steps: int) -> list[float]:
    return [training.advance()["loss"] for _ in range(steps)]


@pytest.fixture
def near(record_property: Callable[[str, object], None]) -> Near:
    """Holds a curve to another one; how far apart they are at most stands in pytest's report (--junitxml)."""

    def compare(found: list[float], expected: list[float], most: float) -> None:
        largest = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        record_property("largest difference of a loss", f"{largest:.2%}")
        assert largest < most, (found, expected)

    return compare


@dataclass(frozen=True)
class Bare:
    """What the loop gave without Ray, evaluations and questions."""

    plan: TrainingPlan
    losses: list[float]
    half: Path
    """Checkpoint after HALF steps."""
    end: Path


@pytest.fixture(scope="module")
def bare(rows: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bare]:
    """A run of a base format by the training loop alone."""

    @cache
    def run(base_format: str) -> Bare:
        torch._dynamo.reset()
        folder = tmp_path_factory.mktemp(base_format)
        plan = plan_of(rows, folder, base_format=base_format)
        training = Training(plan, 0, 1, CUDA)
        found = losses(training, HALF)
        training.save(half := folder / "half")
        found += losses(training, STEPS - HALF)
        training.save(end := folder / "end")
        return Bare(plan, found, half, end)

    return run


@pytest.mark.parametrize("base_format", FORMATS)
def test_losses_fall_and_a_resumed_loop_goes_on_with_them(
    bare: Callable[[str], Bare], near: Near, base_format: str
) -> None:
    known = bare(base_format)
    assert sum(known.losses[-5:]) < 0.9 * sum(known.losses[:5])
    torch._dynamo.reset()
    resumed = Training(known.plan, 0, 1, CUDA, known.half)
    assert resumed.step == HALF
    near(losses(resumed, STEPS - HALF), known.losses[HALF:], RERUN)


@pytest.mark.parametrize("base_format", FORMATS)
def test_evaluations_and_answers_change_no_loss_and_have_nothing_compiled_again(
    bare: Callable[[str], Bare], near: Near, base_format: str
) -> None:
    known = bare(base_format)
    torch._dynamo.reset()
    training = Training(known.plan, 0, 1, CUDA)
    found, graphs = [], []
    # A layer that is given up on for having been compiled too often would run on, slowly.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(6):
            found += losses(training, 2)
            dev_loss, scores = training.evaluate()["dev_loss"], training.answer_questions()
            assert 0 < dev_loss < 10
            assert 0 <= scores["dev_exact_match"] <= scores["dev_f1"] <= 1
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs == graphs[:1] * 6
    near(found, known.losses[: len(found)], RERUN)


def test_layers_stay_compiled_however_often_blocks_outgrow_their_padding(rows: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    training = Training(plan_of(rows, tmp_path, base_format="bf16"), 0, 1, CUDA)
    for layer in training.model.get_base_model().model.layers:
        layer.compile(dynamic=False, backend="eager")  # what is compiled is the same, but takes no time
    graphs = [counters["stats"]["unique_graphs"]]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(4):
            losses(training, 2)
            training.evaluate()
            graphs.append(counters["stats"]["unique_graphs"])
            training.padding.tokens *= 2
    [of_each_size] = {after - before for before, after in pairwise(graphs)}
    assert of_each_size > 0


@pytest.mark.parametrize(("base_format", "is_killed"), [("nf4", True), ("fp8", False), ("bf16", False)])
def test_the_stage_gives_the_curve_of_the_loop_though_a_worker_be_killed_and_tells_of_the_gpu(
    bare: Callable[[str], Bare], near: Near, rows: str, tmp_path: Path, base_format: str, is_killed: bool
) -> None:
    out = tmp_path / "adapter"
    run = Path(f"{out}.run")
    killer = threading.Thread(target=kill_a_worker_after_step, args=(run, 6), daemon=True)
    if is_killed:
        killer.start()
    train(TrainConfig.model_validate({"data": rows, "out": str(out), "base_format": base_format} | SETTINGS))
    if is_killed:
        killer.join(timeout=1)
        assert not killer.is_alive(), "no worker was killed"
    assert [step for step, _ in curve(out)] == list(range(1, STEPS + 1))
    near([loss for _, loss in curve(out)], bare(base_format).losses, RERUN)
    metrics = read_metrics(out / "metrics.jsonl")
    evaluated = [row for row in metrics if "dev_loss" in row]
    assert [row["step"] for row in evaluated] == list(range(4, STEPS + 1, 4))
    assert evaluated[-1]["dev_loss"] < evaluated[0]["dev_loss"]
    assert all(0 <= row["dev_exact_match"] <= row["dev_f1"] <= 1 for row in evaluated)
    assert all(0 < row["memory_gb"] < 2 for row in metrics)
    if peak_flops(torch.cuda.get_device_name()):
        assert all(0 < row["utilisation"] < 1 for row in metrics)
    assert list(run.glob("run-*/checkpoint_*/adapter/adapter_model.safetensors"))
    assert len(list(out.glob("tensorboard/events*"))) == 1 + is_killed, "each start of a worker makes one"


def test_memory_is_chosen_by_what_is_free_and_the_step_takes_no_more_than_was_said(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch._dynamo.reset()
    plan = plan_of(rows, tmp_path, gpus=1, block_tokens=None)
    assert "train: memory: blocks of 16,384 tokens, activations kept: about" in capsys.readouterr().out
    assert (plan.block_tokens, plan.recompute) == (16384, False)
    chosen = Memory.model_validate_json(Path(plan.folder, "memory.json").read_text())
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    training = Training(plan, 0, 1, CUDA)
    losses(training, 2)
    training.evaluate()
    training.answer_questions()
    assert 0.1 < training.advance()["memory_gb"] < chosen.needed_gb * 1.05


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_dora_and_rslora_learn_on_a_gpu_in_16_bits_as_on_a_cpu_in_32(
    near: Near, rows: str, tmp_path: Path, kind: str
) -> None:
    torch._dynamo.reset()
    lora = {kind: True, "rank": 8, "alpha": 16, "dropout": 0.0}  # dropout draws other numbers on another device
    on_gpu = Training(plan_of(rows, tmp_path / "gpu", base_format="bf16", lora=lora), 0, 1, CUDA)
    on_cpu = Training(plan_of(rows, tmp_path / "cpu", base_format="fp32", lora=lora), 0, 1, CPU)
    found = losses(on_gpu, HALF)
    near(found, losses(on_cpu, HALF), ACROSS)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_zero_gives_the_curve_of_ddp_although_its_worker_is_killed(
    bare: Callable[[str], Bare], near: Near, rows: str, tmp_path: Path, strategy: str
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed", exc_type=ImportError)
    out = tmp_path / "adapter"
    killer = threading.Thread(target=kill_a_worker_after_step, args=(Path(f"{out}.run"), HALF), daemon=True)
    killer.start()
    train(TrainConfig.model_validate({"data": rows, "out": str(out), "strategy": strategy} | SETTINGS))
    killer.join(timeout=1)
    assert not killer.is_alive(), "no worker was killed"
    near([loss for _, loss in curve(out)], bare("nf4").losses, ACROSS)


def prompts_of(rows: str, number: int) -> list[list[int]]:
    tokenizer = load_tokenizer("tiny")
    files = sorted(Path(rows, "train").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    asked = [{"role": "user", "content": json.loads(line)["instruction"]} for line in lines[:number]]
    return [prompt_ids(tokenizer, [message]) for message in asked]


def drawn(engine: Engine, asked: list[tuple[list[int], Sampling]]) -> list[tuple[int, ...]]:
    """The tokens of each answer, all asked for at once."""

    async def ask() -> list[tuple[int, ...]]:
        found = await asyncio.gather(*(complete(engine, prompt, sampling) for prompt, sampling in asked))
        return [completion.token_ids for completion in found]

    return asyncio.run(ask())


def answers(engine: Engine, prompts: list[list[int]], adapter: str = "") -> list[tuple[int, ...]]:
    return drawn(engine, [(prompt, Sampling(max_tokens=32, adapter=adapter)) for prompt in prompts])


def agreement(engine: Engine, prompts: list[list[int]], expected: list[tuple[int, ...]]) -> float:
    """Share of the expected tokens that the engine draws too, each after those before it."""
    places = [(prompt, answer, n) for prompt, answer in zip(prompts, expected, strict=True) for n in range(len(answer))]
    asked = [(prompt, Sampling(max_tokens=n + 1, drawn=answer[:n])) for prompt, answer, n in places]
    same = [token == answer[n] for (token,), (_, answer, n) in zip(drawn(engine, asked), places, strict=True)]
    return sum(same) / len(same)


@pytest.fixture(scope="module")
def live(bare: Callable[[str], Bare], rows: str) -> list[tuple[int, ...]]:
    """Answers of the base with the adapter live, in bf16."""
    adapters = AdapterFolders({"tuned": str(bare("nf4").end / "adapter")})
    engine = load_engine("transformers", "tiny", adapters=adapters)
    try:
        return answers(engine, prompts_of(rows, 24), "tuned")
    finally:
        engine.close()


@pytest.mark.parametrize("weight_format", ["bf16", "nf4", "int8", "fp8", "w4a16"])
def test_every_format_is_made_and_measured_on_the_gpu_and_answers_as_base_and_live_adapter(
    bare: Callable[[str], Bare], live: list[tuple[int, ...]], rows: str, tmp_path: Path, weight_format: str
) -> None:
    adapter = str(bare("nf4").end / "adapter")
    settings = {"adapter": adapter, "base": "tiny", "prompt_format": "chat", "data": rows, "format": weight_format}
    out = merge(MergeConfig.model_validate(settings | {"out": str(tmp_path / "model")}))
    counts = storage.open_folder(out, "merge").receipt.counts
    assert counts["kl"] < 0.1
    assert counts["top1"] > 0.9
    engine = load_engine("transformers", out)
    try:
        assert agreement(engine, prompts_of(rows, 24), live) > 0.9
    finally:
        engine.close()


def test_the_embedded_engine_draws_the_tokens_on_a_gpu_that_it_draws_on_a_cpu(
    bare: Callable[[str], Bare], rows: str
) -> None:
    adapters = AdapterFolders({"tuned": str(bare("nf4").end / "adapter")})
    on_cpu = TransformersEngine(load_model("tiny", dtype=torch.float32), load_tokenizer("tiny"), adapters=adapters)
    on_gpu = load_engine("transformers", "tiny", dtype="float32", adapters=adapters)
    prompts = prompts_of(rows, 12)
    try:
        for adapter in ("", "tuned"):
            assert answers(on_gpu, prompts, adapter) == answers(on_cpu, prompts, adapter)
    finally:
        on_cpu.close()
        on_gpu.close()
