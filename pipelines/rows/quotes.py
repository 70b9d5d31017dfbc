"""The words of a document that an answer rests on, found by comparing characters."""

import re
from itertools import islice

from pipelines.rows.cleaning import text_pairs

LONGEST_QUOTE = 160  # characters; longer evidence teaches copying rather than finding
MOST_PLACES = 100
"""How many of an answer's places are compared: a book has a short one everywhere."""
_SENTENCE = re.compile(r"[^。！？!?；;\n]+[。！？!?；;]*[”’」』）)]*")

Span = tuple[int, int]
"""Start and end in a document."""


def find_answer(question: str, answer: str, document: str) -> Span | None:
    """Where the answer stands; where it stands several times, in the sentence most like the question."""
    found = re.finditer(re.escape(answer), document) if answer else iter(())
    places = [match.start() for match in islice(found, MOST_PLACES)]
    if len(places) < 2:
        return (places[0], places[0] + len(answer)) if places else None
    asked, spans = text_pairs(question), _sentences(document)
    start = max(places, key=lambda place: (_recall(asked, _text(document, _touched(spans, place, answer))), -place))
    return start, start + len(answer)


def find_quote(question: str, answer: str, document: str, least_recall: float) -> Span | None:
    """One to three sentences in a row of `document` that hold the answer, or else most of it.

    Recall is the share of the answer's pairs of characters that the quote has; below `least_recall` it is no evidence.
    """
    spans = _sentences(document)
    if place := find_answer(question, answer, document):
        return _quote(document, _touched(spans, place[0], answer))
    wanted, asked = text_pairs(answer), text_pairs(question)
    windows = [spans[i : i + size] for size in (1, 2, 3) for i in range(len(spans) - size + 1)]
    quotes = [quote for window in windows if (quote := _quote(document, window))]

    def fitness(quote: Span) -> tuple[float, float, int]:
        text = document[slice(*quote)]
        return _recall(wanted, text), _recall(asked, text), -len(text)

    best = max(quotes, key=fitness, default=None)
    return best if best and fitness(best)[0] >= least_recall else None


def _sentences(document: str) -> list[Span]:
    return [match.span() for match in _SENTENCE.finditer(document) if match.group().strip()]


def _touched(spans: list[Span], start: int, answer: str) -> list[Span]:
    """Those sentences that the answer at `start` is part of."""
    return [span for span in spans if span[0] < start + len(answer) and span[1] > start]


def _quote(document: str, spans: list[Span]) -> Span | None:
    """The sentences from the first to the last, without white space around them; None if they make no quote."""
    text = _text(document, spans)
    start = (spans[0][0] if spans else 0) + len(text) - len(text.lstrip())
    text = text.strip()
    return (start, start + len(text)) if text and len(text) <= LONGEST_QUOTE and "\n" not in text else None


def _text(document: str, spans: list[Span]) -> str:
    return document[spans[0][0] : spans[-1][1]] if spans else ""


def _recall(wanted: frozenset[str], text: str) -> float:
    return len(wanted & text_pairs(text)) / max(len(wanted), 1)
