"""Places in an engine, shared out: one request's choices may not take them all."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from serve_app.request_record import RequestRecord


class Places:
    """Those of one engine, which answers `max_batch` prompts at a time."""

    def __init__(self, max_batch: int) -> None:
        self._most_of_a_request = max(1, max_batch // 2)

    @asynccontextmanager
    async def taken(self, record: RequestRecord) -> AsyncGenerator[None, None]:
        """One place, waited for while the request has half of the engine."""
        record.places = record.places or asyncio.Semaphore(self._most_of_a_request)
        async with record.places:
            yield
