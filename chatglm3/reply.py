"""Replies of the model, taken apart: whole ones, and ones that are still being written."""

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from chatglm3.stream import held_back

SEPARATOR = "<|assistant|>"
"""Stands between the messages of a reply that says something and then calls a tool."""
DATE_BLANK, DATE = "[[训练时间]]", "2023年"
"""The model writes the blank where it means the end of its training data; the official code fills it in."""


class ToolCall(TypedDict):
    """A tool that the model wants called, in the official form."""

    name: str
    parameters: dict[str, Any]


class AssistantMessage(TypedDict):
    """A message of a reply, as it goes into the conversation's history."""

    role: str
    metadata: str
    content: str


@dataclass(frozen=True)
class Reply:
    """A reply: text for the user, and the first line of the last message, which names a tool or is blank."""

    content: str
    metadata: str
    tool_calls: list[ToolCall]
    messages: list[AssistantMessage]
    """What the official code adds to the history."""


def parse_reply(text: str, tools: Sequence[Any] | None = None) -> Reply:
    """Take a reply in the chat format apart; without the `tools` that the model was told of there are no tool calls.

    `content` is the last message that is not a tool call. A call that is malformed, or whose parameters are not
    plain JSON values, is not a tool call: nothing in a reply is ever executed.
    """
    content, messages = "", [_message(part) for part in text.split(SEPARATOR)]
    tool_calls: list[ToolCall] = []
    for message in messages:
        if not message["metadata"].strip():
            content = message["content"].replace(DATE_BLANK, DATE)
        elif tools and (call := _tool_call(message["metadata"], message["content"])):
            tool_calls.append(call)
        else:
            content = message["content"]
    return Reply(content, messages[-1]["metadata"], tool_calls, messages)


class ReplyStream:
    """A reply in the chat format in, piece by piece; its text for the user out, as early as it is certain.

    Together the pieces are `parse_reply(text, tools).content`. Only where several messages are no tool calls, which
    is not how the model was taught to write, they are all of these messages, and `content` is the last.
    """

    def __init__(self, tools: Sequence[Any] | None = None, separator_id: int | None = None) -> None:
        """With the id of SEPARATOR, only where the model wrote that id does a message end: a document or a tool's
        result may hold the same text, and the model may quote it."""
        self.tool_calls: list[ToolCall] = []
        """Those that are complete; a call shows only at its end."""
        self.begun_call = ""
        """The tool that the message being written names: a call of it, if what follows turns out to be one."""
        self.cut_call = ""
        """The tool of a call that was cut off: it shows with this name, and without arguments."""
        self._tools = tools
        self._separator_id = separator_id
        self._separators = 0
        """Those that the model wrote, and that are still to be found in the text."""
        self._begin("")

    def _begin(self, text: str) -> None:
        self._text = text
        self._metadata: str | None = None
        self._started = False

    def push(self, text: str, ids: Sequence[int] = ()) -> str:
        """What the user may see now. `ids` are the tokens of the text, which may come later than they do."""
        released = ""
        self._text += text
        self._separators += list(ids).count(self._separator_id) if self._separator_id is not None else 0
        while SEPARATOR in self._text and (self._separators or self._separator_id is None):
            self._separators -= 1
            self._text, rest = self._text.split(SEPARATOR, maxsplit=1)
            released += self.finish()
            self._begin(rest)
        return released + self._release(is_whole=False)

    def finish(self, is_cut: bool = False) -> str:
        """The rest: call it once, when the reply is complete, or cut off at its most tokens."""
        return self._release(is_whole=True, is_cut=is_cut and bool(self._tools))

    def _release(self, is_whole: bool, is_cut: bool = False) -> str:
        if self._metadata is None:
            line, newline, rest = self._text.partition("\n")
            if not newline and (is_cut or not is_whole):
                return ""  # a part of a tool's name is none
            self._metadata, self._text = (line, rest) if newline else ("", line)
        is_plain = not self._metadata.strip()
        if self._tools and not is_plain:
            self.begun_call = "" if is_whole else self._metadata.strip()
            if not is_whole:
                return ""
            if call := _tool_call(self._metadata, self._text):
                self.tool_calls.append(call)
            elif is_cut:
                self.cut_call = self._metadata.strip()
            return "" if call or is_cut else self._text
        if is_plain and not self._started:
            self._text = self._text.lstrip()
        end = len(self._text) - (0 if is_whole else held_back(self._text, (SEPARATOR, DATE_BLANK)))
        ready = self._text[:end].rstrip() if is_plain else self._text[:end]
        self._text = self._text[len(ready) :]
        self._started = self._started or bool(ready)
        return ready.replace(DATE_BLANK, DATE) if is_plain else ready


def _message(part: str) -> AssistantMessage:
    metadata, newline, content = part.partition("\n")
    if not newline:
        metadata, content = "", part
    return {
        "role": "assistant",
        "metadata": metadata,
        "content": content if metadata.strip() else content.strip(),
    }


def _tool_call(metadata: str, content: str) -> ToolCall | None:
    """The call in a code block: `tool_call(name=literal, ...)`, or a literal dict of parameters."""
    code = "\n".join(content.split("\n")[1:-1]).strip()
    try:
        node = ast.parse(code, mode="eval").body
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tool_call" and not node.args:
            parameters: Any = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        else:
            parameters = ast.literal_eval(node)
        if not isinstance(parameters, dict) or not all(isinstance(key, str) for key in parameters):
            return None
        # As JSON has them: two surrogates, which its escapes make of an emoji, become one; a lone one is no text.
        parameters = json.loads(json.dumps(parameters, allow_nan=False))
        json.dumps(parameters, ensure_ascii=False).encode()
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return {"name": metadata.strip(), "parameters": parameters}
