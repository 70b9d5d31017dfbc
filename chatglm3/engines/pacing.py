"""How often the pieces of many streams are passed on, so that one process can write them all."""

import asyncio
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# An event costs a process about 0.15 ms, however many tokens it holds, and it has one core: 256 streams get at most
# ten events a second each, one stream as many as there are tokens.
PAUSE_PER_STREAM_S = 0.0004


@dataclass
class _Stream:
    pausing: asyncio.Future[None] | None = None
    ended: bool = False


class Pacing:
    """Counts the streams that one process writes; each pauses after a piece the longer, the more they are."""

    def __init__(self) -> None:
        self._streams: dict[Hashable, _Stream] = {}

    @property
    def streams(self) -> int:
        """How many are written now."""
        return len(self._streams)

    @contextmanager
    def stream(self, key: Hashable) -> Iterator[None]:
        """For as long as a stream is written."""
        self._streams[key] = _Stream()
        try:
            yield
        finally:
            del self._streams[key]

    async def pause(self, key: Hashable) -> None:
        """Wait before the stream's next piece, unless it is the last; what comes meanwhile is to be joined to it."""
        stream = self._streams[key]
        if stream.ended:
            return
        loop = asyncio.get_running_loop()
        stream.pausing = loop.create_future()
        timer = loop.call_later(PAUSE_PER_STREAM_S * self.streams, _go_on, stream.pausing)
        try:
            await stream.pausing
        finally:
            timer.cancel()

    def end(self, key: Hashable) -> None:
        """The stream's last piece has come, which is not to wait."""
        if stream := self._streams.get(key):
            stream.ended = True
            if stream.pausing:
                _go_on(stream.pausing)


def _go_on(pausing: asyncio.Future[None]) -> None:
    if not pausing.done():
        pausing.set_result(None)
