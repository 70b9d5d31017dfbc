"""Requests in OpenAI's shape as what the model and the engine understand."""

import json
from collections.abc import Sequence
from typing import Any

from chatglm3.engines import Guide, Sampling
from chatglm3.tool_calls import call_message, calls_grammar
from serve_app.chat_schema import CalledTool, ChatRequest, Message, NamedTool, Tool
from serve_app.errors import ApiError
from serve_app.schema import GenerationRequest, shallow

ROLES = {"tool": "observation", "developer": "system"}
DEFAULT_MAX_TOKENS = 512
"""Of an answer in a chat or from documents, where its request says nothing."""
REPLY_START = "\n"
"""ChatGLM3's metadata line of a reply that calls no tool."""


def chatglm3_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation in ChatGLM3's own form, where a tool's result is an observation."""
    turns: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        if message.content is not None and not (message.tool_calls and not message.content):
            turns.append({"role": ROLES.get(message.role, message.role), "content": message.content})
        for number, call in enumerate(message.tool_calls or ()):
            turns.append(_call(call, f"messages.{place}.tool_calls.{number}.function.arguments"))
    return turns


def chatglm3_tools(body: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the model is told of, in ChatGLM3's own form."""
    if body.tools is None or body.tool_choice == "none":
        return None
    return told(body.tools)


def told(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools in ChatGLM3's own form."""
    return [tool.function.model_dump(exclude={"strict"}, exclude_none=True) for tool in tools]


def chat_guide(body: ChatRequest, tools: Sequence[dict[str, Any]] | None, is_chat: bool) -> Guide | None:
    """What a reply must look like; `is_chat` says that it begins with a line of metadata."""
    guide = guide_of(body, REPLY_START if is_chat else "")
    if tools and guide:
        raise ApiError(
            400,
            'response_format and structured_outputs cannot be kept together with tools; send "tool_choice": "none"',
            param="response_format" if body.response_format else "structured_outputs",
            code="unsupported_value",
        )
    strict = [tool.function.name for tool in body.tools or () if tool.function.strict]
    match body.tool_choice:
        case "required" if tools:
            return Guide("grammar", calls_grammar(tools, strict))
        case NamedTool() as choice if tools:
            named = [tool for tool in tools if tool["name"] == choice.function.name]
            if not named:
                name = choice.function.name
                raise ApiError(400, f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")
            return Guide("grammar", calls_grammar(named, strict))
        case _:
            _refuse_strict(body.tools if tools else None)
            return guide


def _refuse_strict(tools: Sequence[Tool] | None) -> None:
    for place, tool in enumerate(tools or ()):
        if tool.function.strict:
            raise ApiError(
                400,
                "a call that the model may make or not is not kept to its schema; leave strict out, or send "
                '"tool_choice": "required" or one by name',
                param=f"tools.{place}.function.strict",
                code="unsupported_value",
            )


def guide_of(body: GenerationRequest, after: str) -> Guide | None:
    """What an answer that begins with `after` must look like by response_format or structured_outputs."""
    if (form := body.response_format) and form.type != "text":
        if form.json_schema is None:
            return Guide("json_object", after=after)
        return Guide("json_schema", json.dumps(form.json_schema.json_schema), after)
    if (outputs := body.structured_outputs) is None:
        return None
    if outputs.json_schema is not None:
        return Guide("json_schema", json.dumps(outputs.json_schema), after)
    if outputs.regex is not None:
        return Guide("regex", outputs.regex, after)
    if outputs.choice is not None:
        return Guide("grammar", f"start: {' | '.join(map(json.dumps, outputs.choice))}", after)
    return Guide("grammar", outputs.grammar or "", after)


def samplings(
    body: GenerationRequest, *, max_tokens: int, logprobs: int | None, guide: Guide | None, adapter: str
) -> list[Sampling]:
    """What each choice is asked of the engine."""
    return [
        Sampling(
            max_tokens=max_tokens,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            seed=None if body.seed is None else _wrapped(body.seed + choice),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
            logprobs=logprobs,
            guide=guide,
            adapter=adapter,
        )
        for choice in range(body.n or 1)
    ]


def _wrapped(seed: int) -> int:
    """A seed of 64 bits, as engines hold it: behind the largest comes the smallest."""
    return (seed + 2**63) % 2**64 - 2**63


def _call(call: CalledTool, place: str) -> dict[str, str]:
    try:
        arguments = json.loads(call.function.arguments, parse_constant=_refuse)
        if not isinstance(arguments, dict):
            raise ValueError("it is no JSON object")
        return call_message(call.function.name, shallow(arguments))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{place}: {error}", param=place, code="invalid_value") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
