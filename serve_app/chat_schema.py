"""Bodies of POST /v1/chat/completions."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from serve_app.schema import GenerationRequest, JsonSchema, RequestBody, ResponseBody, Usage

MAX_TOOLS = 128
ToolName = Annotated[str, Field(pattern=r"^[^\s<>|]{1,64}$")]
ChatFinish = Literal["stop", "length", "tool_calls"]


class TextPart(RequestBody):
    """A piece of a content that is sent as a list."""

    type: Literal["text"]
    """There are no others here."""
    text: str
    """Put after the parts before it, with nothing between."""


def _joined(content: object) -> object:
    if not isinstance(content, list):
        return content
    try:
        return "".join(part.text for part in _PARTS.validate_python(content))
    except ValidationError:
        raise ValueError('a list takes only parts of the form {"type": "text", "text": "..."}') from None


_PARTS = TypeAdapter(list[TextPart])
Content = Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]


class CalledFunction(RequestBody):
    """The tool that a message calls."""

    name: ToolName
    """The tool's."""
    arguments: str
    """A JSON object, as text."""


class CalledTool(RequestBody):
    """A call in the history, as an answer gave it."""

    id: str
    """Taken and not needed: ChatGLM3 calls one tool at a time."""
    type: Literal["function"]
    """There are no others here."""
    function: CalledFunction


class Message(RequestBody):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """developer is OpenAI's newer name of system."""
    content: Content | None = None
    """Text. Only an assistant's message that calls tools may go without."""
    tool_calls: list[CalledTool] | None = Field(None, min_length=1)
    """What an assistant's message calls."""
    tool_call_id: str | None = None
    """Taken and not needed: a tool's answer follows its call."""
    name: str | None = None
    """Taken and not used: ChatGLM3 knows roles, not people."""
    refusal: None = None
    """Taken, for clients that send answers back as they came."""
    annotations: list[dict[str, Any]] | None = None
    """Taken and not used, as above."""

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        if self.content is None and self.tool_calls is None:
            raise ValueError("content is missing: send a string")
        return self


class Function(RequestBody):
    """A tool that the model may call."""

    name: ToolName
    """No white space, and none of the characters < > |."""
    description: str | None = None
    """What the model is told of it."""
    parameters: JsonSchema | None = None
    """A JSON schema of an object."""
    strict: bool | None = None
    """true only where tool_choice demands a call, which is then kept to the schema; what of it cannot be kept is
    refused."""


class Tool(RequestBody):
    """A tool, in OpenAI's form."""

    type: Literal["function"]
    """There are no others here."""
    function: Function


class NamedFunction(RequestBody):
    """A tool's name."""

    name: str
    """One of the tools of the request."""


class NamedTool(RequestBody):
    """The tool that must be called."""

    type: Literal["function"]
    """There are no others here."""
    function: NamedFunction


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    """Most tokens of the answer. Unless given: 512, or what the prompt leaves of the context."""
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    """Report how probable each token was: log-softmax of the model's own scores, before bias, penalties, guides and
    temperature."""
    top_logprobs: int | None = Field(None, ge=0, le=20)
    """How many of the most probable tokens to report with each."""
    tools: list[Tool] | None = Field(None, min_length=1, max_length=MAX_TOOLS)
    """What the model may call, told to it in ChatGLM3's own format."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """Whether to call: never (the model is told of no tools), as the model decides (the default), any one, this one."""
    parallel_tool_calls: bool | None = None
    """Taken and not used: ChatGLM3 calls one tool at a time."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit; send one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        names = [tool.function.name for tool in self.tools or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two tools are called {min(twice)!r}; a call could mean either")
        if self.tools is None and self.tool_choice not in (None, "none"):
            raise ValueError("tool_choice needs tools")
        return self


class AnsweredFunction(ResponseBody):
    """The tool that the model wants called."""

    name: str
    arguments: str
    """A JSON object, as text."""


class AnsweredTool(ResponseBody):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: AnsweredFunction


class AnswerMessage(ResponseBody):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    """null where the model only calls tools."""
    tool_calls: list[AnsweredTool] | None = Field(None, exclude_if=lambda calls: calls is None)
    """Left out where there are none."""


class TopLogprob(ResponseBody):
    """A token that could have come."""

    token: str
    """As text; a byte of a character as \\xHH."""
    logprob: float
    bytes: list[int]
    """UTF-8; all tokens' bytes together are the text."""


class ContentLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(ResponseBody):
    """Logprobs of the tokens of a content; without ChatGLM3's metadata line and the token that ends the turn."""

    content: list[ContentLogprob]


class Choice(ResponseBody):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: ChatFinish


class ChatCompletion(ResponseBody):
    """The answers when they are not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
