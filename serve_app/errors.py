"""Errors of the HTTP API, all in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import logging
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatglm3.engines import EngineError, PromptTooLong, RequestError, UnknownAdapter, UnusableAdapter
from chatglm3.errors import ModelError
from serve_app.paths import path_of

log = logging.getLogger(__name__)

_ALTERNATIVE = re.compile(r"\W|^[A-Z]|^str$")
"""What pydantic tried in the place of an error, which clients do not know: a type's name, literal[...]."""


class ApiError(HTTPException):
    """An answer other than 200, for the client: `param` is the field at fault, `code` what a program can match."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code or ""
        self.body = {
            "error": {
                "message": message,
                "type": "invalid_request_error" if status < 500 else "server_error",
                "param": param,
                "code": code,
            }
        }


def api_error(error: Exception, prompt_field: str = "messages") -> ApiError:
    """What the client is told of `error`, by the field that has the prompt where that is too long.

    An error without a place here is our own mistake: 500, details in the log.
    """
    match error:
        case ApiError():
            return error
        case StarletteHTTPException():
            return ApiError(error.status_code, _sentence(error), headers=dict(error.headers or {}))
        case RequestValidationError():
            return _validation_error(error.errors()[0])
        case PromptTooLong():
            return ApiError(400, str(error), param=prompt_field, code="context_length_exceeded")
        case UnknownAdapter():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case UnusableAdapter():
            log.warning("%s", error)
            return ApiError(
                404, "this adapter cannot be used; the server's log says why", param="model", code="model_not_usable"
            )
        case RequestError() | ModelError():
            return ApiError(400, str(error))
        case EngineError():
            log.warning("%s", error)
            # Another try may be answered: clients of OpenAI's API try again on 503.
            return ApiError(503, str(error), code="engine_error", headers={"Retry-After": "1"})
        case _:
            return ApiError(500, "the server failed at this request; its log says why", code="internal_error")


class Failures:
    """ASGI middleware that answers our own mistakes where the answer still goes through what stands around it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on. What fails after its answer has begun is raised, which closes the connection."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            log.exception("%s %s failed", scope["method"], path_of(scope))
            await _respond(Request(scope), error)(scope, receive, send)


def install(api: FastAPI) -> None:
    """Answer every failure of `api`, those of the framework included, with an ApiError."""
    kinds = (StarletteHTTPException, RequestValidationError, RequestError, ModelError, EngineError, Exception)
    for kind in kinds:
        api.add_exception_handler(kind, _respond)


def _respond(request: Request, error: Exception) -> JSONResponse:
    answer = api_error(error, "prompt" if path_of(request.scope) == "/v1/completions" else "messages")
    return JSONResponse(answer.body, answer.status_code, answer.headers)


def _sentence(error: StarletteHTTPException) -> str:
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            return "there is nothing at this path; the API is at /v1/chat/completions and /v1/models"
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return "this path does not take this method; the Allow header names those it takes"
        case _:
            return error.detail


def _place(loc: Sequence[int | str]) -> str:
    """A field's place as clients know it: messages.0.content."""
    return ".".join(str(part) for part in loc[1:] if not _ALTERNATIVE.search(str(part)))


def _shown(name: int | str) -> str:
    """A field's name that a client made up, which may be any text, as a few words that can be written."""
    return " ".join(ascii(name)[1:-1].split())[:80] if not str(name).isprintable() else str(name)[:80]


def _validation_error(error: dict[str, Any]) -> ApiError:
    """The first thing that is wrong with a body, as one sentence that names its place."""
    place = _place(error["loc"]) or None
    match error["type"]:
        case "json_invalid":
            return ApiError(400, f"the body is not JSON: {error['ctx']['error']}", code="invalid_json")
        case "missing" | "model_attributes_type" if place is None:
            return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
        case "extra_forbidden":
            place = ".".join(filter(None, (_place(error["loc"][:-1]), _shown(error["loc"][-1]))))
            return ApiError(400, f"{place} is not supported; leave it out", param=place, code="unknown_parameter")
        case _:
            message = error["msg"].removeprefix("Value error, ")
            return ApiError(400, f"{place}: {message}" if place else message, param=place, code="invalid_value")
