"""kill -9 in the middle of a merge: at --out there is a whole model or none, and the same command goes on."""

import json
import multiprocessing
import random
import runpy
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatglm3 import load_model
from cluster import storage
from cluster.errors import StageError
from pipelines.merging import MergeConfig, merge
from pipelines.weights import weight_files
from pipelines.weights.checksums import SUMS, verify
from pipelines.weights.folding import folded
from tests.merge_inputs import demo_rows, tuned_adapter, tuned_tiny

FILE_BYTES = 1_000_000  # the tiny model's weights in eight files, to be killed between two
KILLS = 5  # of each format


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tuned_tiny(tmp_path_factory.mktemp("tuned") / "adapter")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return demo_rows(tmp_path_factory.mktemp("data") / "data", 6)


def command(*flags: str) -> None:
    """`python -m pipelines merge FLAGS`, with small weight files."""
    weight_files.FILE_BYTES = FILE_BYTES
    sys.argv[1:] = ["merge", *flags]
    runpy.run_module("pipelines", run_name="__main__", alter_sys=True)


def started(*flags: str) -> BaseProcess:
    """The command in a process of its own, forked from one that has imported already what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.merging", "transformers.models.glm.modeling_glm", __name__])
    process = context.Process(target=command, args=flags)
    process.start()
    return process


def finish(*flags: str) -> None:
    process = started(*flags)
    process.join()
    assert process.exitcode == 0


def timed(out: Path, *flags: str) -> tuple[float, float]:
    """Seconds from the start of an undisturbed run to its first trace beside `out`, and to its end."""
    process, start = started(*flags), time.monotonic()
    while not any(out.parent.iterdir()):
        assert process.is_alive()
        time.sleep(0.002)
    begins = time.monotonic() - start
    process.join()
    assert process.exitcode == 0
    return begins, time.monotonic() - start


def content(folder: Path) -> dict[str, bytes]:
    """Every file, but for the receipt's seconds and its checksum."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    receipt = json.loads(files[storage.RECEIPT])
    sums = [line for line in files[SUMS].splitlines() if not line.endswith(storage.RECEIPT.encode())]
    return files | {storage.RECEIPT: json.dumps(receipt | {"seconds": 0}).encode(), SUMS: b"\n".join(sums)}


@pytest.mark.parametrize("how", [("--format", "bf16"), ("--format", "w4a16"), ("--onto", "auto")], ids=" ".join)
def test_kill_9_at_any_moment_leaves_a_whole_model_or_none_and_the_same_command_then_finishes(
    how: tuple[str, str], adapter: str, data: str, tmp_path: Path
):
    out = tmp_path / "model"
    flags = "--adapter", adapter, "--data", data, "--score_rows", "2", *how, "--out", str(out)
    finish("--help")  # from now on there is a process to fork from
    begins, ends = timed(out, *flags)
    undisturbed = content(out)
    seed = random.SystemRandom().randrange(10**6)
    drawn, exit_codes = random.Random(seed), []
    for number in range(KILLS):
        moment = drawn.uniform(begins, ends)
        print(f"seed {seed}: killed after {moment:.3f} s; undisturbed, it writes from {begins:.3f} to {ends:.3f} s")
        if number % 2:  # every other one replaces a finished model
            shutil.rmtree(out)
        process = started(*flags)
        time.sleep(moment)
        process.kill()
        process.join()
        exit_codes.append(process.exitcode)
        if out.exists():
            assert verify(out) == len(undisturbed) - 1  # all but the checksums themselves
            assert content(out) == undisturbed
        finish(*flags)
        assert content(out) == undisturbed
        assert list(tmp_path.iterdir()) == [out]
    assert -signal.SIGKILL in exit_codes, exit_codes  # a moment near the end can come too late


