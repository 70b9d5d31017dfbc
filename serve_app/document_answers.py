"""POST /v1/answer: a question answered from the caller's documents, with the places that the answer rests on."""

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from chatglm3.answer_stream import AnswerStream, Piece
from chatglm3.bm25 import likeliest_first
from chatglm3.chat import PromptFormat, question_ids
from chatglm3.documents import DocumentAnswer, documents_prompt, format_digest, seed_prompt
from chatglm3.engines import Delta, Engine, EngineError, FinishReason, Sampling
from chatglm3.errors import ModelError
from chatglm3.fitting import NUMBERING, Part, fit_documents
from chatglm3.quotations import find_answer, find_quotation
from chatglm3.reply import ReplyStream
from chatglm3.tokenizer import ChatGlmTokenizer
from chatglm3.windows import Span
from serve_app.answer_schema import AnswerBody, AnswerRequest, Citation, Cut, Document, Fit, Match
from serve_app.answers import STREAMS, EventStream, event
from serve_app.disconnect import unless_gone
from serve_app.errors import ApiError, api_error
from serve_app.request_record import take_on
from serve_app.schema import Usage

log = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 512
DocumentStyle = Literal["numbered", "single"]
"""`single` is the predecessor's prompt of one document, whose answers cite nothing."""


def document_style(facts: Mapping[str, Any], folder: str) -> DocumentStyle:
    """How the model in `folder`, whose receipt has these facts, was taught to read documents.

    ModelError if it was taught with another wording than this version asks with.
    """
    if facts.get("prompt_digest", format_digest()) != format_digest():
        raise ModelError(
            f"{folder} was tuned on another wording of the document prompt (prompt_digest in its receipt.json is "
            f"{facts['prompt_digest'][:12]}, here {format_digest()[:12]}): serve it with the version that tuned it, "
            f"or prepare and train again"
        )
    return "single" if facts.get("preset") == "seed" else "numbered"


@dataclass(frozen=True)
class Reader:
    """What turns a request into a prompt: the model's tokenizer and how it was taught to be asked."""

    tokenizer: ChatGlmTokenizer
    prompt_format: PromptFormat
    style: DocumentStyle = "numbered"
    max_prompt_tokens: int | None = None

    def prompt(self, body: AnswerRequest, limit: int) -> tuple[list[int], list[Part]]:
        """A prompt of at most `limit` tokens, and the parts of `shown` documents in it.

        ApiError if the question leaves no room for a document.
        """
        limit = max(0, min(limit, self.max_prompt_tokens or limit))
        documents = [document.shown for document in body.documents]
        offered, count = documents, cache(self._count)
        without = len(self._ids([], body.question))
        if self.style == "single":
            best = likeliest_first(body.question, documents)[0]
            offered = [text if index == best else "" for index, text in enumerate(documents)]
        room = limit - without
        while parts := [part for part in fit_documents(body.question, offered, room, count) if part.start < part.end]:
            ids = self._ids([documents[part.index][part.start : part.end] for part in parts], body.question)
            if len(ids) <= limit:
                return ids, parts
            # Where texts are joined there may be a token more than in each alone.
            room -= max(NUMBERING, len(ids) - limit)
        raise ApiError(
            400,
            f"the question takes {without} of {limit} tokens that a prompt may have here, which leaves no room for a "
            f"document; shorten it, or send a smaller max_tokens",
            param="question",
            code="context_length_exceeded",
        )

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _ids(self, documents: Sequence[str], question: str) -> list[int]:
        build = documents_prompt if self.style == "numbered" else _single_prompt
        return question_ids(
            self.tokenizer, [{"role": "user", "content": build(documents, question)}], self.prompt_format
        )


def _single_prompt(documents: Sequence[str], question: str) -> str:
    return seed_prompt("".join(documents), question)


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
        prompt_ids, parts = await run_in_threadpool(reader.prompt, body, engine.context_length - max_tokens)
        await take_on(1, len(prompt_ids) + max_tokens)
        deltas = engine.generate(prompt_ids, sampling)
        reply = ReplyStream() if reader.prompt_format == "chat" else None
        written = _Answer(body, parts, deltas, reply, body.model or model_name, len(prompt_ids), observe)
        if body.stream:
            return await unless_gone(request, EventStream.begun(written.events()))
        return await unless_gone(request, written.whole())


