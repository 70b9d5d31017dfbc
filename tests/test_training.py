"""Training through Ray: the same curve on any number of workers, after kill -9, and after a rerun."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.train_command import SETTINGS, curve, flags_of
from cluster import session, storage
from cluster.errors import StageError
from pipelines.model_folders import open_model
from pipelines.preparation import PrepareConfig, prepare
from pipelines.run.checkpoint_store import COPY, LIST, CheckpointStore
from pipelines.run.planning import rounded_far, who_waits
from pipelines.run.progress import MetricsLog, describe, read_metrics
from pipelines.run.training_run import _tell_where_it_begins
from pipelines.training import TrainConfig, _publish, train
from tests.training_runs import assert_same_curve, checkpoint_lists, kill_a_worker_after_step, scores, steps_of

pytestmark = pytest.mark.slow


def test_the_adapter_folder_is_plain_peft_with_a_picture_and_what_the_next_stage_must_know(
    undisturbed: str, rows: str
) -> None:
    names = {path.name for path in Path(undisturbed).iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.png",
        "report.html",
        "tensorboard",
        "receipt.json",
    }
    receipt = json.loads(Path(undisturbed, "receipt.json").read_text())
    facts = receipt["facts"]
    assert receipt["seconds"] > 5  # of the whole stage, not of copying its results
    assert (facts["base"], facts["prompt_format"], facts["preset"]) == ("tiny", "chat", "multidoc")
    assert facts["base_digest"] == open_model("tiny", "--base").weights_digest
    assert any(
        tensor.abs().max() > 0
        for name, tensor in load_file(f"{undisturbed}/adapter_model.safetensors").items()
        if "lora_B" in name
    )
    losses = [loss for _, loss in curve(Path(undisturbed))]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_data_that_was_cut_by_another_tokenizer_is_remarked_on(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(rows, tmp_path / "data")
    receipt = tmp_path / "data/receipt.json"
    told = json.loads(receipt.read_text())
    told["facts"]["tokenizer"] = "another"
    receipt.write_text(json.dumps(told))
    with pytest.raises(StageError, match="1000 workers need 1000 CPU"):
        train(TrainConfig(data=str(tmp_path / "data"), out=str(tmp_path / "adapter"), workers=1000, use_gpu=False))
    assert "prepared with another tokenizer than tiny's" in capsys.readouterr().err


def test_two_workers_give_the_curve_of_one_although_one_is_killed_in_the_middle(
    undisturbed: str, rows: str, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    killer = threading.Thread(target=kill_a_worker_after_step, args=(Path(f"{out}.run"), 4), daemon=True)
    killer.start()
    train(TrainConfig(data=rows, out=str(out), workers=2, **SETTINGS))
    killer.join(timeout=1)
    assert not killer.is_alive(), "no worker was killed"
    assert_same_curve(out, undisturbed)
    assert scores(out) == scores(undisturbed)


def test_a_run_that_is_interrupted_and_then_killed_goes_on_with_the_same_curve_although_its_list_is_torn(
    undisturbed: str, rows: str, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    command = [sys.executable, "-m", "pipelines", "train", "--data", rows, "--out", str(out), *flags_of(SETTINGS)]
    said = tmp_path / "said"
    for end, step, code in ((signal.SIGINT, 4, 130), (signal.SIGKILL, 8, -9)):
        run = subprocess.Popen(command, stdout=said.open("w"), stderr=subprocess.DEVNULL)
        while (
            len(steps_of(Path(f"{out}.run"))) < step
            or not checkpoint_lists(Path(f"{out}.run"))
            or (end == signal.SIGKILL and "was torn" not in said.read_text())
        ):
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(end)
        assert run.wait(timeout=60) == code
        assert not out.exists()
        if end == signal.SIGINT:
            (checkpoints,) = checkpoint_lists(Path(f"{out}.run"))
            os.truncate(checkpoints, 100)
    assert f"{checkpoints} was torn" in said.read_text()
    last = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert last.returncode == 0, last.stderr
    assert "resuming: an earlier run of this reached step" in last.stdout
    assert_same_curve(out, undisturbed)


def test_a_finished_run_is_not_trained_further(undisturbed: str, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(undisturbed, "adapter_model.safetensors").read_bytes()
    train(TrainConfig(data=rows, out=undisturbed, **SETTINGS))
    assert "is finished already" in capsys.readouterr().out
    assert Path(undisturbed, "adapter_model.safetensors").read_bytes() == before


def test_a_row_longer_than_a_block_and_too_many_workers_are_refused_by_name(
    rows: str, tmp_path: Path, ray_cluster: None
) -> None:
    with pytest.raises(StageError, match=r"row train/part-00000.jsonl:\d+ has \d+ tokens, a block holds 64; raise"):
        train(TrainConfig(data=rows, out=str(tmp_path / "a"), **{**SETTINGS, "block_tokens": 64}))
    with pytest.raises(StageError, match=r"1000 workers need 1000 CPU, the Ray cluster has \d+; lower --workers"):
        train(TrainConfig(data=rows, out=str(tmp_path / "a"), workers=1000, **SETTINGS))
    assert not (tmp_path / "a").exists()


def test_a_wait_for_gpus_that_others_hold_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    session.require(1, 1, 1)
    assert capsys.readouterr().err == ""
    session.require(2, 1, 1)
    assert capsys.readouterr().err == "waiting: 2 GPU needed, others hold all but 1\n"


def test_gpus_are_asked_for_as_told_and_one_that_is_not_there_is_refused(
    rows: str, tmp_path: Path, ray_cluster: None
) -> None:
    assert [session.gpus_per_worker(asked) for asked in (True, False)] == [1, 0]
    assert session.gpus_per_worker(None) == int("GPU" in ray.cluster_resources())
    settings = {**SETTINGS, "use_gpu": True}
    with pytest.raises(StageError, match=r"1000 GPU, the Ray cluster has \d+; lower .* or give --use_gpu false"):
        session.require(1000, 0, 1)
    if "GPU" not in ray.cluster_resources():
        with pytest.raises(StageError, match="1 workers need 1 GPU, the Ray cluster has 0"):
            train(TrainConfig(data=rows, out=str(tmp_path / "a"), **settings))


def test_an_error_that_new_workers_would_meet_again_ends_the_run_at_once(
    rows: str, tmp_path: Path, ray_cluster: None
) -> None:
    """Left to Ray Train, it would be met max_failures times more, and the message would say to go on."""
    with pytest.raises(
        StageError, match=r"loss .* at step \d+, its rows are in \S+; look at these rows, or lower"
    ) as e:
        train(TrainConfig(data=rows, out=str(tmp_path / "a"), **{**SETTINGS, "learning_rate": 1e30}))
    assert "\n" not in str(e.value)
    (file,) = (tmp_path / "a.run").glob("run-*/bad-step-*.json")
    assert str(file) in str(e.value)
    assert all(row.startswith("train/part-00000.jsonl:") for row in json.loads(file.read_text())["rows"])
    assert not (tmp_path / "a").exists()


def test_a_worker_killed_while_it_rewrites_its_metrics_loses_none(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 4.0 - step, "seconds": 2.0, "saving_seconds": 0.5, "workers": 3} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"ste')
    command = "import os, pathlib, sys; from pipelines.run.progress import MetricsLog; "
    command += (
        "pathlib.Path.replace = lambda *_: os.kill(os.getpid(), 9); MetricsLog(pathlib.Path(sys.argv[1])).begin(1, 3)"
    )
    killed = subprocess.run([sys.executable, "-c", command, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    for _ in range(2):  # the second one comes before the step has been computed again
        log = MetricsLog(tmp_path)
        log.begin(1, workers=2)
        assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3.0]
    log.write({"step": 2, "loss": 1.5, "seconds": 2.0, "workers": 2})
    log.write({"step": 2, "dev_loss": 1.0})
    kept, again = read_metrics(tmp_path / "metrics.jsonl")
    assert kept == rows[0]
    lost = 3 * 2.5 / 2  # what three workers did for the step that is computed again, and two stand for now
    assert again == {"step": 2, "loss": 1.5, "seconds": 2.0, "workers": 2, "lost_seconds": lost, "dev_loss": 1.0}
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_a_curve_whose_folder_is_lost_comes_back_with_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    log = MetricsLog(tmp_path / "lost")
    log.begin(0, 1)
    rows = [{"step": n, "loss": 4.0 - n, "seconds": 1.0, "tokens": 10, "waiting_seconds": 0.0} for n in (1, 2)]
    for row in rows:
        log.write(row)
    log.copy_to(checkpoint)
    again = MetricsLog(tmp_path / "run")
    again.begin(2, 1, checkpoint)
    assert read_metrics(tmp_path / "run/metrics.jsonl") == rows
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 3.0), (2, 2.0)]
    assert "0:00:02 left" in describe(rows[1:], 4)  # steps are counted by their number, not by those on record


def test_of_two_workers_that_write_the_same_run_the_one_that_came_last_has_it(tmp_path: Path) -> None:
    """A node that is cut off goes on computing where nothing of the others is needed."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    computing, loading = MetricsLog(tmp_path), MetricsLog(tmp_path / "other")
    computing.begin(1, 1)
    last = MetricsLog(tmp_path)
    computing.write({"step": 2, "loss": 9.0, "seconds": 1.0, "workers": 1})  # still in its place
    last.begin(1, 1)
    computing.write({"step": 3, "loss": 9.0})
    last.write({"step": 2, "loss": 2.0})
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3.0, 2.0]
    MetricsLog(tmp_path / "other").begin(1, 1)
    with pytest.raises(FileNotFoundError):
        loading.begin(1, 1)


