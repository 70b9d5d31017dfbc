"""Places in an engine, shared out: neither one request's choices nor one key's requests may take them all."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from serve_app.errors import ApiError
from serve_app.request_record import RequestRecord


class Places:
    """Those of one engine, which answers `max_batch` prompts at a time."""

    def __init__(self, max_batch: int) -> None:
        self._most_of_a_request = max(1, max_batch // 2)
        self._of_keys: Counter[str] = Counter()

    @asynccontextmanager
    async def taken(self, record: RequestRecord) -> AsyncGenerator[None, None]:
        """One place: waited for while the request has half of the engine, refused if its key has all of its own."""
        if record.answers_at_once and self._of_keys[record.key] >= record.answers_at_once:
            record.rejected = "answers_at_once_exceeded"
            raise ApiError(
                429,
                f"this key may have {record.answers_at_once} answers written at once (each of n counts); try again",
                code=record.rejected,
                headers={"Retry-After": "1"},
            )
        record.places = record.places or asyncio.Semaphore(self._most_of_a_request)
        self._of_keys[record.key] += 1
        try:
            async with record.places:
                yield
        finally:
            self._of_keys[record.key] -= 1
