"""Questions to a model that is served somewhere, by its HTTP API."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from chatglm3.chat import Message
from chatglm3.endpoint import Endpoint


class RemoteConversation:
    """Questions to one served model, which sees the earlier turns; with documents each question stands alone."""

    def __init__(
        self, endpoint: Endpoint, model: str, sampling: dict[str, Any], documents: Sequence[tuple[str, str]] = ()
    ) -> None:
        """`documents` are names and texts; `sampling` goes into the requests."""
        self.endpoint = endpoint
        self.model = model
        self.sampling = sampling
        self.documents = documents
        self.history: list[Message] = []
        self.sources: list[str] = []
        """Where the last answer stands in the documents, a line each."""

    async def ask(self, question: str) -> AsyncGenerator[str, None]:
        """Yield the answer in readable pieces. A turn that is not read to its end is forgotten."""
        pieces = self._from_documents(question) if self.documents else self._in_chat(question)
        async with self.endpoint, aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def _in_chat(self, question: str) -> AsyncGenerator[str, None]:
        messages = [*self.history, {"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, "stream": True, **self.sampling}
        answer = ""
        async with aclosing(self.endpoint.events("/v1/chat/completions", body)) as events:
            async for event in events:
                piece = event["choices"][0]["delta"].get("content") or "" if event["choices"] else ""
                answer += piece
                yield piece
        self.history = [*messages, {"role": "assistant", "content": answer}]

    async def _from_documents(self, question: str) -> AsyncGenerator[str, None]:
        documents = [{"id": name, "text": text} for name, text in self.documents]
        body = {"model": self.model, "question": question, "documents": documents, "stream": True, **self.sampling}
        async with aclosing(self.endpoint.events("/v1/answer", body)) as events:
            async for event in events:
                if event["type"] == "answer":
                    yield event["text"]
                elif event["type"] == "done":
                    self.sources = [_source(citation) for citation in event["citations"]]
                    self.sources += [f"not read, for lack of room: {self.documents[i][0]}" for i in event["omitted"]]


def _source(citation: dict[str, Any]) -> str:
    place = f", characters {citation['start']} to {citation['end']}" if citation["start"] is not None else ""
    quote = f": {citation['quote']}" if citation["quote"] else ""
    return f"{citation['id']}{place}{quote}"
