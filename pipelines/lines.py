"""Line files cut into byte ranges that are read alone, so that many processes can read one file of any size."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

PIECE_BYTES = 64 << 20
LONGEST_LINE = 64 << 20  # bytes; a row of 100 documents has a few hundred kB
_BOM = b"\xef\xbb\xbf"


SOURCE = np.dtype([("shard", "u4"), ("offset", "u8"), ("key", "S32"), ("has_triple", "?")])
"""Where a sample stands: index of the shard, byte offset of its line; its key; whether it is to give a triple."""


class RowError(ValueError):
    """Why a line is no row that can be used."""


@dataclass(frozen=True)
class Piece:
    """The lines of a file that begin at byte `start` or later, but before `end`."""

    path: str
    start: int
    end: int


@dataclass(frozen=True)
class Line:
    """One line and where it stands; `content` is None if it is longer than LONGEST_LINE, and was not kept."""

    number: int
    """1-based, counted from the start of its piece."""
    offset: int
    """Of its first byte in the file."""
    content: bytes | None


def cut(path: Path, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Pieces that together are the whole file."""
    size = path.stat().st_size
    starts = range(0, size, piece_bytes)
    return [Piece(str(path), start, min(start + piece_bytes, size)) for start in starts]


def read_lines(piece: Piece) -> Iterator[Line]:
    """Every line of a piece, blank ones included. Holds one line in memory at a time."""
    with open(piece.path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            _skip_line(file)  # it began before this piece; just its line end, if one stands right before
        number = 0
        while (offset := file.tell()) < piece.end:
            number += 1
            content = file.readline(LONGEST_LINE)
            if len(content) == LONGEST_LINE and not content.endswith(b"\n"):
                del content
                _skip_line(file)
                yield Line(number, offset, None)
            else:
                yield Line(number, offset, content.removeprefix(_BOM) if offset == 0 else content)


def read_line(path: str, offset: int) -> bytes:
    """The line of a file that begins at byte `offset`."""
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.readline(LONGEST_LINE)
    return content.removeprefix(_BOM) if offset == 0 else content


def _skip_line(file: BinaryIO) -> None:
    while (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass
