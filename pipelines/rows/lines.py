"""Line files cut into byte ranges that are read alone, so that many processes can read one file of any size."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

PIECE_BYTES = 64 << 20
LONGEST_LINE = 64 << 20  # bytes; a row of 100 documents has a few hundred kB
_BOM = b"\xef\xbb\xbf"


SOURCE = np.dtype([("shard", "u4"), ("offset", "u8"), ("key", "S32"), ("group", "u8"), ("has_triple", "?")])
"""Where a sample stands: index of the shard, byte offset of its line; its key; the digest that stands for its group of
documents; whether it is to give a triple."""


class RowError(ValueError):
    """Why a line is no row that can be used: `kind` is the same for all such lines, `detail` is about this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind + detail)
        self.kind = re.sub(r"\[\d+\]", "[]", kind)


@dataclass(frozen=True)
class Piece:
    """The lines of a file that begin at byte `start` or later, but before `end`."""

    path: str
    start: int
    end: int
    name: str
    """What errors call the file."""


@dataclass(frozen=True)
class Line:
    """One line and where it stands."""

    number: int
    """1-based, counted from the start of its piece."""
    offset: int
    """Of its first byte in the file."""
    content: bytes
    is_whole: bool = True
    """False if it is longer than LONGEST_LINE: then `content` is just its beginning."""


def cut(path: Path, piece_bytes: int = PIECE_BYTES, name: str = "") -> list[Piece]:
    """Pieces that together are the whole file, which errors are to call `name`."""
    whole, size = str(path.resolve()), path.stat().st_size  # other processes may have another working directory
    starts = range(0, size, piece_bytes)
    return [Piece(whole, start, min(start + piece_bytes, size), name or path.name) for start in starts]


def read_lines(piece: Piece) -> Iterator[Line]:
    """Every line of a piece, blank ones included. Holds one line in memory at a time."""
    with open(piece.path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            _skip_line(file, piece.end)  # it began before this piece; just its line end, if one stands right before
        number = 0
        while (offset := file.tell()) < piece.end:
            number += 1
            content = file.readline(LONGEST_LINE)
            if not content:
                break  # the file became shorter while it was read
            is_whole = len(content) < LONGEST_LINE or content.endswith(b"\n")
            if not is_whole:
                content = content[:1000]
                _skip_line(file, piece.end)
            yield Line(number, offset, content.removeprefix(_BOM) if offset == 0 else content, is_whole)


def read_line(path: str, offset: int) -> bytes:
    """The line of a file that begins at byte `offset`."""
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.readline(LONGEST_LINE)
    return content.removeprefix(_BOM) if offset == 0 else content


def _skip_line(file: BinaryIO, end: int) -> None:
    """Go behind the line's end, or behind byte `end` if the line is not over there."""
    while file.tell() < end and (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass
