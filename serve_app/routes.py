"""The HTTP API over an engine, in OpenAI's shape. Knows nothing of Ray: any ASGI server can run it."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from chatglm3.chat import PromptFormat
from chatglm3.engines import Engine
from chatglm3.tokenizer import ChatGlmTokenizer
from serve_app import chat, completions, document_answers, errors, models, tokenization
from serve_app.answer_schema import AnswerBody
from serve_app.body_limit import BodyLimit
from serve_app.document_reader import DocumentStyle, Reader
from serve_app.errors import ApiError
from serve_app.models import Models
from serve_app.schema import ErrorBody

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
    served = Models(model_name, engine.adapters)
    chat.add_route(api, engine, tokenizer, served, prompt_format)
    completions.add_route(api, engine, tokenizer, served)
    models.add_routes(api, served)
    tokenization.add_routes(api, engine, tokenizer, served, prompt_format)
    reader = Reader(tokenizer, prompt_format, style, max_prompt_tokens)
    document_answers.add_route(api, engine, reader, served.adapter, model_name, on_answer)

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """200 while the engine can answer."""
        if not engine.healthy:
            raise ApiError(503, "the engine has died; its process is to be replaced", code="engine_error")
        return {"status": "ok"}

    return api
