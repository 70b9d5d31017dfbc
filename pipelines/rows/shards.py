"""Shards (JSON Lines files) as checked samples; what is bad is named, never trained on.

Three kinds of rows are known: Multi-Doc-QA (`QA`, `positive_doc`, `negative_doc`), the predecessor's `instruction` and
`output`, and ChatGLM3's official `conversations`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from chatglm3.chat import Message
from cluster.errors import StageError
from pipelines.rows.conversations import messages_of
from pipelines.rows.lines import RowError

_NOT_TEXT = {
    b"\x1f\x8b": "a gzip file; unpack it",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"PK": "a zip file; unpack it",
    b"<": "an HTML or XML page, not data; download the shard again, logged in",
}


@dataclass(frozen=True)
class Sample:
    """A question, its answer, the document that holds it, and documents that do not."""

    question: str
    answer: str
    positive: str
    negatives: tuple[str, ...]
    hard: frozenset[str] = frozenset()
    """Those of `negatives` that the data marks as hard: similar to the positive document."""
    unused_pairs: int = 0
    """Questions in the row after its first, which are not used."""


@dataclass(frozen=True)
class Conversation:
    """Messages to learn from as they are, with the tools that the assistant may call."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used, and why; line 0 is the whole file."""

    file: str
    line: int
    reason: str
    raw: str
    kind: str
    """The reason without what is about this row alone."""

    @property
    def place(self) -> str:
        """`file:line`, as errors name it."""
        return f"{self.file}:{self.line}" if self.line else self.file


def find_shards(folder: str, jsonl: bool = False, flag: str = "--raw") -> list[Path]:
    """The `*.json` files (and `*.jsonl`, when asked) directly in `folder`, sorted. Raises StageError without any,
    which names the folder by its `flag`.
    """
    suffixes = (".json", ".jsonl") if jsonl else (".json",)
    if not Path(folder).is_dir():
        raise StageError(f"{flag} {folder}: there is no such folder; it must hold shards named *.json")
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    if shards := [path for path in files if path.suffix in suffixes]:
        return shards
    hint = "; to read the *.jsonl files in it, add --jsonl" if any(path.suffix == ".jsonl" for path in files) else ""
    raise StageError(
        f"{flag} {folder} holds no *.json file; shards are JSON Lines files whose names end in .json{hint}"
    )


def unreadable(path: Path) -> str:
    """What a file is that holds no lines of text at all; empty for one that may."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    return next((f"the file is {what}" for magic, what in _NOT_TEXT.items() if start.startswith(magic)), "")


def parse_row(content: bytes, with_negatives: bool = True) -> Sample | Conversation:
    """One line, checked. Raises RowError that says what is wrong with it.

    Reading a hundred negatives takes longer than parsing their JSON, so who needs none may do without.
    """
    row = _object(content)
    if "conversations" in row or "instruction" in row:
        return Conversation(*messages_of(row))
    pair = _first(row, "QA")
    positive = _text(_first(row, "positive_doc"), "text", "positive_doc[0]")
    items = row.get("negative_doc") or []
    if not isinstance(items, list):
        raise RowError("negative_doc is not a list")
    negatives, hard = _negatives(items if with_negatives else [])
    question, answer = _text(pair, "question", "QA[0]"), _text(pair, "answer", "QA[0]")
    return Sample(question, answer, positive, negatives, hard, len(row["QA"]) - 1)


def _object(content: bytes) -> dict[str, Any]:
    try:
        row = orjson.loads(content)
    except ValueError:  # the slower parser takes NaN, as null, and says more of what is wrong
        row = _parse_slowly(content)
    if not isinstance(row, dict):
        raise RowError(f"a JSON {type(row).__name__}, not an object")
    return row


def _parse_slowly(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"), parse_constant=lambda name: None)
    except UnicodeDecodeError as error:
        place = f"byte {content[error.start]:#04x} at position {error.start + 1}"
        raise RowError("not UTF-8", f": {place}") from None
    except RecursionError:
        raise RowError("nested too deeply") from None
    except ValueError as error:
        raise RowError("not JSON", f": {error}") from None


def _first(row: dict[str, Any], field: str) -> dict[str, Any]:
    items = row.get(field)
    if not isinstance(items, list) or not items:
        raise RowError(f"{field} is not a non-empty list")
    if not isinstance(items[0], dict):
        raise RowError(f"{field}[0] is not an object")
    return items[0]


def _text(item: dict[str, Any], field: str, where: str) -> str:
    text = item.get(field)
    if not isinstance(text, str):
        raise RowError(f"{where}.{field} is missing or no text")
    if not text.strip():
        raise RowError(f"{where}.{field} is empty")
    if _broken(text):
        raise RowError(f"{where}.{field} holds half of a surrogate pair")
    return text


def _negatives(items: list[Any]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Those negatives that are whole texts, in order, and which of them are marked as hard."""
    texts, hard = [], []
    for item in items:
        text = item.get("text") if isinstance(item, dict) else None
        if isinstance(text, str) and text and not text.isspace() and not _broken(text):
            texts.append(text)
            if item.get("hard") is True:
                hard.append(text)
    return tuple(texts), frozenset(hard)


def _broken(text: str) -> bool:
    """Whether half of a surrogate pair is in it, which JSON's escapes can say and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
