"""Work for a client that may go away before it is done."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response

T = TypeVar("T")


async def unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> Response | T:
    """Await the answer; a client that goes away meanwhile cancels it."""
    work = asyncio.create_task(answer)
    watch = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=499)  # which nobody is there to read
    finally:
        work.cancel()
        watch.cancel()
        await asyncio.wait((work, watch))  # what it did is known only when it has ended


async def _gone(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
