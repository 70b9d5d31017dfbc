"""The command line as a person meets it: help that teaches, errors of one line, exit code 1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.commands import parse_config
from cluster.config import Config
from cluster.errors import StageError
from cluster.storage import open_folder, publish, read_receipt, receipt_of


class Inner(Config):
    """An inner section."""

    rank: int = 4
    """Rank."""


class Outer(Config):
    """Do the thing."""

    name: str = "a"
    """Name of it."""
    strict: bool = False
    """Be strict."""
    sizes: tuple[int, ...] = (1,)
    """Some sizes."""
    inner: Inner = Inner()
    """The inner one."""


def stage(config: Outer) -> None:
    """A stage."""


def parse(*flags: str) -> Config:
    return parse_config("prog thing", "thing", stage, list(flags), ["thing", "other"])


def test_flags_reach_nested_fields_and_keep_their_types() -> None:
    config = parse("--name", "007", "--inner.rank", "16", "--strict", "--sizes", "[1, 2]")
    assert config == Outer(name="007", strict=True, sizes=(1, 2), inner=Inner(rank=16))


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("thing: {name: file, inner: {rank: 8}}\nother: {}\n")
    assert parse("--config", str(file), "--name", "flag") == Outer(name="flag", inner=Inner(rank=8))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inner.rnk", "3"], "unknown flag --inner.rnk, did you mean --inner.rank?"),
        (["--inner.rank", "many"], r"inner.rank: Input should be a valid integer.*got 'many'"),
        (["--config", "no.yaml"], "no.yaml: there is no such file"),
    ],
)
def test_a_wrong_flag_is_named_with_the_remedy(flags: list[str], message: str) -> None:
    with pytest.raises(StageError, match=message):
        parse(*flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("thing: {nme: x}", "nme is not a setting"),
        ("thin: {}", "thin is no stage; sections are thing, other"),
        ("[1", "is not YAML"),
        ("3", "must map stage names to settings"),
    ],
)
def test_a_wrong_config_file_is_named_with_the_remedy(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(StageError, match=message):
        parse("--config", str(file))


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


def test_listing_the_commands_is_quick_and_imports_neither_torch_nor_ray() -> None:
    code = "import sys, pipelines.__main__; sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert "prepare" in run().stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepar"], ["prepar is no command, did you mean prepare?"]),
        (["prepare", "--raw", "nowhere"], ["--raw nowhere", "no such folder"]),
        (["prepare", "--rww", "x"], ["unknown flag --rww", "--raw"]),
        (["train", "--data", "nowhere"], ["nowhere", "no such folder", "run prepare first"]),
        (["train", "--data", "tests"], ["tests has no receipt.json", "run it again"]),
        (["merge", "--adapter", "nowhere"], ["nowhere"]),
        (["evaluate", "--model", "nowhere"], ["nowhere"]),
        (["predict", "--model", "nowhere", "问题"], ["nowhere"]),
    ],
)
def test_a_wrong_command_ends_with_one_line_and_exit_code_1(arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_a_relative_output_in_a_ray_job_is_refused_because_it_would_be_thrown_away(tmp_path: Path) -> None:
    result = run("prepare", "--raw", str(tmp_path), "--out", "out/x", RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert result.returncode == 1
    (tmp_path / "a.json").write_text("{}\n")
    result = run("prepare", "--raw", str(tmp_path), "--out", "out/x", RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert "give an absolute path" in result.stderr


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), publish(out, receipt_of("thing", Outer())) as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with publish(out, receipt_of("thing", Outer(), facts={"a": 1})) as folder:
        (folder / "file").write_text("x")
    assert open_folder(out, "thing").receipt.facts == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_somebody_elses_folder_is_not_overwritten_and_an_earlier_result_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    with pytest.raises(StageError, match="was not written by a stage"), publish(out, receipt_of("thing", Outer())):
        pass
    assert (out / "thesis.txt").exists()
    (out / "thesis.txt").rename(tmp_path / "thesis.txt")
    for number in (1, 2):
        with publish(out, receipt_of("thing", Outer(), facts={"n": number})) as folder:
            (folder / f"file{number}").write_text("x")
    assert sorted(p.name for p in out.iterdir()) == ["file2", "receipt.json"]


def test_a_damaged_receipt_and_another_stages_folder_are_refused(tmp_path: Path) -> None:
    with publish(tmp_path / "a", receipt_of("prepare", Outer())):
        pass
    with pytest.raises(StageError, match="was written by prepare, but a folder written by train is needed"):
        open_folder(tmp_path / "a", "train")
    (tmp_path / "a" / "receipt.json").write_text("{")
    with pytest.raises(StageError, match="is damaged"):
        read_receipt(tmp_path / "a")


def test_an_input_and_another_stages_result_are_not_overwritten(tmp_path: Path) -> None:
    with publish(tmp_path / "a", receipt_of("prepare", Outer())):
        pass
    with (
        pytest.raises(StageError, match="holds what prepare wrote"),
        publish(tmp_path / "a", receipt_of("train", Outer())),
    ):
        pass
    again = receipt_of("prepare", Outer(), inputs={str(tmp_path / "a"): ""})
    with pytest.raises(StageError, match="is also an input"), publish(tmp_path / "a", again):
        pass
    assert open_folder(tmp_path / "a", "prepare")
