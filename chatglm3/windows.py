"""Parts of a text: its sentences, and what fits into a number of tokens around what must stay."""

import re
from collections.abc import Callable

Span = tuple[int, int]
"""Start and end in a text."""
_SENTENCE = re.compile(r"(?:[^。！？!?；;.\n]|\.(?=\S))+[。！？!?；;.]*[”’」』）)]*")


def window(text: str, needed: Span, tokens: int, count: Callable[[str], int]) -> Span:
    """As much of `text` as fits into `tokens`, with as much of it before `needed` as behind, without blank ends.

    `count` gives a text's tokens. What does not fit of `needed` is cut at its end.
    """
    first, last = needed
    low, high = 0, len(text)
    while low < high:  # how many characters fit, by bisection: tokens do not end at characters
        middle = (low + high + 1) // 2
        start = _start(first, last, middle, len(text))
        if count(text[start : start + middle]) <= tokens:
            low = middle
        else:
            high = middle - 1
    start = _start(first, last, low, len(text))
    kept = text[start : start + low]
    start += len(kept) - len(kept.lstrip())
    return start, start + len(kept.strip())


def sentences(text: str) -> list[Span]:
    """Its sentences, without blank ends; a line end always ends one."""
    found = []
    for match in _SENTENCE.finditer(text):
        start = match.start() + len(match.group()) - len(match.group().lstrip())
        if start < match.end():
            found.append((start, start + len(match.group().strip())))
    return found


def _start(first: int, last: int, size: int, length: int) -> int:
    """Where a window of `size` characters begins that has the span in its middle; its start, if it is too long."""
    start = first if last - first >= size else (first + last - size) // 2
    return max(0, min(start, length - size))
