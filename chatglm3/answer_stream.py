"""A cited answer that is still being written: its quote and its text, as early as they are certain."""

import re
from dataclasses import dataclass
from typing import Literal

from chatglm3.documents import DocumentAnswer, parse_answer

_HEAD = re.compile(r"\s*原文(?:\[\d+\])+：")
_MAYBE_HEAD = re.compile(r"\s*(?:原?|原文(?:\[\d+\])*(?:\[\d*)?)")
_MAYBE_TAIL = re.compile(r"(?:\[\d+\])*(?:\[\d*)?$")
_LONGEST_TAIL = 400
_ANSWER = "\n答："


@dataclass(frozen=True)
class Piece:
    """A piece of the quote that an answer rests on, or of the answer itself."""

    kind: Literal["quote", "answer"]
    text: str


class AnswerStream:
    """A reply in, piece by piece; its quote and its answer out, without the signs around them.

    Together the pieces are the quote and the text of `parse_answer`, unless the reply begins with a quote and breaks
    off before its answer; `whole` is what counts then.
    """

    def __init__(self) -> None:
        self._reply = ""
        self._sent = {"quote": "", "answer": ""}

    @property
    def whole(self) -> DocumentAnswer:
        """The reply so far, taken apart."""
        return parse_answer(self._reply)

    def push(self, text: str) -> list[Piece]:
        """What became certain."""
        self._reply += text
        if not (head := _HEAD.match(self._reply)):
            return [] if _MAYBE_HEAD.fullmatch(self._reply) else self._new("answer", _settled(self._reply.lstrip()))
        quote, end, answer = self._reply[head.end() :].partition(_ANSWER)
        # Until the mark is there, a line end may be its beginning.
        pieces = self._new("quote", quote if end else quote.partition("\n")[0])
        return pieces + (self._new("answer", _settled(answer.lstrip())) if end else [])

    def finish(self) -> list[Piece]:
        """The rest: call it once, when the reply is complete."""
        return self._new("answer", self.whole.text)

    def _new(self, kind: Literal["quote", "answer"], text: str) -> list[Piece]:
        """What `text` has more than was sent of it."""
        sent = self._sent[kind]
        if len(text) <= len(sent) or not text.startswith(sent):
            return []
        self._sent[kind] = text
        return [Piece(kind, text[len(sent) :])]


def _settled(answer: str) -> str:
    """The answer without what may be its citations, or white space at its end."""
    answer = answer.rstrip()
    # At its very end alone: the search takes the square of what looks like citations, and comes with every token.
    bracketed = len(answer.rstrip("[]0123456789"))
    tail = _MAYBE_TAIL.search(answer, max(bracketed, len(answer) - _LONGEST_TAIL))
    return answer[: tail.start()].rstrip() if tail else answer
