"""POST /tokenize and /detokenize, in vLLM's shape."""

from fastapi import FastAPI, Request
from pydantic import Field, model_validator

from chatglm3.chat import PromptFormat, question_ids
from chatglm3.engines import Engine
from chatglm3.tokenizer import ChatGlmTokenizer
from serve_app.chat_schema import Message, Tool
from serve_app.completion_schema import Ids
from serve_app.logprobs import token_text
from serve_app.models import Models
from serve_app.off_loop import off_loop
from serve_app.requests import chatglm3_messages, told
from serve_app.schema import RequestBody, ResponseBody


class TokenizeRequest(RequestBody):
    """A text or a conversation: one of the two."""

    model: str | None = None
    """Any that is served: all have one tokenizer."""
    prompt: str | None = None
    """A text."""
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = Field(None, min_length=1)
    """Told to the model with the messages."""
    add_special_tokens: bool = True
    """Put ChatGLM3's prefix before a text; conversations always have it."""
    return_token_strs: bool | None = None
    """Send each token as text too."""

    @model_validator(mode="after")
    def _is_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class Tokens(ResponseBody):
    """Ids of a text or a conversation."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    """Ids of a text."""

    model: str | None = None
    """Any that is served: all have one tokenizer."""
    tokens: Ids
    """Ids past the vocabulary have no text."""


class Text(ResponseBody):
    """The text of some ids."""

    prompt: str


def add_routes(
    api: FastAPI, engine: Engine, tokenizer: ChatGlmTokenizer, models: Models, prompt_format: PromptFormat
) -> None:
    """Give `api` the routes."""

    @api.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Tokens:
        """The ids that the model would read."""
        if body.model is not None:
            models.adapter(body.model)
        return await off_loop(request, _tokens, body)

    @api.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Text:
        """The text of ids; control ids by name."""
        if body.model is not None:
            models.adapter(body.model)
        return Text(prompt=await off_loop(request, tokenizer.decode, body.tokens))

    def _tokens(body: TokenizeRequest) -> Tokens:
        ids = _ids(body)
        strings = [token_text(tokenizer, token) for token in ids] if body.return_token_strs else None
        return Tokens(count=len(ids), max_model_len=engine.context_length, tokens=ids, token_strs=strings)

    def _ids(body: TokenizeRequest) -> list[int]:
        if body.messages is not None:
            messages = chatglm3_messages(body.messages)
            return question_ids(tokenizer, messages, prompt_format, told(body.tools) if body.tools else None)
        prefix = tokenizer.prefix_ids if body.add_special_tokens else []
        return prefix + tokenizer.encode(body.prompt or "")
