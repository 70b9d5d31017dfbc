"""Packed blocks as a Parquet file: written once, read at random places by every worker."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.compute.blocks import Block

BLOCKS_PER_GROUP = 16  # Parquet row group: what a worker reads to get one block
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "is_target": pa.list_(pa.bool_()),
        "lengths": pa.list_(pa.int32()),
        "rows": pa.list_(pa.string()),
        "target_count": pa.int32(),
    }
)


def write_blocks(blocks: Iterable[Block], path: Path) -> dict[str, int]:
    """Write blocks as they come, a row group at a time; returns how many blocks, examples and tokens they are."""
    counts = {"blocks": 0, "examples": 0, "tokens": 0, "target_tokens": 0}
    with pq.ParquetWriter(path, SCHEMA) as writer:
        group: list[dict[str, Any]] = []
        for block in blocks:
            counts["blocks"] += 1
            counts["examples"] += len(block.lengths)
            counts["tokens"] += len(block.input_ids)
            counts["target_tokens"] += block.target_count
            group.append(asdict(block))
            if len(group) == BLOCKS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, SCHEMA))
    return counts


class BlockFile:
    """Random access to a Parquet file of packed blocks; one row group is read at a time."""

    def __init__(self, path: str | Path) -> None:
        self._file = pq.ParquetFile(path, memory_map=True)
        counts = self._file.read(["target_count", "lengths"])
        self.target_counts: np.ndarray = counts["target_count"].to_numpy()
        lengths = counts["lengths"].to_pylist()
        self.token_counts = np.array([sum(block) for block in lengths], np.int64)
        self.attended_counts = np.array([sum(n * (n + 1) // 2 for n in block) for block in lengths], np.int64)
        """Pairs of a token and one that it sees: itself or an earlier one of its example."""

    def __len__(self) -> int:
        return len(self.target_counts)

    def __getitem__(self, index: int) -> Block:
        group = self._file.read_row_group(index // BLOCKS_PER_GROUP)
        row = group.slice(index % BLOCKS_PER_GROUP, 1)
        return Block(
            row["input_ids"].combine_chunks().flatten().to_numpy(),
            row["is_target"].combine_chunks().flatten().to_numpy(zero_copy_only=False),
            row["lengths"][0].as_py(),
            row["rows"][0].as_py(),
            row["target_count"][0].as_py(),
        )
