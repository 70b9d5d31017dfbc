"""The HTTP API over an engine, in OpenAI's shape. Knows nothing of Ray: any ASGI server can run it."""

import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from chatglm3.chat import PromptFormat, question_ids
from chatglm3.engines import Engine, Sampling
from chatglm3.reply import ReplyStream
from chatglm3.tokenizer import ChatGlmTokenizer
from serve_app import document_answers, errors
from serve_app.answer_schema import AnswerBody
from serve_app.answers import Answer, EventStream
from serve_app.body_limit import BodyLimit
from serve_app.disconnect import unless_gone
from serve_app.document_answers import DocumentStyle, Reader
from serve_app.errors import ApiError
from serve_app.schema import ChatCompletion, ChatRequest, ErrorBody, ModelCard, ModelList

DEFAULT_MAX_TOKENS = 512
MAX_BODY_BYTES = 2**20  # several times what 8,192 tokens of escaped Chinese take


def make_api(
    engine: Engine,
    tokenizer: ChatGlmTokenizer,
    model_name: str,
    prompt_format: PromptFormat,
    style: DocumentStyle = "numbered",
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_prompt_tokens: int | None = None,
    on_answer: Callable[[AnswerBody], object] = bool,
) -> FastAPI:
    """The application that answers with `engine`, whose model is called `model_name`, is asked in `prompt_format` and
    reads documents in `style`, as far as they fit into `max_prompt_tokens`. `on_answer` is called with each answer of
    /v1/answer."""
    failures: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
    # The documentation pages of FastAPI load their scripts from elsewhere; /openapi.json stays.
    api = FastAPI(title="ChatGLM3", docs_url=None, redoc_url=None, redirect_slashes=False, responses=failures)
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    errors.install(api)
    card = ModelCard(id=model_name, created=int(time.time()))

    @api.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response | ChatCompletion:
        """Answer the last message of a conversation."""
        _check_model(body.model, model_name)
        messages = [message.chatglm3() for message in body.messages]
        prompt_ids = await run_in_threadpool(question_ids, tokenizer, messages, prompt_format)
        deltas = engine.generate(prompt_ids, _sampling(body, engine.context_length - len(prompt_ids)))
        # A bare prompt is answered with text alone, a chat with ChatGLM3's metadata line before it.
        reply = ReplyStream() if prompt_format == "chat" else None
        answer = Answer(deltas, reply, body.stop or (), model_name, len(prompt_ids))
        if body.stream:
            return EventStream(answer.events(body.stream_options is not None and body.stream_options.include_usage))
        return await unless_gone(request, answer.whole())

    def adapter_of(name: str) -> str:
        _check_model(name, model_name)
        return ""

    reader = Reader(tokenizer, prompt_format, style, max_prompt_tokens)
    document_answers.add_route(api, engine, reader, adapter_of, model_name, on_answer)

    @api.get("/v1/models")
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[card])

    @api.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        """The model called `model`."""
        _check_model(model, model_name)
        return card

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """200 while the engine can answer."""
        if not engine.healthy:
            raise ApiError(503, "the engine has died; its process is to be replaced", code="engine_error")
        return {"status": "ok"}

    return api


def _check_model(asked: str, served: str) -> None:
    if asked != served:
        raise ApiError(
            404,
            f"model {asked!r} is not served here; this is {served!r}",
            param="model",
            code="model_not_found",
        )


def _sampling(body: ChatRequest, room: int) -> Sampling:
    """What the request asks of the engine. `room`: tokens that the prompt leaves of the context."""
    return Sampling(
        max_tokens=body.max_tokens or body.max_completion_tokens or max(1, min(DEFAULT_MAX_TOKENS, room)),
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
    )
