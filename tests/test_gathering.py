"""Pieces of an answer gathered into fewer: none lost, the first at once, failures in their place."""

import asyncio

import pytest

from chatglm3.engines import Delta, EngineError, Sampling
from serve_app.gathering import gathered
from tests.clockwork import Clockwork

TEXT = "一二三四五六七八九十"
SAMPLING = Sampling(max_tokens=64)


async def read(engine: Clockwork, pause_s: float) -> list[Delta]:
    return [delta async for delta in gathered(engine.generate([1], SAMPLING), pause_s)]


def test_the_text_and_the_tokens_are_those_of_the_engine():
    pieces = asyncio.run(read(Clockwork(TEXT, step_s=0.01), pause_s=0.05))
    assert "".join(piece.text for piece in pieces) == f"\n{TEXT}"
    assert sum((piece.token_ids for piece in pieces), ()) == (5,) * (len(TEXT) + 1) + (2,)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert pieces[0].token_ids == (5,)
    assert len(pieces) < len(TEXT)


def test_pieces_that_come_one_by_one_are_not_held_up():
    pieces = asyncio.run(read(Clockwork("一二", step_s=0.2), pause_s=0.01))
    assert [piece.token_ids for piece in pieces] == [(5,), (5,), (5,), (2,)]


def test_a_failure_comes_after_the_pieces_before_it():
    async def run() -> str:
        text = ""
        with pytest.raises(EngineError, match="the engine has died"):
            async for piece in gathered(Clockwork("一二三💥").generate([1], SAMPLING), pause_s=0.01):
                text += piece.text
        return text

    assert asyncio.run(run()) == "\n一二三"


def test_closing_it_closes_the_answer():
    engine = Clockwork(TEXT, step_s=10)

    async def run() -> int:
        answer = gathered(engine.generate([1], SAMPLING), pause_s=0.01)
        waiting = asyncio.create_task(anext(answer))
        await asyncio.sleep(0.05)
        asked = engine.running
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await answer.aclose()
        return asked

    assert asyncio.run(run()) == 1
    assert engine.running == 0
