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
        self._stop = StopTexts(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.found

    def push(self, ids: Iterable[int]) -> str:
        """Text that these ids make final. Empty after a stop string."""
        return "" if self.stopped else self._stop.push(self._decoder.push(ids))

    def push_until_stopped(self, ids: Sequence[int]) -> tuple[str, int]:
        """As `push`, and how many of the ids came before a stop string was complete, the last of its own included."""
        if not self._stop.texts:
            return self.push(ids), len(ids)
        pieces: list[str] = []
        for token_id in ids:
            pieces.append(self.push([token_id]))
            if self.stopped:
                break
        return "".join(pieces), len(pieces)

    def finish(self) -> str:
        """The rest of the text: call it once, when no more ids will come."""
        return "" if self.stopped else self._stop.push(self._decoder.finish(), is_last=True)


class StopTexts:
    """Cuts a growing text before the first of some texts."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.texts = tuple(stop)
        """What is looked for."""
        self._held = ""
        self.found = False
        """Whether one of them has come."""

    def push(self, text: str, is_last: bool = False) -> str:
        """What of the text so far is certain and new."""
        if not self.texts:
            return text
        text = self._held + text
        starts = [(start + len(mark), start) for mark in self.texts if (start := text.find(mark)) >= 0]
        self.found = bool(starts)
        end = min(starts)[1] if starts else len(text) - (0 if is_last else held_back(text, self.texts))
        self._held = text[end:]
        return text[:end]


def held_back(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    # A mark may be long, what can be the beginning of it is not.
    return max(
        (size for mark in marks for size in range(1, min(len(mark), len(text) + 1)) if text.endswith(mark[:size])),
        default=0,
    )
