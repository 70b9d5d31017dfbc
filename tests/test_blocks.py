"""Which blocks a worker takes: exact epochs, equal shares, the same steps on any number of workers."""

import numpy as np
import pytest

from cluster.errors import StageError
from pipelines.compute.blocks import BlockOrder, share
from pipelines.run.packing import Example, pack


def example(length: int, name: str = "train/a:1") -> Example:
    return Example(np.zeros(length, np.int32), np.zeros(length, bool), name)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_an_epoch_is_every_block_once_on_any_number_of_workers(workers: int) -> None:
    order = BlockOrder(blocks=103, per_step=8, seed=1)
    assert order.steps_per_epoch == 13
    for step in range(2 * order.steps_per_epoch):
        shares = [share(order.step(step), rank, workers) for rank in range(workers)]
        assert sorted(block for mine in shares for block, _ in mine) == sorted(order.step(step))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    first, second = ([b for s in range(13 * e, 13 * e + 13) for b in order.step(s)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(103))
    assert first != second


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_where_all_must_compute_as_many_what_is_done_twice_does_not_count(workers: int) -> None:
    work = list(range(5))
    shares = [share(work, rank, workers, equal=True) for rank in range(workers)]
    assert {len(mine) for mine in shares} == {-(-5 // workers)}
    assert sorted(each for mine in shares for each, counted in mine if counted) == work


def test_packing_keeps_every_example_once_and_fills_the_blocks() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 3000)
    blocks = list(pack((example(int(n), str(i)) for i, n in enumerate(lengths)), 1024))
    assert sorted(int(e.row) for block in blocks for e in block) == list(range(3000))
    sizes = [sum(len(e.input_ids) for e in block) for block in blocks]
    assert max(sizes) <= 1024
    assert sum(sizes) / len(sizes) / 1024 > 0.97


def test_a_row_longer_than_a_block_is_named() -> None:
    with pytest.raises(StageError, match=r"row train/part-00000.jsonl:7 has 65 tokens, a block holds 64; raise"):
        list(pack([example(65, "train/part-00000.jsonl:7")], 64))
