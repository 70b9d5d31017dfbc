"""An engine's stream as OpenAI's chat completion: one object, or server-sent events."""

import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from chatglm3.engines import Delta, EngineError, FinishReason
from chatglm3.reply import ReplyStream
from chatglm3.stream import StopTexts
from serve_app.errors import api_error
from serve_app.schema import AnswerMessage, ChatCompletion, Choice, Usage

log = logging.getLogger(__name__)


class Answer:
    """One answer on its way, to be read once: whole, or as events. Closing the read cancels the generation."""

    def __init__(
        self,
        deltas: AsyncGenerator[Delta, None],
        reply: ReplyStream | None,
        stop: Sequence[str],
        model: str,
        prompt_tokens: int,
    ) -> None:
        """`reply` takes ChatGLM3's metadata off; None leaves text as it is. `stop` ends what the client sees."""
        self._deltas = deltas
        self._reply = reply
        # Not the engine's own stop texts, which see ChatGLM3's metadata line: "\\n" would end every reply there.
        self._stop = StopTexts(stop)
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self) -> ChatCompletion:
        """The answer as one object."""
        content = ""
        async with aclosing(self._pieces()) as pieces:
            async for text, finish_reason in pieces:
                content += text
                if finish_reason:
                    choice = Choice(message=AnswerMessage(content=content), finish_reason=finish_reason)
                    return ChatCompletion(**self._head, choices=[choice], usage=self._usage())
        raise EngineError("the answer ended without a finish reason")

    async def events(self, include_usage: bool) -> AsyncGenerator[str, None]:
        """The answer as server-sent events. A failure on the way becomes an event too, and ends the stream."""
        usage = {"usage": None} if include_usage else {}
        yield self._chunk({"role": "assistant", "content": ""}, None, usage)
        try:
            async with aclosing(self._pieces()) as pieces:
                async for text, finish_reason in pieces:
                    if text:
                        yield self._chunk({"content": text}, None, usage)
                    if finish_reason:
                        yield self._chunk({}, finish_reason, usage)
        except Exception as error:
            log.exception("answer %s broke off", self._head["id"])
            yield _event(api_error(error).body)
            return
        if include_usage:
            yield _event({**self._chunk_head(), "choices": [], "usage": self._usage().model_dump()})
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncGenerator[tuple[str, FinishReason | None], None]:
        async with aclosing(self._deltas) as deltas:
            async for delta in deltas:
                self._completion_tokens += len(delta.token_ids)
                text = delta.text
                if self._reply is not None:
                    text = self._reply.push(text) + (self._reply.finish() if delta.finish_reason else "")
                text = self._stop.push(text, is_last=delta.finish_reason is not None)
                yield text, "stop" if self._stop.found else delta.finish_reason
                if self._stop.found:
                    return

    def _usage(self) -> Usage:
        read, written = self._prompt_tokens, self._completion_tokens
        return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _chunk(self, delta: dict[str, str], finish_reason: FinishReason | None, usage: dict[str, None]) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _event({**self._chunk_head(), "choices": [choice], **usage})


class EventStream(StreamingResponse):
    """Server-sent events that are closed, and so cancel what makes them, as soon as the client is gone."""

    media_type = "text/event-stream"
    body_iterator: AsyncGenerator[str, None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
