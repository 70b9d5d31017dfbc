"""Multi-Doc-QA shards (JSON Lines in `*.json` files) as checked samples; what is bad is named, never trained on."""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import StageError

LONGEST_LINE = 64 << 20  # bytes; a row of 100 documents has about 1 MB
_NOT_TEXT = {
    b"\x1f\x8b": "a gzip file; unpack it",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"PK": "a zip file; unpack it",
    b"<": "an HTML or XML page, not data; download the shard again, logged in",
}


@dataclass(frozen=True)
class Sample:
    """One row: a question, its answer, the document that holds it, and documents that do not."""

    question: str
    answer: str
    positive: str
    negatives: tuple[str, ...]
    hard: frozenset[str]
    """Those of `negatives` that the data marks as hard: similar to the positive document."""
    source: str
    """`shard.json:line`."""


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used, and why; line 0 is the whole file."""

    file: str
    line: int
    reason: str
    raw: str


def find_shards(folder: str) -> list[Path]:
    """The `*.json` files directly in `folder`, sorted. Raises StageError when there are none."""
    if not Path(folder).is_dir():
        raise StageError(f"--raw {folder}: there is no such folder; it must hold Multi-Doc-QA shards named *.json")
    shards = sorted(path for path in Path(folder).iterdir() if path.suffix == ".json" and path.is_file())
    if not shards:
        raise StageError(f"--raw {folder} holds no *.json file; shards are JSON Lines files whose names end in .json")
    return shards


def read_shard(path: Path) -> Iterator[Sample | BadRow]:
    """Every non-blank line of a shard, checked. Reads line by line, so memory does not depend on the file's size."""
    with path.open("rb") as file:
        start = file.read(3)
        for magic, what in _NOT_TEXT.items():
            if start.lstrip().startswith(magic):
                yield BadRow(path.name, 0, f"the file is {what}", "")
                return
        file.seek(3 if start == b"\xef\xbb\xbf" else 0)
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if line.strip():
                yield _read_line(path.name, number, line)


def _read_line(file: str, number: int, line: bytes) -> Sample | BadRow:
    try:
        return _sample(_parse(line), f"{file}:{number}")
    except _Bad as bad:
        return BadRow(file, number, str(bad), line[:200].decode("utf-8", "replace"))


class _Bad(ValueError):
    """Why a row is bad."""


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) >= LONGEST_LINE and not line.endswith(b"\n"):
        raise _Bad(f"the line is longer than {LONGEST_LINE >> 20} MiB")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Bad(f"not UTF-8: byte {line[error.start]:#04x} at position {error.start + 1}") from None
    except RecursionError:
        raise _Bad("nested too deeply") from None
    except ValueError as error:
        raise _Bad(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise _Bad(f"a JSON {type(row).__name__}, not an object")
    return row


def _sample(row: dict[str, Any], source: str) -> Sample:
    answers = _first(row, "QA")
    positive = _text(_first(row, "positive_doc"), "text", "positive_doc[0]")
    negatives, hard = _negatives(row, positive)
    return Sample(
        _text(answers, "question", "QA[0]"), _text(answers, "answer", "QA[0]"), positive, negatives, hard, source
    )


def _first(row: dict[str, Any], field: str) -> dict[str, Any]:
    items = row.get(field)
    if not isinstance(items, list) or not items:
        raise _Bad(f"{field} is not a non-empty list")
    if not isinstance(items[0], dict):
        raise _Bad(f"{field}[0] is not an object")
    return items[0]


def _text(item: dict[str, Any], field: str, where: str) -> str:
    text = item.get(field)
    if not isinstance(text, str):
        raise _Bad(f"{where}.{field} is missing or no text")
    if not text.strip():
        raise _Bad(f"{where}.{field} is empty")
    if _broken(text):
        raise _Bad(f"{where}.{field} holds half of a surrogate pair")
    return text


def _negatives(row: dict[str, Any], positive: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """The usable negatives: whole texts, each once, none equal to the positive document."""
    items = row.get("negative_doc") or []
    if not isinstance(items, list):
        raise _Bad("negative_doc is not a list")
    seen = {normal(positive)}
    texts, hard = [], set()
    for item in items:
        text = item.get("text") if isinstance(item, dict) else None
        if not isinstance(text, str) or _broken(text) or not text.strip() or normal(text) in seen:
            continue
        seen.add(normal(text))
        texts.append(text)
        if item.get("hard") is True:
            hard.add(text)
    return tuple(texts), frozenset(hard)


def normal(text: str) -> str:
    """Text as it is compared: NFKC, no white space, lower case."""
    return "".join(unicodedata.normalize("NFKC", text).split()).lower()


def _broken(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)
