"""The words of a document that an answer rests on, found by comparing characters."""

import re

from pipelines.cleaning import text_pairs

LONGEST_QUOTE = 160  # characters; longer evidence teaches copying rather than finding
_SENTENCE = re.compile(r"[^。！？!?；;\n]+[。！？!?；;]*[”’」』）)]*")


def find_quote(answer: str, document: str, least_recall: float) -> str:
    """One to three sentences in a row of `document` that hold the answer, or else most of it; empty if none does.

    Recall is the share of the answer's pairs of characters that the quote has; below `least_recall` it is no evidence.
    """
    spans = [match.span() for match in _SENTENCE.finditer(document) if match.group().strip()]
    start = document.find(answer)
    if start >= 0:
        touched = [span for span in spans if span[0] < start + len(answer) and span[1] > start]
        return _quote(document, touched) if touched else ""
    wanted = text_pairs(answer)
    windows = [spans[i : i + size] for size in (1, 2, 3) for i in range(len(spans) - size + 1)]
    quotes = [quote for window in windows if (quote := _quote(document, window))]
    best = max(quotes, key=lambda quote: (_recall(wanted, quote), -len(quote)), default="")
    return best if best and _recall(wanted, best) >= least_recall else ""


def _quote(document: str, spans: list[tuple[int, int]]) -> str:
    text = document[spans[0][0] : spans[-1][1]].strip()
    return text if len(text) <= LONGEST_QUOTE and "\n" not in text else ""


def _recall(wanted: frozenset[str], quote: str) -> float:
    return len(wanted & text_pairs(quote)) / max(len(wanted), 1)