def test_the_adapter_of_the_lowest_dev_loss_is_kept_if_asked_for_and_the_last_one_is_there_without_training(
    rows: str, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    # The rate rises to one at which nothing can be learned.
    rising = {"learning_rate": 0.05, "warmup_ratio": 0.9, "schedule": "constant", "eval_steps": 3, "score_rows": 0}
    places = {"data": rows, "out": str(tmp_path / "a"), "storage": str(tmp_path / "store")}
    config = TrainConfig.model_validate(SETTINGS | rising | places | {"keep": "best"})
    metrics = read_metrics(Path(train(config), "metrics.jsonl"))
    losses = {row["step"]: row["dev_loss"] for row in metrics if "dev_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best < config.max_steps
    assert f"holds the adapter of step {best}" in capsys.readouterr().out
    adapter = Path(config.out, "adapter_model.safetensors").read_bytes()
    shutil.rmtree(f"{config.out}.run")  # all but the store is lost
    train(config.model_copy(update={"keep": "last"}))
    said = capsys.readouterr().out
    assert f"holds the adapter of step {config.max_steps}" in said
    assert f"the dev loss was lowest at step {best}: the same command with --keep best takes that adapter" in said
    assert read_metrics(Path(config.out, "metrics.jsonl")) == metrics
    assert Path(config.out, "adapter_model.safetensors").read_bytes() != adapter


def test_without_dev_rows_there_is_no_best_and_no_early_stop(tmp_path: Path, rows: str, ray_cluster: None) -> None:
    raw = str(Path(rows).with_name("raw"))
    data = prepare(PrepareConfig(raw=raw, out=str(tmp_path / "data"), dev_share=0.0))
    for setting in ({"patience": 1}, {"keep": "best"}):
        settings = SETTINGS | setting | {"data": data, "out": str(tmp_path / "a")}
        with pytest.raises(
            StageError, match=r"^--patience and --keep best go by the dev loss, but .* has no dev rows; "
        ):
            train(TrainConfig.model_validate(settings))


@pytest.mark.parametrize("place", ["foo://x/y", "/proc/nix"])
def test_a_store_that_cannot_be_written_is_named_before_anything_starts(rows: str, tmp_path: Path, place: str) -> None:
    settings = SETTINGS | {"data": rows, "out": str(tmp_path / "a"), "storage": place, "workers": 1000}
    with pytest.raises(StageError, match=rf"^no checkpoint can be written to {place}: .*; give --storage a folder"):
        train(TrainConfig.model_validate(settings))


def list_of(step: int) -> str:
    return json.dumps({"latest_checkpoint_result": {"metrics": {"step": step}}})


def test_a_torn_list_of_checkpoints_is_replaced_by_its_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, found = CheckpointStore(str(tmp_path), "run-x"), tmp_path / "run-x" / LIST
    assert store.mend_list() is None
    found.write_text(list_of(4))
    store.copy_list()
    found.write_text(list_of(6))
    assert store.mend_list() == 6
    found.write_text(list_of(8)[:20])
    assert store.mend_list() == 4
    assert found.read_text() == list_of(4)
    found.write_text("")
    found.with_name(COPY).unlink()
    assert store.mend_list() is None
    assert {path.name for path in found.parent.iterdir()} == set()
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"train: {found} was torn; {COPY} beside it has what it said before",
        f"train: {found} was torn before it listed a checkpoint",
    ]


def test_checkpoints_that_no_list_has_are_deleted_when_a_run_begins_and_nothing_else(tmp_path: Path) -> None:
    store, folder = CheckpointStore(str(tmp_path), "run-x"), tmp_path / "run-x"
    listed, orphan = ("checkpoint_2026-01-02_03-04-05.67", "checkpoint_2026-01-02_03-05-05.67")
    for name in (listed, orphan, "checkpoint_of_mine", "tensorboard"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    store.remove_orphans()
    assert len(list(folder.iterdir())) == 4  # nobody knows which of them count
    results = {"latest_checkpoint_result": {"metrics": {"step": 2}}, "checkpoint_results": []}
    results["checkpoint_results"] = [{"checkpoint_dir_name": listed}]
    (folder / LIST).write_text(json.dumps(results))
    store.remove_orphans()
    assert {path.name for path in folder.iterdir()} == {LIST, listed, "checkpoint_of_mine", "tensorboard"}


FILL = """
import pathlib, resource, sys, torch
from peft import LoraConfig
from pipelines.run.checkpoints import save_checkpoint
from pipelines.compute.step import trainable_model
lora = LoraConfig(r=16, target_modules=["q_proj"], task_type="CAUSAL_LM")
model = trainable_model("tiny", "fp32", lora, torch.device("cpu"))
for limit in (20_000, 400_000):  # the adapter's file has 200 KB, the other one more
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_checkpoint(model, {"moments": torch.ones(1 << 18)}, pathlib.Path(sys.argv[1]))
    except OSError as error:
        print(error)
"""


def test_a_place_for_checkpoints_that_takes_no_more_is_told_as_the_system_does(tmp_path: Path) -> None:
    """By the number in it, a full disk is known for an error that new workers would meet again."""
    done = subprocess.run([sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"[Errno 27] File too large: '{tmp_path}'"] * 2, done.stderr


def test_what_was_chosen_for_a_run_comes_back_from_its_store(tmp_path: Path) -> None:
    store, file = CheckpointStore(str(tmp_path / "store"), "run-x"), tmp_path / "run-x" / "memory.json"
    store.fetch(file)
    assert not file.exists()
    file.parent.mkdir()
    file.write_text("chosen")
    store.keep(file)
    shutil.rmtree(file.parent)
    store.fetch(file)
    assert file.read_text() == "chosen"


def test_a_run_whose_checkpoints_are_elsewhere_says_that_it_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    _tell_where_it_begins(tmp_path, CheckpointStore(str(tmp_path / "other"), "run-x"))
    said = f"an earlier run of this reached step 1, but {tmp_path}/other/run-x has no checkpoint: beginning again"
    assert capsys.readouterr().out == f"train: {said}\n"


def test_what_keeps_a_finished_run_from_being_written_is_told_in_one_line(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("one", "two"):  # of which shutil gives a list of tuples
        (adapter / name).symlink_to("nowhere")
    config = TrainConfig(out=str(tmp_path / "out"))
    receipt = storage.receipt_of("train", config)
    with pytest.raises(
        StageError, match=r"^--out \S+ cannot be written: \[Errno 2\] No such file [^(]*; mend that, and"
    ):
        _publish(config, adapter, tmp_path, receipt, 0, 0.0)


@pytest.mark.parametrize(
    ("blocks", "per_step", "workers", "said"),
    [
        (1250, 9, 8, "9 blocks a step on 8 workers: 7 wait for half of each step; --batch_size 64 makes it 8"),
        (1250, 4, 8, "4 blocks a step on 8 workers: 4 wait for all of each step; --batch_size 64 makes it 8"),
        (1250, 14, 4, "14 blocks a step on 4 workers: 2 wait for 1/4 of each step; --batch_size 128 makes it 16"),
        (5, 32, 8, "5 blocks a step on 8 workers: 3 wait for all of each step; --workers 5 do"),
        (1250, 16, 8, ""),
        (1250, 3, 1, ""),
    ],
)
def test_workers_that_would_wait_in_each_step_are_told_of_with_the_batch_size_that_fits(
    blocks: int, per_step: int, workers: int, said: str
) -> None:
    assert who_waits(blocks, 8 * blocks, per_step, workers) == said


def test_a_batch_size_that_whole_blocks_cannot_come_near_is_told_of() -> None:
    assert rounded_far(100, 16_000, 1, 32) == (
        "a step takes about 160 examples, not --batch_size 32, as a block holds 160; smaller --block_tokens come nearer"
    )
    assert rounded_far(1250, 10_000, 4, 32) == ""
    assert rounded_far(1, 20, 1, 32) == ""


def test_a_list_may_be_given_as_one_word_and_fewest_workers_are_not_more_than_all() -> None:
    given = TrainConfig.parse({"lora": {"targets": "q_proj,v_proj"}, "trackers": "mlflow"}, "flags")
    assert (given.lora.targets, given.trackers) == (["q_proj", "v_proj"], ["mlflow"])
    with pytest.raises(StageError, match=r"^flags: min_workers 4 is more than workers 2; it is the least of them$"):
        TrainConfig.parse({"min_workers": 4, "workers": 2}, "flags")


def test_modules_that_get_no_adapter_are_refused_in_one_line() -> None:
    with pytest.raises(StageError, match=r"^flags: lora.targets.0: Input should be 'q_proj', .*\(got 'lm_head'\)$"):
        TrainConfig.parse({"lora": {"targets": ["lm_head"]}}, "flags")
    with pytest.raises(StageError, match=r"^flags: lora.modules_to_save is not a setting; leave it out"):
        TrainConfig.parse({"lora": {"modules_to_save": ["lm_head"]}}, "flags")
