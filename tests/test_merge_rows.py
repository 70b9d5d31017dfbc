"""Which rows a merge is measured and calibrated on: those of the training, as long as they are the same."""

import shutil
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import StageError
from pipelines.merging import MergeConfig, merge
from tests.merge_inputs import demo_rows, tuned_tiny

GIVE = "give a folder that prepare wrote with --data DIR"


@pytest.fixture
def data(tmp_path: Path) -> str:
    return demo_rows(tmp_path / "data", 6)


@pytest.fixture
def adapter(tmp_path: Path, data: str) -> str:
    return tuned_tiny(tmp_path / "adapter", data)


def test_rows_that_the_adapter_was_trained_on_are_measured_on_only_while_they_are_the_same(
    adapter: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = MergeConfig(adapter=adapter, score_rows=0, format="w4a16", out=str(tmp_path / "model"))
    assert storage.open_folder(merge(config)).receipt.inputs.keys() >= {data}
    shutil.rmtree(data)
    demo_rows(Path(data), 7)
    capsys.readouterr()
    receipt = storage.open_folder(merge(config)).receipt
    why = f"because {data} no longer holds the rows that the adapter was trained on; {GIVE}"
    printed = capsys.readouterr().out
    assert f"merge: not measured, {why}\n" in printed
    assert f"merge: not calibrated, each value is the nearest, {why}\n" in printed
    assert data not in receipt.inputs
    assert "kl" not in receipt.counts
    for must in ({"measure": True}, {"calibrate": True}, {"onto": "auto"}):
        with pytest.raises(StageError, match=f"^{data} no longer holds the rows .*; {GIVE}$"):
            merge(config.model_copy(update=must))
    named = storage.open_folder(merge(config.model_copy(update={"data": data}))).receipt
    assert "kl" in named.counts


def prepared(rows: str, out: Path, dataset: str, run: int) -> None:
    """The rows with a receipt of prepare, which no two runs write alike."""
    with storage.publish(out, storage.Receipt("prepare", {"run": run}, facts={"dataset": dataset})) as folder:
        shutil.copytree(rows, folder, dirs_exist_ok=True)


def test_the_same_rows_prepared_again_are_the_same(data: str, tmp_path: Path):
    out = tmp_path / "prepared"
    prepared(data, out, "one", run=1)
    adapter = tuned_tiny(tmp_path / "adapter", str(out), dataset="one")
    before = storage.file_digest(out / storage.RECEIPT)
    config = MergeConfig(adapter=adapter, score_rows=0, out=str(tmp_path / "model"))
    for dataset, is_measured in (("one", True), ("another", False)):
        prepared(data, out, dataset, run=2)
        assert storage.file_digest(out / storage.RECEIPT) != before
        assert ("kl" in storage.open_folder(merge(config)).receipt.counts) == is_measured


def test_each_of_several_adapters_has_its_own_rows_and_training_in_receipt_and_card(data: str, tmp_path: Path):
    one, two = (
        tuned_tiny(tmp_path / name, data, dataset=f"rows of {name}", run=f"run of {name}") for name in ("one", "two")
    )
    out = Path(merge(MergeConfig(adapter={one: 0.5, two: 0.5}, measure=False, out=str(tmp_path / "model"))))
    facts, card = storage.open_folder(out).receipt.facts, (out / "README.md").read_text()
    assert facts.keys() & {"dataset", "run"} == set()
    assert facts["preset"] == "seed"
    for name, path in (("one", one), ("two", two)):
        assert (facts["recipe"][path]["dataset"], facts["recipe"][path]["run"]) == (f"rows of {name}", f"run of {name}")
        assert f"| trained: {path} | rank 4, alpha 8, targets " in card
        assert f"dataset rows of {name}, run run of {name} |" in card
    assert "data set (sha256 of its rows)" not in card


def test_adapters_of_different_rows_are_not_measured_on_either(
    adapter: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    others = demo_rows(tmp_path / "others", 7)
    parts = {adapter: 0.5, tuned_tiny(tmp_path / "second", others): 0.5}
    merge(MergeConfig(adapter=parts, out=str(tmp_path / "model")))
    wanted = f"merge: not measured, because the adapters were trained on different rows ({data}, {others}); {GIVE}\n"
    assert wanted in capsys.readouterr().out
    with pytest.raises(StageError, match=r"^the adapters were trained on different rows"):
        merge(MergeConfig(adapter=parts, measure=True, out=str(tmp_path / "model")))
