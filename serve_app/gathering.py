"""Pieces of an answer gathered into fewer, for a way on which each costs as much as a token."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from chatglm3.engines import Delta, EngineError


async def gathered(deltas: AsyncGenerator[Delta, None], pause_s: float) -> AsyncGenerator[Delta, None]:
    """The same pieces; those that come within `pause_s` after one that was passed on are one. The first never waits.

    A failure comes after the pieces before it. Closing this closes `deltas`.
    """
    arrivals: asyncio.Queue[Delta | Exception] = asyncio.Queue()
    pump = asyncio.create_task(_pump(deltas, arrivals))
    try:
        while True:
            items = [await arrivals.get()]
            while not arrivals.empty():
                items.append(arrivals.get_nowait())
            pieces = [item for item in items if isinstance(item, Delta)]
            if pieces:
                yield joined(pieces)
                if pieces[-1].finish_reason:
                    return
            if isinstance(items[-1], Exception):
                raise items[-1]
            await asyncio.sleep(pause_s)
    finally:
        pump.cancel()
        await asyncio.gather(pump, return_exceptions=True)


def joined(pieces: Sequence[Delta]) -> Delta:
    """Pieces that follow each other, as one."""
    return Delta(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.token_ids),
        pieces[-1].finish_reason,
        tuple(logprob for piece in pieces for logprob in piece.logprobs),
    )


async def _pump(deltas: AsyncGenerator[Delta, None], arrivals: asyncio.Queue[Delta | Exception]) -> None:
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                arrivals.put_nowait(delta)
        arrivals.put_nowait(EngineError("the answer ended without a finish reason"))
    except Exception as error:
        arrivals.put_nowait(error)
