"""A question and documents as the prompt that the model was taught to answer them from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from chatglm3.bm25 import likeliest_first
from chatglm3.chat import PromptFormat, question_ids
from chatglm3.documents import documents_prompt, format_digest, seed_prompt
from chatglm3.errors import ModelError
from chatglm3.fitting import NUMBERING, Part, fit_documents
from chatglm3.tokenizer import ChatGlmTokenizer
from serve_app.answer_schema import AnswerRequest
from serve_app.errors import ApiError

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
        while room > 0:  # a question that takes all of it has no document looked through
            fitted = fit_documents(body.question, offered, room, count)
            if not (parts := [part for part in fitted if part.start < part.end]):
                break
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
