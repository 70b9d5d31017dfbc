"""How often the pieces of many streams are passed on, so that one process can write them all."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

# An event costs a process about 0.15 ms, however many tokens it holds, and it has one core: 256 streams get at most
# ten events a second each, one stream as many as there are tokens.
PAUSE_PER_STREAM_S = 0.0004


class Pacing:
    """Counts the streams that one process writes; each pauses after a piece the longer, the more they are."""

    def __init__(self) -> None:
        self.streams = 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        """For as long as a stream is written."""
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    async def pause(self) -> None:
        """Wait before the next piece; what comes meanwhile is to be joined to it."""
        await asyncio.sleep(PAUSE_PER_STREAM_S * self.streams)
