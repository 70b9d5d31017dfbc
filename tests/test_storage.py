"""Folders with receipts: whole or not at all, also when a run is killed at the worst moment."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import StageError
from cluster.storage import Receipt, check_output, open_folder, publish

PUBLISH = """
import os, sys, pathlib
from cluster.storage import Receipt, publish

renames, rename = [], pathlib.Path.rename

def rename_and_die(path, target):
    rename(path, target)
    renames.append(target)
    if len(renames) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)

pathlib.Path.rename = rename_and_die
with publish(sys.argv[1], Receipt("train", {})) as folder:
    (folder / "content").write_text("new")
"""


def write(out: Path, content: str) -> None:
    with publish(out, Receipt("train", {})) as folder:
        (folder / "content").write_text(content)


def publish_and_die(out: Path, after_renames: int) -> None:
    """Publish "new" at `out` in a process that kills itself after so many renames."""
    command = [sys.executable, "-c", PUBLISH, str(out), str(after_renames)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["adapter", "adapter[1]"])
def test_a_run_killed_between_the_two_renames_of_a_replacement_loses_nothing(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    write(out, "old")
    publish_and_die(out, after_renames=1)
    assert not out.exists()
    assert sorted(path.joinpath("content").read_text() for path in tmp_path.iterdir()) == ["new", "old"]
    check_output(out, "train")  # what every stage does first
    assert open_folder(out, "train").path.joinpath("content").read_text() == "new"
    storage.remove_leftovers(out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_killed_after_them_left_the_new_folder_and_the_next_one_clears_up(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    write(out, "old")
    publish_and_die(out, after_renames=2)
    assert (out / "content").read_text() == "new"
    write(out, "newer")
    assert list(tmp_path.iterdir()) == [out]
    assert (out / "content").read_text() == "newer"


def test_an_exception_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    write(out, "old")
    with pytest.raises(RuntimeError), publish(out, Receipt("train", {})) as folder:
        (folder / "content").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [out]
    assert (out / "content").read_text() == "old"


@pytest.mark.parametrize("error", [StageError, OSError, KeyboardInterrupt])
def test_an_error_leaves_what_another_run_of_the_same_digest_goes_on_behind_and_says_where(
    error: type[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, partial = tmp_path / "model", tmp_path / ".model.partial-abcdefgh"
    with pytest.raises(error), publish(out, Receipt("merge", {}), "abcdefghij") as folder:
        (folder / "content").write_text("finished")
        raise error
    assert list(tmp_path.iterdir()) == [partial]
    assert capsys.readouterr().err.startswith(f"merge: finished files stay in {partial}, and the same command goes on")
    with publish(out, Receipt("merge", {}), "abcdefghij") as folder:
        assert (folder / "content").read_text() == "finished"
    assert list(tmp_path.iterdir()) == [out]


def test_brackets_in_a_name_stand_for_themselves(tmp_path: Path) -> None:
    write(tmp_path / "run[ab]", "x")
    (tmp_path / ".run[ab].partial-12345678").mkdir()
    others = {tmp_path / f".{name}.partial-12345678" for name in ("runa", "run[ab].partial-12345678")}
    for other in others:
        other.mkdir()
    write(tmp_path / "run[ab]", "y")
    assert set(tmp_path.iterdir()) == {tmp_path / "run[ab]", *others}


def test_links_are_removed_or_left_but_never_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, "kept")
    (elsewhere / "content").chmod(0o600)
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "adapter"
    out.symlink_to(elsewhere)
    out.with_name(".adapter.partial-12345678").symlink_to(elsewhere)
    with publish(out, Receipt("train", {})) as folder:
        (folder / "link").symlink_to(elsewhere / "content")
    assert list(out.parent.iterdir()) == [out]
    assert not out.is_symlink()
    assert (elsewhere / "content").read_text() == "kept"
    assert (elsewhere / "content").stat().st_mode & 0o777 == 0o600


def test_what_was_not_written_by_the_stage_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "adapter", "x")
    with pytest.raises(StageError, match="holds what train wrote; name another folder for merge"):
        check_output(tmp_path / "adapter", "merge")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo").touch()
    with pytest.raises(StageError, match="exists and was not written by a stage; name another folder or remove it"):
        check_output(tmp_path / "mine", "train")
    with pytest.raises(StageError, match="is also an input, which would be lost"):
        check_output(tmp_path / "adapter", "train", [str(tmp_path / "place" / ".." / "adapter")])
    with pytest.raises(StageError, match=r"holds the input .*/adapter/shards, which would be lost"):
        check_output(tmp_path / "adapter", "train", [str(tmp_path / "adapter" / "shards")])
