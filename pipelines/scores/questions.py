"""Questions that have one right answer, what a model answered to them, and what an answer is worth."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.scores import metrics

LONGEST_ANSWER = 256
"""Tokens of an answer, unless told otherwise, wherever answers are scored: one that quotes first says it last."""
Row = dict[str, Any]
"""A row that prepare wrote."""


@dataclass(frozen=True)
class Answer:
    """A model's reply to one question, citations included. Empty, of no tokens, if the question did not fit."""

    text: str
    tokens: int
    seconds: float
    """From handing the prompt to the engine, which answers others at the same time, to the last token."""
    engine: str = ""
    """Name of the engine: seconds of different ones do not compare models."""


def read_questions(split: Path, most: int = 0) -> list[Row]:
    """The split's rows with a question, in file order; or `most` of them, drawn at random, always the same."""
    if not most:
        return list(_questions(split))
    count = sum(1 for _ in _questions(split))  # read twice: a few rows are wanted, of a split of any size
    drawn = set(random.Random(0).sample(range(count), min(most, count)))
    return [row for index, row in enumerate(_questions(split)) if index in drawn]


def _questions(split: Path) -> Iterator[Row]:
    for path in sorted(split.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            # A conversation has no one question with a right answer; its loss is measured in training.
            yield from (row for row in map(json.loads, file) if "instruction" in row)


def gold_answer(row: Row) -> str:
    """The row's right answer, without citation."""
    gold: str = row["answer"] if "answer" in row else row["output"]
    return gold


def is_answerable(row: Row) -> bool:
    """Whether a document holds the answer: not in a row of the multidoc preset without a golden document."""
    return row.get("golden", 0) is not None  # other presets' rows have no such field


def groups_of(rows: Sequence[Row]) -> list[str]:
    """The document group of each row, as prepare wrote it; a row of a former version is a group of its own."""
    return [str(row.get("group", f"row {index}")) for index, row in enumerate(rows)]


def score_answer(row: Row, reply: str) -> metrics.Points:
    """What a reply to the row's question is worth."""
    return metrics.score(reply, gold_answer(row), row.get("golden"), answerable=is_answerable(row))


def digest(rows: Sequence[Row]) -> str:
    """sha256 over the rows' questions and right answers, in order."""
    lines = (json.dumps([row["instruction"], gold_answer(row), row.get("golden")]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
