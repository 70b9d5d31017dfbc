"""POST /v1/chat/completions."""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response

from chatglm3.chat import PromptFormat, question_ids
from chatglm3.engines import Delta, Engine, FinishReason
from chatglm3.reply import SEPARATOR, ReplyStream
from chatglm3.stream import StopTexts
from chatglm3.tokenizer import ChatGlmTokenizer, TextDecoder
from serve_app import chat_schema
from serve_app.answers import STREAMS, Answer, Json, respond
from serve_app.chat_schema import AnsweredTool, AnswerMessage, ChatCompletion, ChatFinish, ChatRequest, ChoiceLogprobs
from serve_app.errors import ApiError
from serve_app.logprobs import content_logprob, token_bytes
from serve_app.models import Models
from serve_app.off_loop import off_loop
from serve_app.request_record import take_on
from serve_app.requests import DEFAULT_MAX_TOKENS, chat_guide, chatglm3_messages, chatglm3_tools, samplings


def add_route(
    api: FastAPI, engine: Engine, tokenizer: ChatGlmTokenizer, models: Models, prompt_format: PromptFormat
) -> None:
    """Give `api` the route, to a model that is asked in `prompt_format`."""
    is_chat = prompt_format == "chat"

    @api.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response | ChatCompletion:
        """Answer the last message of a conversation."""
        adapter = models.adapter(body.model)
        tools = chatglm3_tools(body)
        if tools and not is_chat:
            raise ApiError(400, "this model knows no tools: it was tuned without roles", param="tools")
        messages = chatglm3_messages(body.messages)
        prompt_ids = await off_loop(request, question_ids, tokenizer, messages, prompt_format, tools)
        room = engine.context_length - len(prompt_ids)
        asked = samplings(
            body,
            max_tokens=body.max_tokens or body.max_completion_tokens or max(1, min(DEFAULT_MAX_TOKENS, room)),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            guide=await off_loop(request, chat_guide, body, tools, is_chat),
            adapter=adapter,
        )
        await engine.prepare(asked[0])
        choices = []
        for index, sampling in enumerate(asked):
            choice = ChatChoice(
                index,
                tokenizer,
                is_chat,
                tools,
                body.stop or (),
                must_call=bool(tools) and body.tool_choice not in (None, "auto"),
                has_logprobs=bool(body.logprobs),
            )
            choices.append((choice, engine.generate(prompt_ids, sampling)))
        # What cannot be written was refused by now, and takes nothing of a key's limits.
        await take_on(len(asked), len(prompt_ids) + sum(sampling.max_tokens for sampling in asked))
        answer = Answer(ChatCompletion, body, len(prompt_ids), choices)
        return await respond(request, answer, body.stream)


