"""What bodies of OpenAI's shape have in common. A field of a request that is not here or there is refused, by name."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from chatglm3.engines.guide import MAX_TEXT

MAX_CHOICES = 32
"""Answers that one request may ask for."""
MAX_DEPTH = 64
"""Levels of a JSON schema, and of a tool's arguments."""


class RequestBody(BaseModel):
    """Part of a body that a client sends."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """Fields that are not known here and null ask for nothing: clients send what they have of OpenAI's."""
        if not isinstance(values, dict):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None or name in known}


class ResponseBody(BaseModel):
    """Part of a body that a client gets."""

    model_config = ConfigDict(use_attribute_docstrings=True)


def shallow(value: dict[str, Any]) -> dict[str, Any]:
    """The value itself. ValueError if it has more than MAX_DEPTH levels, which Python's recursion would end at."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    if level:
        raise ValueError(f"it has more than {MAX_DEPTH} levels")
    return value


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1000)]],
    Field(max_length=4),
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
]
JsonSchema = Annotated[dict[str, Any], AfterValidator(shallow)]


class StreamOptions(RequestBody):
    """What a stream has besides the answer."""

    include_usage: bool = False
    """A last event with the tokens that were read and written."""


class SchemaFormat(RequestBody):
    """A JSON schema, and its name for people."""

    name: str
    """Taken and not used."""
    description: str | None = None
    """Taken and not used: the model does not see it."""
    json_schema: JsonSchema = Field(alias="schema")
    """What the answer must be, of what llguidance knows of JSON schema; the rest is refused by name."""
    strict: bool | None = None
    """Taken and not used: the schema is always kept to."""


class ResponseFormat(RequestBody):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    """Any text, any JSON object, or what `json_schema` says."""
    json_schema: SchemaFormat | None = None
    """With the type json_schema, and only with it."""

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with "type": "json_schema", and only with it')
        return self


class StructuredOutputs(RequestBody):
    """vLLM's way to say what form the answer must have: exactly one of these."""

    json_schema: JsonSchema | None = Field(None, alias="json")
    """A JSON schema."""
    regex: str | None = Field(None, max_length=MAX_TEXT)
    """A regular expression, in Rust's syntax, for the whole answer."""
    choice: list[str] | None = Field(None, min_length=1, max_length=1000)
    """The answer is one of these texts."""
    grammar: str | None = Field(None, max_length=MAX_TEXT)
    """A grammar in llguidance's dialect of Lark, with a rule `start`."""

    @model_validator(mode="after")
    def _is_one(self) -> "StructuredOutputs":
        if sum(value is not None for value in (self.json_schema, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give exactly one of json, regex, choice and grammar")
        return self


class GenerationRequest(RequestBody):
    """What a chat completion and a completion are asked for alike."""

    model: str
    """The model, or one of its adapters; GET /v1/models lists both."""
    stream: bool | None = None
    """Send the answer in pieces, as server-sent events."""
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    """0, the default, always takes the most probable token: an answer from documents should be repeatable."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw among the most probable tokens that together reach this probability."""
    top_k: int | None = Field(None, ge=0, lt=2**31)
    """Draw among this many most probable tokens; 0 is no limit. vLLM's."""
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """Answers to the same prompt, written at the same time."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed gives the same answer. With n, choice i is drawn with seed + i."""
    stop: Stop | None = None
    """The answer ends before the first of these texts."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Taken from the scores of tokens that the answer already has."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Taken from a token's score for each time that the answer already has it."""
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        Field(None, max_length=1024)
    )
    """Token ids and what is added to their scores."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    """Taken and not used."""

    @model_validator(mode="after")
    def _has_no_contradiction(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("response_format and structured_outputs are two ways to say the same; send one")
        return self


class Usage(ResponseBody):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    """Of all choices together."""
    total_tokens: int


class ModelCard(ResponseBody):
    """GET /v1/models/{id}."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "chatglm3-ray"
    parent: str | None = None
    """The model that this is an adapter of; null for the model itself."""


class ModelList(ResponseBody):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(ResponseBody):
    """What went wrong, for people (`message`) and for programs (`param`, `code`)."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    """The field at fault."""
    code: str | None


class ErrorBody(ResponseBody):
    """Every answer other than 200."""

    error: ErrorDetail
