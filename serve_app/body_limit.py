"""ASGI middleware that stops reading a request body at a limit."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import ApiError


class BodyLimit:
    """Fail the application's read of a body over `max_bytes` with a 413, whether or not its length was announced."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, bodies up to the limit."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = int(dict(scope["headers"]).get(b"content-length", 0))
        received = 0

        async def limited() -> Message:
            nonlocal received
            if announced <= self._max_bytes:
                message = await receive()
                received += len(message.get("body", b""))
                if received <= self._max_bytes:
                    return message
            # Closing the connection spares the server the rest of the body.
            raise ApiError(
                413,
                f"the body is larger than {self._max_bytes} bytes; send fewer or shorter messages",
                code="body_too_large",
                headers={"Connection": "close"},
            )

        await self._app(scope, limited, send)
