"""Bodies of POST /v1/completions."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from chatglm3.engines import FinishReason
from serve_app.schema import MAX_CHOICES, GenerationRequest, ResponseBody, Usage

Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
MAX_PROMPTS = 32


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: texts that the model goes on with."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    """A text, its token ids as they are, or several of one kind. A text gets ChatGLM3's prefix, ids get nothing."""
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    """Most tokens of each answer; 16 unless given, as OpenAI has it."""
    logprobs: int | None = Field(None, ge=0, le=20)
    """Report each token's logprob, and those of this many of the most probable ones."""
    echo: Literal[False] | None = None
    """The prompt is not sent back."""
    best_of: Literal[1] | None = None
    """Answers are not chosen among: ask for n."""
    suffix: None = None
    """ChatGLM3 fills no gaps."""

    @model_validator(mode="after")
    def _asks_for_few(self) -> "CompletionRequest":
        prompts = len(self.prompts())
        if prompts * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"prompts times n are {prompts * (self.n or 1)}, and {MAX_CHOICES} are allowed")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """The texts or ids, of one prompt too."""
        match self.prompt:
            case str() | [int(), *_]:
                return [self.prompt]  # type: ignore[return-value]
            case several:
                return several  # type: ignore[return-value]


class CompletionLogprobs(ResponseBody):
    """Logprobs of the tokens of a text, a list each."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Where each token begins, in characters of the answer."""


class CompletionChoice(ResponseBody):
    """One of the answers: of prompt p of several, index p * n + i."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason


class Completion(ResponseBody):
    """The answers when they are not streamed."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
