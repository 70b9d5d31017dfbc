"""Answers of an engine in OpenAI's shapes: one object, or server-sent events; one choice or several at a time."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, Generic, Protocol, TypeVar

import orjson
from fastapi import Request, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from chatglm3.engines import Delta, EngineError
from serve_app.chat_schema import ChatCompletion
from serve_app.completion_schema import Completion
from serve_app.disconnect import unless_gone
from serve_app.errors import api_error
from serve_app.schema import GenerationRequest, Usage

log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=ChatCompletion | Completion)
Whole = TypeVar("Whole", covariant=True)
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


class Written(Protocol[Whole]):
    """An answer on its way, to be read once: whole, or in pieces. Closing the read cancels the generation."""

    id: str

    def whole(self) -> Coroutine[Any, Any, Whole]:
        """The answer as one object."""

    def messages(self) -> AsyncGenerator[Json, None]:
        """The answer in pieces; at least one."""


async def respond(request: Request, answer: Written[Whole], stream: bool | None) -> Response | Whole:
    """The answer as its client wants it; a client that goes away cancels it."""
    if stream:
        return await unless_gone(request, EventStream.begun(events(answer)))
    return await unless_gone(request, answer.whole())


async def events(answer: Written[Any]) -> AsyncGenerator[str, None]:
    """The answer as server-sent events.

    A failure before the first one is raised; one on the way becomes an event too, and ends the stream.
    """
    messages = answer.messages()
    message = await anext(messages)
    try:
        async with aclosing(messages):
            yield event(message)
            async for message in messages:
                yield event(message)
    except Exception as error:
        log.exception("answer %s broke off", answer.id)
        yield event(api_error(error).body)
        return
    yield "data: [DONE]\n\n"


class Answer(Generic[Body]):
    """Choices on their way, as `Written`."""

    def __init__(
        self,
        kind: type[Body],
        body: GenerationRequest,
        prompt_tokens: int,
        choices: Sequence[tuple[Choice, AsyncGenerator[Delta, None]]],
    ) -> None:
        self._kind: type[Body] = kind
        self._choices = choices
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage
        self.id = f"{'chatcmpl' if kind is ChatCompletion else 'cmpl'}-{uuid.uuid4().hex}"
        self._head: Json = {"id": self.id, "created": int(time.time()), "model": body.model}

    async def whole(self) -> Body:
        """The answer as one object."""
        async with aclosing(self._parts()) as parts:
            async for _ in parts:
                pass
        return self._kind(**self._head, choices=[choice.whole() for choice, _ in self._choices], usage=self._usage())

    async def messages(self) -> AsyncGenerator[Json, None]:
        """A choice's part in each, and last the usage, if it is wanted."""
        kind = "chat.completion.chunk" if self._kind is ChatCompletion else "text_completion"
        head = {**self._head, "object": kind}
        usage = {"usage": None} if self._include_usage else {}
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                yield {**head, "choices": [part], **usage}
        if self._include_usage:
            yield {**head, "choices": [], "usage": self._usage().model_dump()}

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
