"""Work on a request that may take milliseconds, in which the event loop would answer nobody else."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fastapi import Request

P = ParamSpec("P")
T = TypeVar("T")

# A millisecond's work for the tokenizer. A thread takes part of one itself, and its request then waits for its turn
# among all others. (Not Starlette's threads: under Ray Serve, AnyIO looks through all tasks of the loop for each call.)
SHORT_BODY = 32 * 1024


async def off_loop(request: Request, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function`, which works on the request's body: in a thread, unless the body is short."""
    if int(request.headers.get("content-length", SHORT_BODY + 1)) <= SHORT_BODY:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)
