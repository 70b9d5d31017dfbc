"""Bodies of POST /v1/answer: a question and documents in, an answer with its places in them out."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from chatglm3.engines import FinishReason
from serve_app.schema import RequestBody, ResponseBody, Usage

MOST_DOCUMENTS = 1000
Match = Literal["exact", "near", "answer"] | None


def _writable(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is not valid Unicode: remove lone surrogates")
    return text


class Document(RequestBody):
    """A document to answer from."""

    text: str = Field(pattern=r"\S")
    """What stands in it; more than white space."""
    title: str | None = None
    """Put before the text, as its first line."""
    id: Annotated[str, AfterValidator(_writable)] | None = None
    """Given back in citations."""

    @property
    def shown(self) -> str:
        """What the model is shown of it, if it fits."""
        return f"{self.title}\n{self.text}" if self.title else self.text

    @property
    def text_start(self) -> int:
        """Where in `shown` the text begins."""
        return len(self.shown) - len(self.text)


def _as_document(document: object) -> object:
    return {"text": document} if isinstance(document, str) else document


AnyDocument = Annotated[Document, BeforeValidator(_as_document, json_schema_input_type=str | Document)]


class AnswerRequest(RequestBody):
    """POST /v1/answer."""

    question: str = Field(pattern=r"\S")
    """What to answer."""
    documents: list[AnyDocument] = Field(min_length=1, max_length=MOST_DOCUMENTS)
    """More than fits into the model's context may be sent: the likeliest are read, the others reported."""
    model: str | None = None
    """The model or an adapter of it; the model unless given."""
    stream: bool | None = None
    """Send the answer in pieces, as server-sent events."""
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    """Most tokens of the answer; 512 unless given."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0, the default, always takes the most probable token."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw among the most probable tokens that together reach this probability."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed gives the same answer."""
    user: str | None = None
    """Taken and not used."""


class Citation(ResponseBody):
    """A document that the answer cites, and the passage that it quotes from it."""

    document: int
    """Index in the request's documents, from 0."""
    id: str | None
    title: str | None
    quote: str | None
    """The document's own words, `text[start:end]`; the model's, where they are not found in the text."""
    start: int | None
    """Of the quote, in characters of the text."""
    end: int | None
    match: Match
    """How the place was found. exact: the model copied it, but for white space and letter case; near: with a few
    mistakes; answer: the model quotes nothing, and this sentence holds its answer; null: it was not found."""


class Cut(ResponseBody):
    """A document of which the model was shown a part: characters `start` to `end` of its text."""

    document: int
    start: int
    end: int


class Fit(ResponseBody):
    """What of the documents the model did not see."""

    omitted: list[int]
    """Indices of the documents that were left out."""
    cut: list[Cut]


class AnswerBody(Fit):
    """The answer; in a stream the last event."""

    id: str
    object: Literal["answer"] = "answer"
    created: int
    model: str
    answer: str
    """Without quote and citation signs."""
    citations: list[Citation]
    refused: bool
    """The model says that the documents do not hold the answer."""
    finish_reason: FinishReason
    usage: Usage
