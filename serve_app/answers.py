"""Answers of an engine in OpenAI's shapes: one object, or server-sent events; one choice or several at a time."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any, Generic, Protocol, TypeVar

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from chatglm3.engines import Delta, EngineError
from serve_app.chat_schema import ChatCompletion
from serve_app.completion_schema import Completion
from serve_app.errors import api_error
from serve_app.schema import Usage

log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=ChatCompletion | Completion)
Json = dict[str, Any]

_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "JSON of the next piece, or at the end [DONE]"}},
    "required": ["data"],
}
STREAMS: dict[int | str, Json] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}
"""For the specification: a route whose answer may also be a stream of events."""


class Choice(Protocol):
    """One of an answer's choices while it is written."""

    is_over: bool
    """Whether it has its finish reason; what the engine still has is not wanted."""

    def opening(self) -> list[Json]:
        """Its parts of a stream that come with the first token, before what that makes."""

    def push(self, delta: Delta) -> list[Json]:
        """Take a piece in: the parts of a stream that it makes."""

    def whole(self) -> Any:
        """The choice as one object, when it is over."""


class Answer(Generic[Body]):
    """Choices on their way, to be read once: whole, or as events. Closing the read cancels the generation."""

    def __init__(
        self,
        kind: type[Body],
        model: str,
        prompt_tokens: int,
        choices: Sequence[tuple[Choice, AsyncGenerator[Delta, None]]],
    ) -> None:
        self._kind: type[Body] = kind
        self._choices = choices
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        prefix = "chatcmpl" if kind is ChatCompletion else "cmpl"
        self._head: Json = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self) -> Body:
        """The answer as one object."""
        async with aclosing(self._parts()) as parts:
            async for _ in parts:
                pass
        return self._kind(**self._head, choices=[choice.whole() for choice, _ in self._choices], usage=self._usage())

    async def events(self, include_usage: bool) -> AsyncGenerator[str, None]:
        """The answer as server-sent events.

        A failure before the first token is raised; one on the way becomes an event too, and ends the stream.
        """
        kind = "chat.completion.chunk" if self._kind is ChatCompletion else "text_completion"
        head = {**self._head, "object": kind}
        usage = {"usage": None} if include_usage else {}
        parts = self._parts()
        part = await anext(parts)
        try:
            async with aclosing(parts):
                yield event({**head, "choices": [part], **usage})
                async for part in parts:
                    yield event({**head, "choices": [part], **usage})
        except Exception as error:
            log.exception("answer %s broke off", self._head["id"])
            yield event(api_error(error).body)
            return
        if include_usage:
            yield event({**head, "choices": [], "usage": self._usage().model_dump()})
        yield "data: [DONE]\n\n"

    async def _parts(self) -> AsyncGenerator[Json, None]:
        """Parts of all choices, as they come; a choice opens with its first token."""
        streams = [self._written(choice, deltas) for choice, deltas in self._choices]
        async with aclosing(_merged(streams) if len(streams) > 1 else streams[0]) as parts:
            async for part in parts:
                yield part

    async def _written(self, choice: Choice, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Json, None]:
        opening = choice.opening()
        async with aclosing(deltas):
            async for delta in deltas:
                self._completion_tokens += len(delta.token_ids)
                for part in [*opening, *choice.push(delta)]:
                    yield part
                opening = []
                if choice.is_over:
                    if not delta.finish_reason:
                        await _end_early(deltas)
                    return
        raise EngineError("the answer ended without a finish reason")

    def _usage(self) -> Usage:
        read, written = self._prompt_tokens, self._completion_tokens
        return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


class StoppedEarly(Exception):
    """Thrown into an answer whose reader has its end: a stop text came, which is no abort."""


async def _end_early(deltas: AsyncGenerator[Delta, None]) -> None:
    with suppress(StoppedEarly, StopAsyncIteration):
        await deltas.athrow(StoppedEarly())


class EventStream(StreamingResponse):
    """Server-sent events that are closed, and so cancel what makes them, as soon as the client is gone."""

    media_type = "text/event-stream"

    def __init__(self, first: str, rest: AsyncGenerator[str, None]) -> None:
        self._rest = rest
        super().__init__(_chained(first, rest))

    @classmethod
    async def begun(cls, events: AsyncGenerator[str, None]) -> "EventStream":
        """The response, once there is a first event: a failure before that has an HTTP status of its own."""
        return cls(await anext(events), events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)


async def _chained(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """One after the other; whoever made `rest` closes it."""
    yield first
    async for each in rest:
        yield each


def event(content: Json) -> str:
    """A server-sent event."""
    return f"data: {orjson.dumps(content).decode()}\n\n"


async def _merged(streams: Sequence[AsyncGenerator[Json, None]]) -> AsyncGenerator[Json, None]:
    """What comes from any of the streams, as it comes; the first failure ends all."""
    queue: asyncio.Queue[Json | Exception | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(stream: AsyncGenerator[Json, None]) -> None:
        end = None
        try:
            async with aclosing(stream):
                async for part in stream:
                    await queue.put(part)
        except Exception as error:
            end = error
        await queue.put(end)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(pumps)
        while running:
            match await queue.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case part:
                    yield part
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
