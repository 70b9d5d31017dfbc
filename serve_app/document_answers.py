"""POST /v1/answer: a question answered from the caller's documents, with the places that the answer rests on."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from fastapi import FastAPI, Request, Response

from chatglm3.answer_stream import AnswerStream, Piece
from chatglm3.engines import Delta, Engine, EngineError, FinishReason, Sampling
from chatglm3.fitting import Part
from chatglm3.reply import SEPARATOR, ReplyStream
from serve_app.answer_schema import AnswerBody, AnswerRequest
from serve_app.answers import STREAMS, Json, respond
from serve_app.citations import cite, fit_report
from serve_app.document_reader import Reader
from serve_app.errors import ApiError
from serve_app.request_record import take_on
from serve_app.requests import DEFAULT_MAX_TOKENS
from serve_app.schema import Usage


def add_route(
    api: FastAPI,
    engine: Engine,
    reader: Reader,
    resolve: Callable[[str], str],
    model_name: str,
    observe: Callable[[AnswerBody], object],
) -> None:
    """Give `api` the route. `resolve` makes a model's name the adapter's, "" for the model itself, or raises ApiError;
    `observe` is called with each whole answer."""

    @api.post("/v1/answer", response_model=AnswerBody, responses=STREAMS)
    async def answer(body: AnswerRequest, request: Request) -> Response | AnswerBody:
        """Answer a question from documents, and say where it stands in them."""
        max_tokens = body.max_tokens or min(DEFAULT_MAX_TOKENS, engine.context_length // 4)
        if max_tokens >= engine.context_length:
            raise ApiError(
                400,
                f"max_tokens {max_tokens} leaves no room for a prompt in the model's context of "
                f"{engine.context_length} tokens; send a smaller one",
                param="max_tokens",
                code="context_length_exceeded",
            )
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            adapter=resolve(body.model or model_name),
        )
        await engine.prepare(sampling)
        prompt_ids, parts = await asyncio.to_thread(reader.prompt, body, engine.context_length - max_tokens)
        await take_on(1, len(prompt_ids) + max_tokens)
        deltas = engine.generate(prompt_ids, sampling)
        separator_id = reader.tokenizer.control_id(SEPARATOR)
        reply = ReplyStream(separator_id=separator_id) if reader.prompt_format == "chat" else None
        written = _Answer(body, parts, deltas, reply, body.model or model_name, len(prompt_ids), observe)
        return await respond(request, written, body.stream)


class _Answer:
    """One answer on its way, as `Written`."""

    def __init__(
        self,
        body: AnswerRequest,
        parts: Sequence[Part],
        deltas: AsyncGenerator[Delta, None],
        reply: ReplyStream | None,
        model: str,
        prompt_tokens: int,
        observe: Callable[[AnswerBody], object],
    ) -> None:
        self._request = body
        self._parts = parts
        self._deltas = deltas
        self._reply = reply
        self._stream = AnswerStream()
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._finish_reason: FinishReason | None = None
        self._observe = observe
        self._fit = fit_report(body.documents, parts)
        self.id = f"answer-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}

    async def whole(self) -> AnswerBody:
        """The answer as one object."""
        async with aclosing(self._pieces()) as pieces:
            async for _ in pieces:
                pass
        return await self._body()

    async def messages(self) -> AsyncGenerator[Json, None]:
        """`start`, pieces of `quote` and `answer`, and `done` with the whole."""
        async with aclosing(self._pieces()) as pieces:
            piece = await anext(pieces, None)  # what fails before it has no start
            yield {"type": "start", **self._head, **self._fit.model_dump()}
            while piece is not None:
                yield {"type": piece.kind, "text": piece.text}
                piece = await anext(pieces, None)
        body = await self._body()
        yield {"type": "done", **body.model_dump()}

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        async with aclosing(self._deltas) as deltas:
            async for delta in deltas:
                self._completion_tokens += len(delta.token_ids)
                text = delta.text
                if self._reply is not None:
                    text = self._reply.push(text, delta.token_ids) + (
                        self._reply.finish() if delta.finish_reason else ""
                    )
                for piece in self._stream.push(text):
                    yield piece
                if delta.finish_reason:
                    self._finish_reason = delta.finish_reason
                    for piece in self._stream.finish():
                        yield piece
                    return
        raise EngineError("the answer ended without a finish reason")

    async def _body(self) -> AnswerBody:
        read, written, found = self._prompt_tokens, self._completion_tokens, self._stream.whole
        assert self._finish_reason
        # A long quote with mistakes takes tens of milliseconds, in which all other answers would stand still.
        citations = await asyncio.to_thread(cite, found, self._request, self._parts)
        body = AnswerBody(
            **self._head,
            **self._fit.model_dump(),
            answer=found.text,
            citations=citations,
            refused=found.refused,
            finish_reason=self._finish_reason,
            usage=Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written),
        )
        self._observe(body)
        return body
