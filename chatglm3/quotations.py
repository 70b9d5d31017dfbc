"""Where a quote or an answer stands in a document, even where the model did not copy it to the letter."""

import unicodedata
from dataclasses import dataclass

import numpy as np

from chatglm3.bm25 import likeliest_first
from chatglm3.windows import Span, sentences

MOST_ERRORS = 0.2
"""Share of a quote's characters that may be wrong, missing or added where it is taken for a passage."""
LONGEST_QUOTE = 1000
"""Characters that are compared: a longer quote is copied text that lost its end, and its beginning tells the place."""


@dataclass(frozen=True)
class Quotation:
    """A passage of a document. `exact`: it is the quote but for white space, letter case and Unicode's NFC."""

    start: int
    end: int
    exact: bool


def find_quotation(quote: str, document: str) -> Quotation | None:
    """The passage of `document` that `quote` is: the first equal one, or else the one with the fewest differences.

    None where more than MOST_ERRORS of the quote's characters differ.
    """
    if quote and (start := document.find(quote)) >= 0:
        return Quotation(start, start + len(quote), exact=True)
    wanted, _ = _compared(quote[:LONGEST_QUOTE])
    text, places = _compared(document)
    if not wanted or not text:
        return None
    if (first := text.find(wanted)) >= 0:
        return Quotation(places[first][0], places[first + len(wanted) - 1][1], exact=True)
    first, last, errors = _closest(wanted, text)
    if errors > MOST_ERRORS * len(wanted) or first == last:
        return None
    return Quotation(places[first][0], places[last - 1][1], exact=False)


def find_answer(question: str, answer: str, document: str) -> Span | None:
    """The sentence of `document` that holds the answer's own words, of several the one that BM25 puts first for the
    question; None where none does."""
    found = [span for span in sentences(document) if answer and answer in document[slice(*span)]]
    return found[likeliest_first(question, [document[slice(*span)] for span in found])[0]] if found else None


def _compared(text: str) -> tuple[str, list[Span]]:
    """The text in NFC and lower case, without white space, and where each of its characters stood."""
    characters, places = "", []
    start = 0
    while start < len(text):
        end = start + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        if not text[start].isspace():
            composed = unicodedata.normalize("NFC", text[start:end]).lower()
            characters += composed
            places += [(start, end)] * len(composed)
        start = end
    return characters, places


def _closest(wanted: str, text: str) -> tuple[int, int, int]:
    """Start and end of the part of `text` with the smallest edit distance to `wanted`, and that distance."""
    errors = _distances(wanted, text, np.zeros(len(text) + 1, np.int32))
    end = int(errors.argmin())
    # Its start is found backwards: now the other side is fixed, so skipping characters of the text costs.
    back = _distances(wanted[::-1], text[:end][::-1], np.arange(end + 1, dtype=np.int32))
    longest = int(np.flatnonzero(back == back.min())[-1])  # of parts that are equally near
    return end - longest, end, int(errors[end])


def _distances(wanted: str, text: str, row: np.ndarray) -> np.ndarray:
    """The last row of Sellers' matrix (1980): at each place of `text`, the least edits that make `wanted` end there.

    `row` is the first one: zeros let it begin anywhere.
    """
    codes = np.array([ord(character) for character in text], np.int32)
    steps = np.arange(len(text) + 1, dtype=np.int32)
    for number, character in enumerate(wanted, 1):
        best = np.empty_like(row)
        best[0] = number
        best[1:] = np.minimum(row[:-1] + (codes != ord(character)), row[1:] + 1)
        # A gap of any length in one go: min over j <= i of best[j] + (i - j).
        row = np.minimum.accumulate(best - steps) + steps
    return row
