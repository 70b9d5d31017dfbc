"""ASGI middleware that lets a request in: its key, its key's limits, a free place, and the time it may take."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.allowance import Allowance
from serve_app.errors import ApiError
from serve_app.keys import Key, KeyFile
from serve_app.ledger import Ledger
from serve_app.paths import path_of
from serve_app.request_record import RequestRecord, current

LAST_WORD_S = 1.0
"""For telling a client that its time is over: a server's `send` waits for as long as the client reads nothing."""

log = logging.getLogger(__name__)


class Guard:
    """Answers 401, 429, 503 or 504 itself; everything else comes from the application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyFile | None,
        ledger: Ledger,
        is_open: Callable[[str], bool],
        max_inflight: int,
        timeout_s: float,
    ) -> None:
        """Paths that `is_open` need no key and no place. `keys` None lets everybody in; 0 is no limit."""
        self._app = app
        self._keys = keys
        self._ledger = ledger
        self._is_open = is_open
        self._max_inflight = max_inflight
        self._timeout_s = timeout_s
        self._inflight = 0
        self._under_way: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may pass."""
        if scope["type"] != "http" or self._is_open(path_of(scope)):
            return await self._app(scope, receive, send)
        record = current.get() or RequestRecord("")
        try:
            key = self._authenticated(scope)
            if key:
                record.key = key.name
            with self._place():
                # Only what asks the model to write counts; a scrape of /metrics must not use up anything.
                await self._counted(key if scope["method"] == "POST" else None, scope, receive, send, record)
        except ApiError as error:
            record.rejected = error.code
            await _respond(error, scope, receive, send)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._max_inflight and self._inflight >= self._max_inflight:
            raise ApiError(503, "the server is busy; try again", code="overloaded", headers={"Retry-After": "1"})
        self._inflight += 1
        try:
            yield
        finally:
            self._inflight -= 1

    async def _counted(
        self, key: Key | None, scope: Scope, receive: Receive, send: Send, record: RequestRecord
    ) -> None:
        if key is None:
            return await self._in_time(scope, receive, send, record)
        record.allowance = allowance = Allowance(key, self._ledger, self._under_way)
        try:
            await allowance.admit()
            await self._in_time(scope, receive, send, record)
        finally:
            # Shielded: a client that goes away must not get its tokens for nothing.
            await asyncio.shield(allowance.settle(record.prompt_tokens + record.completion_tokens))

    def _authenticated(self, scope: Scope) -> Key | None:
        if self._keys is None:
            return None
        scheme, _, presented = Headers(scope=scope).get("authorization", "").partition(" ")
        key = self._keys.find(presented.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise ApiError(
                401,
                "a valid API key is needed: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return key

    async def _in_time(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        begun = ""  # content type of the answer, once there is one

        async def watched(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                begun = headers.get("content-type", "?")
                headers.update(record.allowance.headers if record.allowance else {})
            await send(message)

        try:
            async with asyncio.timeout(self._timeout_s or None):
                await self._app(scope, receive, watched)
        except TimeoutError:
            record.rejected = "timeout"
            error = ApiError(
                504, f"the request took more than {self._timeout_s:g} s; ask for fewer tokens", code="timeout"
            )
            try:
                async with asyncio.timeout(LAST_WORD_S):
                    if not begun:
                        return await _respond(error, scope, receive, watched)
                    is_stream = begun.startswith("text/event-stream")
                    last = f"data: {json.dumps(error.body)}\n\n".encode() if is_stream else b""
                    await send({"type": "http.response.body", "body": last, "more_body": False})
            except TimeoutError:
                log.warning("request %s: its client reads nothing; the connection is closed", record.id)


async def _respond(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error.body, error.status_code, error.headers)(scope, receive, send)