class _Answer:
    """One answer on its way, to be read once: whole, or as events. Closing the read cancels the generation."""

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
        self._head = {"id": f"answer-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self) -> AnswerBody:
        """The answer as one object."""
        async with aclosing(self._pieces()) as pieces:
            async for _ in pieces:
                pass
        return self._body()

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer as server-sent events: `start`, pieces of `quote` and `answer`, and `done` with the whole.

        A failure before the first piece is raised; one on the way becomes an event too, and ends the stream.
        """
        pieces = self._pieces()
        piece = await anext(pieces, None)
        try:
            async with aclosing(pieces):
                yield event({"type": "start", **self._head, **self._fit.model_dump()})
                while piece is not None:
                    yield event({"type": piece.kind, "text": piece.text})
                    piece = await anext(pieces, None)
            yield event({"type": "done", **self._body().model_dump()})
        except Exception as error:
            log.exception("answer %s broke off", self._head["id"])
            yield event(api_error(error).body)
            return
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        async with aclosing(self._deltas) as deltas:
            async for delta in deltas:
                self._completion_tokens += len(delta.token_ids)
                text = delta.text
                if self._reply is not None:
                    text = self._reply.push(text) + (self._reply.finish() if delta.finish_reason else "")
                for piece in self._stream.push(text):
                    yield piece
                if delta.finish_reason:
                    self._finish_reason = delta.finish_reason
                    for piece in self._stream.finish():
                        yield piece
                    return
        raise EngineError("the answer ended without a finish reason")

    def _body(self) -> AnswerBody:
        read, written, found = self._prompt_tokens, self._completion_tokens, self._stream.whole
        assert self._finish_reason
        body = AnswerBody(
            **self._head,
            **self._fit.model_dump(),
            answer=found.text,
            citations=cite(found, self._request, self._parts),
            refused=found.refused,
            finish_reason=self._finish_reason,
            usage=Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written),
        )
        self._observe(body)
        return body


def fit_report(documents: Sequence[Document], parts: Sequence[Part]) -> Fit:
    """What of the documents a prompt of these parts does not show, in characters of their texts."""
    shown = {part.index for part in parts}
    cut = []
    for part in parts:
        document = documents[part.index]
        if part.end - part.start < len(document.shown):
            start, end = (max(0, place - document.text_start) for place in (part.start, part.end))
            cut.append(Cut(document=part.index, start=start, end=end))
    return Fit(omitted=[index for index in range(len(documents)) if index not in shown], cut=cut)


def cite(answer: DocumentAnswer, body: AnswerRequest, parts: Sequence[Part]) -> list[Citation]:
    """The answer's citations of prompt documents as citations of the caller's; numbers of no document are dropped."""
    citations = []
    for number in answer.citations:
        if not 1 <= number <= len(parts):
            continue
        part = parts[number - 1]
        document = body.documents[part.index]
        # Looked for in what the model saw, lest an equal passage elsewhere in the document be taken for it.
        begin = max(part.start, document.text_start)
        span, match = _place(answer, body.question, document.shown[begin : part.end])
        start, end = (place + begin - document.text_start for place in span) if span else (None, None)
        citations.append(
            Citation(
                document=part.index,
                id=document.id,
                title=document.title,
                quote=document.text[start:end] if span else answer.quote or None,
                start=start,
                end=end,
                match=match,
            )
        )
    return citations


def _place(answer: DocumentAnswer, question: str, text: str) -> tuple[Span | None, Match]:
    """Where in `text` the answer's quote stands, or the answer itself, if it has none; and how that was found."""
    if not answer.quote:
        span = find_answer(question, answer.text, text)
        return span, "answer" if span else None
    if found := find_quotation(answer.quote, text):
        return (found.start, found.end), "exact" if found.exact else "near"
    return None, None
