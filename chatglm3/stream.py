"""A growing answer as text that is final: no half characters, nothing of a stop string."""

from collections.abc import Iterable, Sequence

from chatglm3.tokenizer import ChatGlmTokenizer, TextDecoder


class TextStream:
    """Ids of an answer in, its text out up to the first stop string, a few operations a token.

    What `push` and `finish` return is, together, `tokenizer.decode` of all ids, cut before the stop string that is
    complete first (of two that end at the same place, the longer one).
    """

    def __init__(self, tokenizer: ChatGlmTokenizer, stop: Sequence[str] = ()) -> None:
        assert all(stop), "an empty stop string would end every answer before its start"
        self._decoder = TextDecoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string has come."""

    def push(self, ids: Iterable[int]) -> str:
        """Text that these ids make final. Empty after a stop string."""
        return "" if self.stopped else self._release(self._decoder.push(ids))

    def finish(self) -> str:
        """The rest of the text: call it once, when no more ids will come."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.finish())
        return text if self.stopped else text + self._held

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [(start + len(mark), start) for mark in self._stop if (start := text.find(mark)) >= 0]
        self.stopped = bool(found)
        end = min(found)[1] if found else len(text) - held_back(text, self._stop)
        self._held = text[end:]
        return text[:end]


def held_back(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    return max((size for mark in marks for size in range(1, len(mark)) if text.endswith(mark[:size])), default=0)
