"""Examples that fit: documents are cut to a budget of tokens, the question and the answer never."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from chatglm3 import load_tokenizer
from chatglm3.chat import render
from chatglm3.fitting import NUMBERING
from chatglm3.tokenizer import ChatGlmTokenizer
from chatglm3.windows import window

SHORTEST_DOCUMENT = 32  # tokens; a document that would be cut below this is left out instead


@dataclass
class Document:
    """A document in a prompt, and the characters of it that must stay when it is cut."""

    text: str
    evidence: tuple[int, int] | None = None
    """Start and end of what the answer rests on; None for a distractor."""


class Ruler:
    """Lengths in tokens of a question and its answer, as training will see them in the chat format."""

    def __init__(self, tokenizer: ChatGlmTokenizer) -> None:
        self.tokenizer = tokenizer
        empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        self.overhead = len(render(tokenizer, empty)[0])

    def tokens(self, text: str) -> int:
        """Of a text alone."""
        return len(self.tokenizer.encode(text))

    def example(self, prompt: str, answer: str) -> int:
        """Of a whole example."""
        return self.overhead + self.tokens(prompt) + self.tokens(answer)


@lru_cache(maxsize=1)
def ruler_of(model: str) -> Ruler:
    """The ruler of a model folder's tokenizer, kept for the next call."""
    return Ruler(load_tokenizer(model))


def fit(documents: list[Document], budget: int, ruler: Ruler, counts: Counter[str]) -> list[Document]:
    """Documents of at most `budget` tokens together, in the same order; what was cut or left out is counted.

    The longest distractor is cut first, down to the length of the next one, and left out where that would be less than
    SHORTEST_DOCUMENT; the document with the evidence comes last, and is cut around it.
    """
    lengths = [ruler.tokens(document.text) + NUMBERING for document in documents]
    targets = _shorten(lengths, [document.evidence is not None for document in documents], budget)
    kept = []
    for document, length, target in zip(documents, lengths, targets, strict=True):
        if target == length:
            kept.append(document)
        elif target == 0:
            counts["documents left out to fit"] += 1
        else:
            counts["golden documents cut" if document.evidence else "distractors cut"] += 1
            kept.append(_cut(document, target - NUMBERING, ruler))
    return [document for document in kept if document.text]


def _shorten(lengths: list[int], golden: list[bool], budget: int) -> list[int]:
    """What each document may keep of its length: distractors up to a common level, so that the longest give most."""
    targets = [length if is_golden else 0 for length, is_golden in zip(lengths, golden, strict=True)]
    room = budget - sum(targets)
    kept = sorted((index for index, is_golden in enumerate(golden) if not is_golden), key=lambda i: (lengths[i], i))
    while kept:
        level = _level([lengths[index] for index in kept], room)
        if level >= min(SHORTEST_DOCUMENT, lengths[kept[-1]]):
            for index in kept:
                targets[index] = min(lengths[index], level)
            return targets
        kept.pop()  # the longest
    return [min(target, max(SHORTEST_DOCUMENT, budget)) for target in targets]


def _level(lengths: list[int], room: int) -> int:
    """The largest level, up to the longest length, at which all lengths cut down to it fill at most `room`."""
    low, high = 0, max(lengths)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(length, middle) for length in lengths) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _cut(document: Document, tokens: int, ruler: Ruler) -> Document:
    """At most `tokens` tokens of the document: its start, or as much before the evidence as after it."""
    first, last = document.evidence or (0, 0)
    start, end = window(document.text, (first, last), tokens, ruler.tokens)
    evidence = (max(first - start, 0), min(last - start, end - start)) if document.evidence else None
    return Document(document.text[start:end], evidence)
