"""A model that is served somewhere, asked over HTTP: the events of its answers as they come."""

from collections.abc import AsyncGenerator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from chatglm3.errors import ModelError

LONGEST_EVENT = 2**22  # bytes; the last event of /v1/answer holds quotes of all documents


class EndpointError(ModelError):
    """The endpoint could not be asked, or did not answer; `kind` is the same for all failures of one sort."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Endpoint:
    """An OpenAI-compatible server; use it in an `async with`."""

    def __init__(self, url: str, api_key: str = "", timeout_s: float | None = None) -> None:
        """`url` is the server's, with or without /v1 at its end. `timeout_s` is for a whole answer."""
        self.base = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=30)

    async def __aenter__(self) -> Self:
        # No limit of its own: who generates load decides how many connections there are.
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._headers, timeout=self._timeout, read_bufsize=LONGEST_EVENT
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def models(self) -> list[str]:
        """Names of the models that are served there, the main one first."""
        try:
            async with self._session.get(f"{self.base}/v1/models") as response:
                await self._check(response)
                return [model["id"] for model in orjson.loads(await response.read())["data"]]
        except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise self._unreachable(error) from None

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Post a request that asks for a stream, and yield its events. EndpointError if it ends before its end."""
        try:
            async with self._session.post(f"{self.base}{path}", json=body) as response:
                await self._check(response)
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    if (data := line[6:].strip()) == b"[DONE]":
                        return
                    event = orjson.loads(data)
                    if error := event.get("error"):
                        raise EndpointError(f"the answer broke off: {error['message']}", f"broke off: {error['code']}")
                    yield event
        except EndpointError:  # which is a ValueError too
            raise
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # the last is what no event should be
            raise self._unreachable(error) from None
        raise EndpointError("the answer broke off", "broke off")

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status == 200:
            return
        try:
            error = orjson.loads(await response.read())["error"]
            message, code = str(error["message"]), str(error["code"] or "")
        except (orjson.JSONDecodeError, KeyError, TypeError):
            message, code = f"HTTP {response.status} without an explanation", ""
        remedy = "; give a valid one with --api_key_file" if response.status == 401 else ""
        raise EndpointError(f"{self.base}: {message}{remedy}", f"HTTP {response.status} {code}".strip())

    def _unreachable(self, error: Exception) -> EndpointError:
        if isinstance(error, TimeoutError):
            return EndpointError(f"{self.base} took too long", "timeout")
        cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        reason = getattr(cause, "strerror", None) or str(cause) or type(error).__name__
        return EndpointError(f"{self.base} cannot be asked: {reason}; correct --url or start it", type(error).__name__)


def read_api_key(path: str) -> str:
    """The key in a file, or "" without a path: on a command line everybody on the machine could read it."""
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ModelError(f"--api_key_file {path} cannot be read ({reason})") from None
