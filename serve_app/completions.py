"""POST /v1/completions: texts that the model goes on with."""

from collections.abc import AsyncGenerator

from fastapi import FastAPI, Request, Response

from chatglm3.engines import Delta, Engine, FinishReason, TokenLogprob
from chatglm3.stream import StopTexts
from chatglm3.tokenizer import ChatGlmTokenizer, TextDecoder
from serve_app import completion_schema
from serve_app.answers import STREAMS, Answer, Json, respond
from serve_app.completion_schema import Completion, CompletionLogprobs, CompletionRequest
from serve_app.logprobs import text_logprobs, token_text
from serve_app.models import Models
from serve_app.off_loop import off_loop
from serve_app.request_record import take_on
from serve_app.requests import guide_of, samplings

OPENAI_MAX_TOKENS = 16
"""Of this route, unless told otherwise."""


def add_route(api: FastAPI, engine: Engine, tokenizer: ChatGlmTokenizer, models: Models) -> None:
    """Give `api` the route."""

    @api.post("/v1/completions", response_model=Completion, responses=STREAMS)
    async def completions(body: CompletionRequest, request: Request) -> Response | Completion:
        """Go on with a text, or with several."""
        asked = samplings(
            body,
            max_tokens=body.max_tokens or OPENAI_MAX_TOKENS,
            logprobs=body.logprobs,
            guide=guide_of(body, ""),
            adapter=models.adapter(body.model),
        )
        prompts = [await off_loop(request, prompt_ids, tokenizer, prompt) for prompt in body.prompts()]
        await engine.prepare(asked[0])
        choices: list[tuple[TextChoice, AsyncGenerator[Delta, None]]] = []
        for ids in prompts:
            for sampling in asked:
                choice = TextChoice(len(choices), tokenizer, StopTexts(body.stop or ()), body.logprobs is not None)
                choices.append((choice, engine.generate(ids, sampling)))
        # What cannot be written was refused by now, and takes nothing of a key's limits.
        tokens = sum(len(ids) + sum(sampling.max_tokens for sampling in asked) for ids in prompts)
        await take_on(len(choices), tokens)
        answer = Answer(Completion, body, sum(map(len, prompts)), choices)
        return await respond(request, answer, body.stream)


def prompt_ids(tokenizer: ChatGlmTokenizer, prompt: str | list[int]) -> list[int]:
    """A text after ChatGLM3's prefix; ids as they are."""
    return tokenizer.prefix_ids + tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


class TextChoice:
    """One choice of a completion while it is written."""

    def __init__(self, index: int, tokenizer: ChatGlmTokenizer, stop: StopTexts, has_logprobs: bool) -> None:
        self.is_over = False
        self._index = index
        self._tokenizer = tokenizer
        self._stop = stop
        self._text = ""
        self._finish_reason: FinishReason = "stop"
        self._logprobs: list[TokenLogprob] = []
        self._offsets: list[int] = []
        self._has_logprobs = has_logprobs
        self._decoder = TextDecoder(tokenizer, is_start=False)
        self._decoded = 0
        self._space: str | None = None
        """What the engine took off the first token, as from a text of its own; here it goes on with the prompt's."""

    def opening(self) -> list[Json]:
        """Nothing comes before the text."""
        return []

    def push(self, delta: Delta) -> list[Json]:
        """Take a piece in: the parts of a stream that it makes."""
        text = delta.text
        if self._space is None and delta.token_ids:
            self._space = " " if token_text(self._tokenizer, delta.token_ids[0]).startswith(" ") else ""
        if self._space and text:
            text, self._space = self._space + text, ""
        text = self._stop.push(text, is_last=delta.finish_reason is not None)
        new = [token for token in delta.logprobs if token.token_id not in self._tokenizer.stop_ids]
        offsets = [self._offset_of(token.token_id) for token in new]
        self._text += text
        if self._stop.found:
            offsets = [offset for offset in offsets if offset < len(self._text)]
            new = new[: len(offsets)]
        self._logprobs += new
        self._offsets += offsets
        finish_reason: FinishReason | None = "stop" if self._stop.found else delta.finish_reason
        if finish_reason:
            self.is_over, self._finish_reason = True, finish_reason
        if not (text or new or finish_reason):
            return []
        logprobs = text_logprobs(self._tokenizer, new, offsets) if self._has_logprobs else None
        return [{"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}]

    def _offset_of(self, token_id: int) -> int:
        """Where the next token begins, which the text that it comes with does not tell: that may be of several."""
        offset = self._decoded
        self._decoded += len(self._decoder.push([token_id]))
        return offset

    def whole(self) -> completion_schema.CompletionChoice:
        """The choice as one object."""
        logprobs = text_logprobs(self._tokenizer, self._logprobs, self._offsets) if self._has_logprobs else None
        return completion_schema.CompletionChoice(
            index=self._index,
            text=self._text,
            logprobs=CompletionLogprobs.model_validate(logprobs) if logprobs else None,
            finish_reason=self._finish_reason,
        )