def test_a_merge_goes_on_behind_the_files_that_it_wrote_and_another_one_does_not(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipelines.weights.weight_files.FILE_BYTES", FILE_BYTES)
    config = MergeConfig(adapter=adapter, out=str(tmp_path / "model"))
    made: list[str] = []

    def dying(weight: torch.Tensor, updates: Any) -> torch.Tensor:
        made.append("")
        if len(made) == 20:
            raise KeyboardInterrupt
        return folded(weight, updates)

    monkeypatch.setattr("pipelines.weights.folding.folded", dying)
    with pytest.raises(KeyboardInterrupt):
        merge(config)
    (partial,) = tmp_path.iterdir()
    finished = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert len(finished) == 5
    cut = partial / min(finished)
    del finished[cut.name]
    cut.write_bytes(cut.read_bytes()[:-1])  # as a power cut can leave it
    merge(config)
    out = tmp_path / "model"
    assert len(made) == 20 + 36 - 19, "of 36 matrices, the 19 in finished files are not made again"
    assert load_file(out / cut.name)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        merge(config)
    merge(config.model_copy(update={"format": "nf4"}))
    assert list(tmp_path.iterdir()) == [out]
    assert load_model(out).is_loaded_in_4bit


def test_a_merge_does_not_go_on_with_another_adapter_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PEFT writes no receipt that would tell them apart."""
    monkeypatch.setattr("pipelines.weights.weight_files.FILE_BYTES", FILE_BYTES)
    tuned_adapter("tiny", tmp_path / "adapter", std=0.2)
    adapter, out = str(tmp_path / "adapter"), tmp_path / "out/model"
    config = MergeConfig(adapter=adapter, base="tiny", prompt_format="chat", measure=False, out=str(out))
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("pipelines.merging.write_card", interrupt)
        merge(config)
    tuned_adapter("tiny", tmp_path / "adapter", std=0.1)
    merge(config)
    undisturbed = merge(config.model_copy(update={"out": str(tmp_path / "undisturbed")}))
    assert weights_of(out) == weights_of(Path(undisturbed))


def test_a_calibrated_merge_does_not_go_on_under_another_prompt_format(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whose prompts calibrate to other values."""
    tuned_adapter("tiny", tmp_path / "adapter", std=0.2)
    out, settings = tmp_path / "out/model", {"base": "tiny", "data": data, "format": "w4a16", "measure": False}
    config = MergeConfig(adapter=str(tmp_path / "adapter"), prompt_format="bare", out=str(out), **settings)
    undisturbed = merge(config.model_copy(update={"out": str(tmp_path / "undisturbed")}))
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("pipelines.merging.write_card", interrupt)
        merge(config.model_copy(update={"prompt_format": "chat"}))
    merge(config)
    assert weights_of(out) == weights_of(Path(undisturbed))


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_a_merge_whose_weights_are_all_written_is_not_calibrated_again(
    adapter: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = MergeConfig(adapter=adapter, data=data, format="w4a16", measure=False, out=str(tmp_path / "model"))
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("pipelines.merging.write_card", interrupt)
        merge(config)
    (partial,) = tmp_path.iterdir()
    (partial / storage.RECEIPT).write_text("of a run that was killed before its last step, the renaming")
    monkeypatch.setattr("pipelines.merging.calibrate", interrupt)
    out = Path(merge(config))
    counts = storage.open_folder(out).receipt.counts
    assert 0 < counts["gptq_error"] < counts["nearest_error"], "which the killed run found out"
    assert merge(MergeConfig(verify=str(out))) == str(out)
    assert (out / SUMS).read_text().count(storage.RECEIPT) == 1


@pytest.mark.parametrize("onto", ["16bit", "auto"])
def test_a_merge_that_was_refused_is_kept_without_making_a_weight_again(
    onto: Any, adapter: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "model"
    config = MergeConfig(adapter=adapter, data=data, onto=onto, score_rows=0, max_kl=0, out=str(out))
    with pytest.raises(StageError, match="the limit is 0;"):
        merge(config)
    (partial,) = tmp_path.glob(".model.partial-*")
    made = {file.relative_to(partial): file.stat().st_mtime_ns for file in partial.rglob("*.safetensors")}
    assert len(made) == {"16bit": 1, "auto": 2}[onto]
    monkeypatch.setattr("pipelines.weights.folding.folded", interrupt)
    merge(config.model_copy(update={"keep": True}))
    assert (out / "model.safetensors").stat().st_mtime_ns in made.values()
    assert list(tmp_path.iterdir()) == [out]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
