"""Documents for a question that fit into a number of tokens: the likeliest by BM25, in the order they came."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chatglm3.bm25 import likeliest_first
from chatglm3.windows import Span, sentences, window

NUMBERING = 6  # tokens at most of `[12] ` before a document and the line end after it
SHORTEST_PART = 64  # tokens; a document of which less would be left is left out
LONGEST_PIECE = 16  # characters of a token: text farther than that from that sentence cannot fit, and is not measured


@dataclass(frozen=True)
class Part:
    """What a prompt shows of a document: characters `start` to `end` of document `index`, from 0."""

    index: int
    start: int
    end: int


def fit_documents(question: str, documents: Sequence[str], tokens: int, count: Callable[[str], int]) -> list[Part]:
    """Parts of `documents` that fill at most `tokens`, in order. `count` gives a text's tokens.

    The documents that BM25 puts first for the question come in whole. One that is too long for what is left is cut
    around its best sentence, and left out if that leaves less than SHORTEST_PART.
    """
    lengths = [count(text) + NUMBERING for text in documents]
    parts = [Part(index, 0, len(text)) for index, text in enumerate(documents)]
    if sum(lengths) <= tokens:
        return parts
    kept: list[Part] = []
    for index in likeliest_first(question, documents):
        if lengths[index] <= tokens:
            kept.append(parts[index])
            tokens -= lengths[index]
        elif tokens >= SHORTEST_PART + NUMBERING:
            start, end = _best_part(question, documents[index], tokens - NUMBERING, count)
            if start < end:
                kept.append(Part(index, start, end))
                tokens -= count(documents[index][start:end]) + NUMBERING
    return sorted(kept, key=lambda part: part.index)


def _best_part(question: str, document: str, tokens: int, count: Callable[[str], int]) -> Span:
    """At most `tokens` tokens of a document, around the sentence that BM25 puts first."""
    passages = sentences(document) or [(0, 0)]
    first, last = passages[likeliest_first(question, [document[slice(*passage)] for passage in passages])[0]]
    near = max(0, first - tokens * LONGEST_PIECE), last + tokens * LONGEST_PIECE
    start, end = window(document[slice(*near)], (first - near[0], last - near[0]), tokens, count)
    return start + near[0], end + near[0]
