"""Lessons as batches of token ids, written by all cores while the model learns from the earlier ones."""

import itertools
import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chatglm3.chat import example_ids, render
from chatglm3.tiny.lessons import MOST_DOCUMENTS, Lesson, lessons
from chatglm3.tokenizer import ChatGlmTokenizer, load_tokenizer

ROW_TOKENS = 1024
"""Lessons are packed into rows of this many tokens; longer ones are left out."""
CHUNK_LESSONS = 8192
EASY_CHUNKS = 48
"""The first chunks have one or two documents a lesson: finding a word again is learned sooner on short texts."""


class Batch(NamedTuple):
    """Lessons packed side by side, each [rows, ROW_TOKENS]."""

    ids: NDArray[np.int16]
    lessons: NDArray[np.int16]
    """Number of the lesson in its row, from 1; 0 on padding."""
    positions: NDArray[np.int16]
    """Position of the token in its lesson."""
    targets: NDArray[np.bool_]
    """Whether the token belongs to an answer."""

    def part(self, start: int, stop: int) -> "Batch":
        """The rows from `start` to before `stop`."""
        return Batch(*(array[start:stop] for array in self))  # type: ignore[arg-type]


def batches(tokenizer_folder: Path, seed: int, rows: int) -> Generator[Batch]:
    """Yield batches of `rows` rows without end; the same seed always gives the same ones."""
    workers = max(1, (os.cpu_count() or 2) - 1)
    # Forking a process that has started threads (torch's, CUDA's) can hang.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for chunk in itertools.count():
                waiting.append(pool.submit(write_chunk, tokenizer_folder, f"chunk {seed} {chunk}", chunk < EASY_CHUNKS))
                if len(waiting) > 2 * workers:
                    written = waiting.popleft().result()
                    for start in range(0, len(written.ids) - rows + 1, rows):
                        yield written.part(start, start + rows)
        finally:
            pool.shutdown(cancel_futures=True)


def encode(tokenizer: ChatGlmTokenizer, lesson: Lesson) -> tuple[list[int], list[bool]]:
    """Token ids of a whole lesson, and which of them the model is to write."""
    if not lesson.bare:
        return render(tokenizer, lesson.messages)
    question, answer = (message["content"] for message in lesson.messages)
    ids, labels = example_ids(tokenizer, question, answer, ROW_TOKENS, ROW_TOKENS)
    return ids, [label >= 0 for label in labels]


def write_chunk(tokenizer_folder: Path, seed: str, easy: bool, count: int = CHUNK_LESSONS) -> Batch:
    """The first lessons of a seed, packed in the order they come."""
    tokenizer = load_tokenizer(tokenizer_folder)
    rows: list[list[tuple[list[int], list[bool]]]] = [[]]
    filled = 0
    for lesson in itertools.islice(lessons(seed, most_documents=2 if easy else MOST_DOCUMENTS), count):
        example = encode(tokenizer, lesson)
        length = len(example[0])
        if length > ROW_TOKENS:
            continue
        if filled + length > ROW_TOKENS:
            rows.append([])
            filled = 0
        rows[-1].append(example)
        filled += length
    return _pack(rows)


def _pack(rows: list[list[tuple[list[int], list[bool]]]]) -> Batch:
    shape = (len(rows), ROW_TOKENS)
    ids, numbers, positions = (np.zeros(shape, np.int16) for _ in range(3))
    batch = Batch(ids, numbers, positions, np.zeros(shape, np.bool_))
    for row, examples in enumerate(rows):
        start = 0
        for number, (tokens, is_target) in enumerate(examples, 1):
            place = slice(start, start := start + len(tokens))
            batch.ids[row, place] = tokens
            batch.lessons[row, place] = number
            batch.positions[row, place] = range(len(tokens))
            batch.targets[row, place] = is_target
    return batch
