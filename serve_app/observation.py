"""ASGI middleware around everything: request ids, the audit log, counts by route, traces."""

import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from opentelemetry.trace import Tracer
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import tracing
from serve_app.metrics import HTTP_REQUESTS, REJECTED, Metrics
from serve_app.paths import path_of
from serve_app.request_record import RequestRecord, current

_ID = re.compile(r"[\w.:-]{1,128}")
Audit = Callable[[dict[str, Any]], None]

log = logging.getLogger(__name__)


class Observation:
    """Knows of each request who asked for what, how it ended and how long it took; nothing of what it says."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        audit: Audit | None = None,
        tracer: Tracer | None = None,
        returns_id: bool = True,
    ) -> None:
        """`returns_id` False leaves the X-Request-Id of answers to a proxy that adds it, as Ray Serve's does."""
        self._app = app
        self._metrics = metrics
        self._audit = audit
        self._tracer = tracer
        self._returns_id = returns_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on and take it down."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        record = RequestRecord(given if _ID.fullmatch(given) else uuid.uuid4().hex)
        started, status = time.perf_counter(), 499  # of a client that left before there was an answer

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._returns_id:
                    MutableHeaders(scope=message)["X-Request-Id"] = record.id
            await send(message)

        token = current.set(record)
        try:
            with tracing.request_span(self._tracer, scope) as span:
                try:
                    await self._app(scope, receive, watched)
                finally:
                    tracing.describe(span, scope, status, record)
        except Exception:
            status = 500 if status == 499 else status
            raise
        finally:
            current.reset(token)
            self._take_down(scope, status, record, time.perf_counter() - started)

    def _take_down(self, scope: Scope, status: int, record: RequestRecord, seconds: float) -> None:
        route = route_of(scope)
        self._metrics.record(HTTP_REQUESTS, route=route, method=scope["method"][:16], status=str(status))
        if record.rejected:
            self._metrics.record(REJECTED, reason=record.rejected)
        if self._audit is not None:
            self._audit(
                {
                    "id": record.id,
                    "key": record.key,
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "rejected": record.rejected,
                    "model": record.model,
                    "prompt_tokens": record.prompt_tokens,
                    "completion_tokens": record.completion_tokens,
                    "finish_reason": record.finish_reason,
                    "seconds": round(seconds, 3),
                }
            )


def route_of(scope: Scope) -> str:
    """The route's own path, without what stood in its place-holders; "other" where there is none: clients must not be
    able to make up label values."""
    if route := scope.get("route"):
        return str(route.path)
    # Turned away before it was looked for.
    paths = {getattr(route, "path", "") for route in scope["app"].routes}
    return path if (path := path_of(scope)) in paths else "other"
