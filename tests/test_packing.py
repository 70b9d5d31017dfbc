"""Rows as packed blocks: the same whether Ray Data tokenizes them or the stage itself."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster import storage
from pipelines.run import packing
from pipelines.run.packing import PackingConfig, pack_split

CONFIG = PackingConfig(
    tokenizer="tiny", prompt_format="chat", block_tokens=1024, max_input_length=4096, max_output_length=4096
)


def test_many_rows_make_the_blocks_on_the_cluster_that_the_stage_makes_of_them_itself(
    rows: str, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = storage.open_folder(rows, "prepare")
    monkeypatch.setattr(packing, "WINDOW", 10)
    assert data.receipt.counts["train"] > 50  # several tasks
    there = pq.read_table(pack_split(data, "train", CONFIG, tmp_path / "there"))
    monkeypatch.setattr(packing, "_encode_on_cluster", packing._encode_here)
    here = pq.read_table(pack_split(data, "train", CONFIG, tmp_path / "here"))
    assert here.equals(there)
    assert sum(map(len, here["lengths"].to_pylist())) == data.receipt.counts["train"]


def test_a_few_rows_start_no_process(rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = storage.open_folder(rows, "prepare")
    monkeypatch.setattr(packing.ray, "data", None)
    assert pack_split(data, "train", CONFIG, tmp_path).is_file()
