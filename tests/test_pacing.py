"""Pieces of many streams wait for each other, and last pieces for none."""

import asyncio
import time

import pytest

from chatglm3.engines import pacing
from chatglm3.engines.pacing import Pacing

LONG_S, NO_TIME_S = 30.0, 5.0


def test_a_pause_is_the_longer_the_more_streams_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "PAUSE_PER_STREAM_S", 0.05)

    async def pause_s() -> float:
        began = time.perf_counter()
        await paced.pause("one")
        return time.perf_counter() - began

    paced = Pacing()
    with paced.stream("one"):
        assert asyncio.run(pause_s()) >= 0.045
        with paced.stream("another"):
            assert paced.streams == 2
            assert asyncio.run(pause_s()) >= 0.09
    assert paced.streams == 0


@pytest.mark.parametrize("when", ["before the pause", "in it"])
def test_the_last_piece_does_not_wait(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    monkeypatch.setattr(pacing, "PAUSE_PER_STREAM_S", LONG_S)

    async def paused() -> None:
        paced = Pacing()
        with paced.stream("one"), paced.stream("another"):
            if when == "before the pause":
                paced.end("one")
            else:
                asyncio.get_running_loop().call_later(0.05, paced.end, "one")
            async with asyncio.timeout(NO_TIME_S):
                await paced.pause("one")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await paced.pause("another")
        paced.end("one")  # it is gone

    asyncio.run(paused())
