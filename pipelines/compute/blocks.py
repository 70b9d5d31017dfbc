"""Packed blocks, and which one a worker takes at a step: arithmetic on (seed, epoch, step, rank, world size)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

Work = TypeVar("Work")


@dataclass(frozen=True)
class Block:
    """Several examples one after another: ids and target marks of shape [tokens], and each example's length."""

    input_ids: np.ndarray
    is_target: np.ndarray
    lengths: list[int]
    rows: list[str]
    target_count: int


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


def share(work: Sequence[Work], rank: int, world: int, equal: bool = False) -> list[tuple[Work, bool]]:
    """What one of `world` workers computes of `work`, and of each whether it counts.

    Shares differ by at most one; with `equal`, who has one less computes another's too, which does not count.
    """
    mine = work[rank::world]
    missing = -(-len(work) // world) - len(mine)
    return [(each, True) for each in mine] + [(each, False) for each in work[: missing * equal]]


@lru_cache(maxsize=2)
def _permutation(blocks: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(blocks)
