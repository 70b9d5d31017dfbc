"""Conversations as token ids, in ChatGLM3's chat format or in the predecessor's bare one.

A message is a dict in the official form: {"role", "content"[, "metadata"][, "tools"][, "loss"]}.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from chatglm3.errors import ModelError
from chatglm3.tokenizer import ChatGlmTokenizer

Message = Mapping[str, Any]
PromptFormat = Literal["chat", "bare"]

ROLES = ("system", "user", "assistant", "observation")
TOOLS_CONTENT = "Answer the following questions as best as you can. You have access to the following tools:"
"""The official system message that introduces tools."""
IGNORED = -100
"""Label of a token that the loss leaves out."""


def prompt_ids(
    tokenizer: ChatGlmTokenizer, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> list[int]:
    """Ids that ask for the next reply: the official build_chat_input.

    `tools` are told in the system message, which is put first if there is none.
    ModelError if a message has no known role, or content that is not text.
    """
    ids = list(tokenizer.prefix_ids)
    for message in _with_tools(messages, tools):
        ids += _message_ids(tokenizer, message)
    return [*ids, tokenizer.control_id("<|assistant|>")]


def render(
    tokenizer: ChatGlmTokenizer, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> tuple[list[int], list[bool]]:
    """A whole conversation to learn from: ids, and for each whether it is a target.

    Targets are what the assistant writes: its metadata line, its content, and the token that ends its turn,
    which is the next message's role or, after the last message, `</s>`. A turn with `"loss": False` is none.
    """
    ids, is_target = list(tokenizer.prefix_ids), [False, False]
    learned_before = False
    told = _with_tools(messages, tools)
    for message in told:
        new = _message_ids(tokenizer, message)
        is_learned = message["role"] == "assistant" and message.get("loss", True)
        ids += new
        is_target += [learned_before] + [is_learned] * (len(new) - 1)
        learned_before = is_learned
    if told[-1]["role"] == "assistant":
        ids, is_target = [*ids, tokenizer.eos_id], [*is_target, learned_before]
    return ids, is_target


def example_ids(
    tokenizer: ChatGlmTokenizer, instruction: str, output: str, max_input_length: int, max_output_length: int
) -> tuple[list[int], list[int]]:
    """input_ids and labels of one example in the bare format, cut as the predecessor cuts it.

    Instruction and answer are cut at their ends, to `max_input_length` with the prefix and to
    `max_output_length` with `</s>`; labels are -100 up to the answer.
    """
    prompt = tokenizer.prefix_ids + tokenizer.encode(instruction)[: max(max_input_length - 2, 0)]
    answer = [*tokenizer.encode(output)[: max(max_output_length - 1, 0)], tokenizer.eos_id]
    return prompt + answer, [IGNORED] * len(prompt) + answer


def question_ids(
    tokenizer: ChatGlmTokenizer,
    messages: Sequence[Message],
    prompt_format: PromptFormat,
    tools: Sequence[Any] | None = None,
) -> list[int]:
    """What a model that was tuned in `prompt_format` is asked with; only in the chat format it is told of `tools`.

    ModelError if the format is "bare" and there is anything but one user message: it has no roles.
    """
    if prompt_format == "chat":
        return prompt_ids(tokenizer, messages, tools)
    if len(messages) != 1 or messages[0].get("role") != "user":
        raise ModelError("prompt_format bare takes one user message, without history: tune with prompt_format chat")
    return tokenizer.prefix_ids + tokenizer.encode(_content(messages[0]))


def _with_tools(messages: Sequence[Message], tools: Sequence[Any] | None) -> list[Message]:
    if not messages:
        raise ModelError("messages is empty: send at least one message")
    if not tools:
        return list(messages)
    first, *others = messages
    if first.get("role") != "system":
        return [{"role": "system", "content": TOOLS_CONTENT, "tools": tools}, *messages]
    if "tools" in first:
        raise ModelError("tools are given twice, apart and in the system message: leave one out")
    return [{**first, "tools": tools}, *others]


def _message_ids(tokenizer: ChatGlmTokenizer, message: Message) -> list[int]:
    """Role, metadata line and content of one message; the two texts are encoded apart, as officially."""
    role, metadata, content = message.get("role"), message.get("metadata") or "", _content(message)
    if role not in ROLES:
        raise ModelError(f"role is {role!r}: use one of {', '.join(ROLES)}")
    if not isinstance(metadata, str):
        raise ModelError(f"metadata of a {role} message is {metadata!r}, not text")
    if role == "system" and "tools" in message:
        content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    return [
        tokenizer.control_id(f"<|{role}|>"),
        *tokenizer.encode(f"{metadata}\n"),
        *tokenizer.encode(content),
    ]


def _content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ModelError(f"content of a {message.get('role')} message is {content!r}, not text: send a string")
    return content
