"""Instruction rows to packed blocks: tokenized, by Ray Data if they are many; several examples share a block."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from chatglm3 import load_tokenizer
from chatglm3.chat import PromptFormat
from chatglm3.errors import ModelError
from cluster import storage
from cluster.config import Config
from cluster.errors import StageError, last_line
from cluster.progress import track
from pipelines.compute.block_files import write_blocks
from pipelines.compute.blocks import Block
from pipelines.compute.examples import encode

WINDOW = 1024  # examples packed together; larger fills blocks better and keeps neighbours further apart


class PackingConfig(Config):
    """All that decides what the blocks of a data set are, besides the data itself."""

    tokenizer: str
    prompt_format: PromptFormat
    block_tokens: int
    max_input_length: int
    max_output_length: int


@dataclass(frozen=True)
class Example:
    """One row as ids; `is_target` marks those whose prediction is learned."""

    input_ids: np.ndarray
    is_target: np.ndarray
    row: str
    """`part-00000.jsonl:line`, to name it in an error."""


def pack_split(data: storage.Folder, split: str, config: PackingConfig, cache: Path) -> Path:
    """Write the blocks of `data`'s train or dev rows as Parquet and return the file; done once for the same input.

    Raises StageError for a row that is no instruction row or longer than a block.
    """
    files = sorted((data.path / split).glob("*.jsonl"))
    fingerprint = load_tokenizer(config.tokenizer).fingerprint
    parts = [data.receipt.facts.get("dataset"), split, fingerprint, config.model_dump(exclude={"tokenizer"})]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    folder = cache / f"{split}-{digest[:16]}"
    if storage.read_receipt(folder) is None:
        receipt = storage.receipt_of("pack", config, inputs={str(data.path): data.digest})
        with storage.publish(folder, receipt) as packed:
            examples = _encode_all(files, config, int(data.receipt.counts[split])) if files else ()
            receipt.counts.update(
                write_blocks(map(_merge, pack(examples, config.block_tokens)), packed / "blocks.parquet")
            )
    return folder / "blocks.parquet"


def pack(examples: Iterable[Example], block_tokens: int) -> Iterator[list[Example]]:
    """Group examples into blocks of at most `block_tokens` tokens: first fit, longest first, window by window.

    The result depends on the examples' order alone, not on how many workers there are.
    """
    window: list[Example] = []
    for example in examples:
        window.append(example)
        if len(window) == WINDOW:
            yield from _first_fit(window, block_tokens)
            window = []
    yield from _first_fit(window, block_tokens)


def _first_fit(window: list[Example], block_tokens: int) -> list[list[Example]]:
    blocks: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(window, key=lambda example: -len(example.input_ids)):
        size = len(example.input_ids)
        if size > block_tokens:
            raise StageError(
                f"row {example.row} has {size} tokens, a block holds {block_tokens}; "
                f"raise --block_tokens, or prepare again with --max_tokens {block_tokens}"
            )
        fitting = next((i for i, free in enumerate(room) if free >= size), None)
        if fitting is None:
            blocks.append([example])
            room.append(block_tokens - size)
        else:
            blocks[fitting].append(example)
            room[fitting] -= size
    return blocks


def _encode_all(files: list[Path], config: PackingConfig, total: int) -> Iterator[Example]:
    encoded = _encode_on_cluster if total > WINDOW else _encode_here
    path, number = "", 0
    for row in track(encoded(files, config), "tokenize", total):
        number = number + 1 if row["path"] == path else 1
        path = row["path"]
        name = f"{Path(path).parent.name}/{Path(path).name}:{number}"
        if row["error"]:
            raise StageError(f"row {name}: {row['error']}; run prepare again")
        yield Example(row["input_ids"], row["is_target"], name)


def _encode_here(files: list[Path], config: PackingConfig) -> Iterator[dict[str, Any]]:
    """What would be one task: the processes that Ray Data starts for it take longer than the rows."""
    for file in files:
        for line in filter(str.strip, file.read_text(encoding="utf-8").splitlines()):
            ids, targets, error = encode_row(line, config)
            yield {"path": str(file), "input_ids": ids, "is_target": targets, "error": error}


def _encode_on_cluster(files: list[Path], config: PackingConfig) -> Iterator[dict[str, Any]]:
    # Order decides which examples share a block, and so the loss curve: it must not depend on which task ends first.
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    lines = ray.data.read_text([str(file.resolve()) for file in files], include_paths=True)
    encoded = lines.repartition(target_num_rows_per_block=WINDOW).map_batches(
        partial(_encode_batch, config=config), batch_format="numpy"
    )
    try:
        yield from encoded.iter_rows()
    except RayError as error:
        raise StageError(f"tokenizing failed: {last_line(error)}") from error


def _encode_batch(batch: dict[str, np.ndarray], config: PackingConfig) -> dict[str, Any]:
    columns: dict[str, Any] = {"path": batch["path"], "input_ids": [], "is_target": [], "error": []}
    for line in batch["text"]:
        ids, targets, error = encode_row(str(line), config)
        columns["input_ids"].append(ids)
        columns["is_target"].append(targets)
        columns["error"].append(error)
    return columns


def encode_row(line: str, config: PackingConfig) -> tuple[np.ndarray, np.ndarray, str]:
    """One JSON line as (ids, is_target, what is wrong with it)."""
    ids, targets, wrong = list[int](), list[bool](), ""
    try:
        limits = config.max_input_length, config.max_output_length
        ids, targets = encode(json.loads(line), _tokenizer(config.tokenizer), config.prompt_format, *limits)
    except (ValueError, TypeError, KeyError, AttributeError, ModelError) as error:
        wrong = f"no training row ({error!r})"
    return np.asarray(ids, np.int32), np.asarray(targets, bool), wrong


_tokenizer = lru_cache(maxsize=1)(load_tokenizer)


def _merge(examples: list[Example]) -> Block:
    is_target = np.concatenate([example.is_target for example in examples])
    return Block(
        np.concatenate([example.input_ids for example in examples]),
        is_target,
        [len(example.input_ids) for example in examples],
        [example.row for example in examples],
        int(is_target.sum()),
    )