class ChatChoice:
    """One choice of a chat completion while it is written."""

    def __init__(
        self,
        index: int,
        tokenizer: ChatGlmTokenizer,
        is_chat: bool,
        tools: Sequence[Any] | None,
        stop: Sequence[str],
        *,
        must_call: bool = False,
        has_logprobs: bool = False,
    ) -> None:
        """`is_chat`: ChatGLM3's metadata comes first, and is taken off. `stop` ends what the client sees. `must_call`:
        a guide has the reply be a call."""
        self.is_over = False
        self._index = index
        self._tokenizer = tokenizer
        self._reply = ReplyStream(tools, tokenizer.control_id(SEPARATOR)) if is_chat else None
        # Not the engine's own stop texts, which see ChatGLM3's metadata line: "\n" would end every reply there.
        self._stop = StopTexts(stop)
        self._content = ""
        self._calls: list[AnsweredTool] = []
        self._begun_call: AnsweredTool | None = None
        """A call whose name was sent, and whose arguments were not."""
        self._must_call = must_call
        self._finish_reason: ChatFinish = "stop"
        self._logprobs = ChoiceLogprobs(content=[]) if has_logprobs else None
        self._in_metadata = is_chat
        self._decoder = TextDecoder(tokenizer)
        self._decoded = 0
        """Characters of the content's tokens so far."""

    def opening(self) -> list[Json]:
        """The role, as OpenAI sends it first."""
        return [self._part({"role": "assistant", "content": ""})]

    def push(self, delta: Delta) -> list[Json]:
        """Take a piece in: the parts of a stream that it makes."""
        text, is_last = delta.text, delta.finish_reason is not None
        if self._reply is not None:
            text = self._reply.push(text, delta.token_ids)
            text += self._reply.finish(is_cut=delta.finish_reason == "length") if is_last else ""
        text = self._stop.push(text, is_last)
        self._content += text
        parts = self._text_parts(text, delta) + self._call_parts()
        if finish_reason := "stop" if self._stop.found else delta.finish_reason:
            self.is_over = True
            self._finish_reason = self._chat_finish(finish_reason)
            parts.append(self._part({}, finish_reason=self._finish_reason))
        return parts

    def whole(self) -> chat_schema.Choice:
        """The choice as one object."""
        content = None if self._calls and not self._content else self._content
        return chat_schema.Choice(
            index=self._index,
            message=AnswerMessage(content=content, tool_calls=self._calls or None),
            logprobs=self._logprobs,
            finish_reason=self._finish_reason,
        )

    def _text_parts(self, text: str, delta: Delta) -> list[Json]:
        if self._logprobs is None:
            return [self._part({"content": text})] if text else []
        found = [
            content_logprob(self._tokenizer, token)
            for token in delta.logprobs
            if token.token_id not in self._tokenizer.stop_ids and self._is_content(token.token_id)
        ]
        self._logprobs.content.extend(found)
        if not text and not found:
            return []
        return [self._part({"content": text}, logprobs=ChoiceLogprobs(content=found).model_dump())]

    def _is_content(self, token_id: int) -> bool:
        """Whether the token comes after the metadata line, and before a stop text."""
        if self._in_metadata:
            self._in_metadata = b"\n" not in token_bytes(self._tokenizer, token_id)
            return False
        begin, text = self._decoded, self._decoder.push([token_id])
        self._decoded += len(text if begin else text.lstrip())  # as the content begins
        return not self._stop.found or begin < len(self._content)

    def _call_parts(self) -> list[Json]:
        """Calls since the last time: the name as soon as it is certain, then the arguments.

        Those are Python until they are complete, so that a call that was cut off has its name alone. Where the model
        need not call, what begins like a call may still turn out to be text.
        """
        if (reply := self._reply) is None:
            return []
        parts = self._name_parts(reply.begun_call) if self._must_call and reply.begun_call else []
        for call in reply.tool_calls[len(self._calls) :]:
            parts += self._name_parts(call["name"])
            arguments = json.dumps(call["parameters"], ensure_ascii=False)
            index = len(self._calls)
            parts.append(self._part({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}))
            self._end_call(arguments)
        if reply.cut_call:
            parts += self._name_parts(reply.cut_call)
            self._end_call("")
        return parts

    def _name_parts(self, name: str) -> list[Json]:
        if self._begun_call:
            return []
        self._begun_call = _called(name, arguments="")
        head = {"index": len(self._calls), **self._begun_call.model_dump()}
        return [self._part({"tool_calls": [head]})]

    def _end_call(self, arguments: str) -> None:
        assert self._begun_call
        self._begun_call.function.arguments = arguments
        self._calls.append(self._begun_call)
        self._begun_call = None

    def _chat_finish(self, finish_reason: FinishReason) -> ChatFinish:
        return "tool_calls" if self._calls and finish_reason == "stop" else finish_reason

    def _part(self, delta: Json, **fields: Any) -> Json:
        return {"index": self._index, "delta": delta, "finish_reason": None, **fields}


def _called(name: str, arguments: str) -> AnsweredTool:
    function = chat_schema.AnsweredFunction(name=name, arguments=arguments)
    return AnsweredTool(id=f"call_{uuid.uuid4().hex}", function=function)
