"""Packed blocks as tensors on a device: padded to one size, and on their way before they are needed."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pipelines.compute.blocks import Block


@dataclass(frozen=True)
class PackedBatch:
    """One block on a device: input_ids and position_ids [1, tokens], boundaries [examples + 1], answer places."""

    input_ids: Tensor
    position_ids: Tensor
    boundaries: Tensor
    longest: int
    predictors: Tensor
    """Indices of the tokens that predict a target, [targets]."""
    targets: Tensor
    """The ids they are to predict, [targets]."""
    rows: list[str]
    """The names of the examples."""


class Padding:
    """Sizes that blocks are padded to. Compiled code is for one set of sizes, so they seldom change.

    A block that is larger in some way makes that size grow to the next power of two, and the code is compiled again:
    a handful of times in any run.
    """

    def __init__(self, tokens: int, longest: int = 2048, examples: int = 64) -> None:
        self.tokens, self.longest, self.examples = tokens, min(longest, tokens), examples

    def lengths(self, lengths: list[int]) -> list[int]:
        """Example lengths with those of padding behind them, which nothing is learned from."""
        self.tokens = _grown(self.tokens, sum(lengths))
        self.longest = _grown(self.longest, max(lengths))
        # Padding is cut into examples too: the attention kernel leaves garbage where no example is.
        pieces, rest = divmod(self.tokens - sum(lengths), self.longest)
        padded = [*lengths, *[self.longest] * pieces, rest]
        self.examples = _grown(self.examples, len(padded))
        return padded + [0] * (self.examples - len(padded))


def _grown(size: int, needed: int) -> int:
    return size if needed <= size else 1 << (needed - 1).bit_length()


def to_batch(block: Block, device: torch.device, padding: Padding | None = None) -> PackedBatch:
    """A block as tensors on `device`; to a GPU it is copied without waiting."""
    lengths = torch.tensor(padding.lengths(block.lengths) if padding else block.lengths)
    ends = lengths.cumsum(0)
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    ids = torch.zeros(int(ends[-1]), dtype=torch.int64)
    ids[: len(block.input_ids)] = torch.from_numpy(block.input_ids.astype("int64"))
    # A target is predicted by the token before it; an example's first token is never a target.
    targets = torch.from_numpy(block.is_target.copy()).nonzero().flatten()
    batch = PackedBatch(
        input_ids=ids[None],
        position_ids=(torch.arange(len(ids)) - boundaries[:-1].repeat_interleave(lengths))[None],
        boundaries=boundaries.to(torch.int32),
        longest=padding.longest if padding else max(block.lengths),
        predictors=targets - 1,
        targets=ids[targets],
        rows=block.rows,
    )
    return batch if device.type == "cpu" else _sent(batch, device)


def _sent(batch: PackedBatch, device: torch.device) -> PackedBatch:
    # Only from pinned memory does a copy run beside what the GPU is doing.
    sent: dict[str, Any] = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in _tensors(batch)}
    return replace(batch, **sent)


def _tensors(batch: PackedBatch) -> Iterator[tuple[str, Tensor]]:
    for field in fields(batch):
        if isinstance(value := getattr(batch, field.name), Tensor):
            yield field.name, value


def batches_ahead(
    blocks: Iterable[Block], device: torch.device, padding: Padding | None = None
) -> Iterator[PackedBatch]:
    """Blocks as batches on `device`, each on its way there while the one before it is computed."""
    if device.type == "cpu":
        yield from (to_batch(block, device) for block in blocks)
        return
    copies = torch.cuda.Stream(device)
    waiting: tuple[PackedBatch, torch.cuda.Event] | None = None
    for block in blocks:
        with torch.cuda.stream(copies):
            batch, copied = to_batch(block, device, padding), copies.record_event()
        if waiting:
            yield _arrived(*waiting)
        waiting = batch, copied
    if waiting:
        yield _arrived(*waiting)


class Timed:
    """Batches, and the seconds that were spent on getting them. A GPU waits for less: it has work queued meanwhile."""

    def __init__(self, batches: Iterable[PackedBatch]) -> None:
        self.seconds = 0.0
        self._batches = iter(batches)

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            started = time.monotonic()
            batch = next(self._batches, None)
            self.seconds += time.monotonic() - started
            if batch is None:
                return
            yield batch


def _arrived(batch: PackedBatch, copied: torch.cuda.Event) -> PackedBatch:
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for _, tensor in _tensors(batch):
        tensor.record_stream(stream)  # its memory is not given to the next copy while it is being read
    return batch
