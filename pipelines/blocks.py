"""Which block a worker takes at a step: arithmetic on (seed, epoch, step, rank, world size), nothing to remember."""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipelines.packing import BLOCKS_PER_GROUP, Block


class BlockFile:
    """Random access to a Parquet file of packed blocks; one row group is read at a time."""

    def __init__(self, path: str | Path) -> None:
        self._file = pq.ParquetFile(path, memory_map=True)
        self.target_counts: np.ndarray = self._file.read(["target_count"])["target_count"].to_numpy()

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


@dataclass(frozen=True)
class BlockOrder:
    """The global order of blocks: every epoch is a seeded permutation, cut into steps of `per_step` blocks.

    The last step of an epoch takes what is left, so an epoch is exact. Because a step's blocks do not depend on the
    number of workers, neither does the loss curve, and a run resumes exactly from its step number.
    """

    blocks: int
    per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every block once."""
        return math.ceil(self.blocks / self.per_step)

    def step(self, step: int) -> list[int]:
        """The indices of all blocks of global step `step` (0-based)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _permutation(self.blocks, self.seed, epoch)
        return [int(i) for i in order[place * self.per_step : (place + 1) * self.per_step]]

    def share(self, step: int, rank: int, world: int) -> list[int]:
        """The blocks of one worker at `step`; the workers' shares differ by at most one block."""
        return self.step(step)[rank::world]


@lru_cache(maxsize=2)
def _permutation(blocks: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(blocks)
