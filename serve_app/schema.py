"""Bodies of requests and responses, in OpenAI's shape. A field that is not here is refused, by name."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from chatglm3.engines import FinishReason


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Request):
    """A piece of a content that is sent as a list."""

    type: Literal["text"]
    text: str


def _joined(content: object) -> object:
    if not isinstance(content, list):
        return content
    try:
        return "".join(part.text for part in _PARTS.validate_python(content))
    except ValidationError:
        raise ValueError('a list takes only parts of the form {"type": "text", "text": "..."}') from None


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


_PARTS = TypeAdapter(list[TextPart])
Content = Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=4),
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
]


class Message(_Request):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Content
    tool_call_id: str | None = None
    """Taken and not needed: ChatGLM3 calls one tool at a time."""

    def chatglm3(self) -> dict[str, Any]:
        """The turn in ChatGLM3's own form, where the result of a tool is an observation."""
        return {"role": "observation" if self.role == "tool" else self.role, "content": self.content}


class StreamOptions(_Request):
    """What a stream has besides the answer."""

    include_usage: bool = False


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    """Most tokens of the answer. Unless given: 512, or what the prompt leaves of the context."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of max_tokens."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0, the default, always takes the most probable token: an answer from documents should be repeatable."""
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    user: str | None = None
    """Taken and not used."""

    @model_validator(mode="after")
    def _has_no_contradiction(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit; send one")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """An answer; there is always one."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answer when it is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ModelCard(BaseModel):
    """GET /v1/models/{id}."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "chatglm3-ray"


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What went wrong, for people (`message`) and for programs (`param`, `code`)."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer other than 200."""

    error: ErrorDetail
