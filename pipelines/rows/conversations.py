"""Rows of other formats as messages: ChatGLM3's official `conversations`, and the predecessor's instruction rows."""

import ast
import json
import keyword
from collections.abc import Mapping
from typing import Any

import orjson

from chatglm3.chat import Message
from pipelines.rows.lines import RowError

FIELDS = ("conversations", "tools", "system", "history", "instruction", "input", "output")
SPEAKERS = ("system", "user", "assistant", "tool", "observation")


def messages_of(row: Mapping[str, Any]) -> tuple[list[Message], list[Any] | None]:
    """Messages and tools of a `conversations` or an `instruction`/`output` row.

    Raises RowError, which says what is wrong.

    As in the official fine-tuning demo, a `tool` message holds a call and its result: the assistant's turn
    (metadata: the tool's name; content: the call as code) and the observation that answers it.
    """
    _check_writable({name: row.get(name) for name in FIELDS})
    if "conversations" not in row:
        return _instruction(row), None
    turns, tools = row["conversations"], row.get("tools")
    if not isinstance(turns, list) or not turns:
        raise RowError("conversations is not a non-empty list")
    if tools is not None and not isinstance(tools, list):
        raise RowError("tools is not a list")
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        messages += _turn(turn, f"conversations[{number}]")
    if not any(message["role"] == "assistant" and message.get("loss", True) for message in messages):
        raise RowError("conversations has no turn of the assistant to learn from")
    return messages, tools or None


def _check_writable(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        try:
            orjson.dumps(value)
        except TypeError as error:  # half of a surrogate pair, a number of more than 64 bits, a depth of hundreds
            raise RowError(f"{name} cannot be written as JSON again", f": {error}") from None


def _instruction(row: Mapping[str, Any]) -> list[Message]:
    """Alpaca's fields as LLaMA-Factory reads them: `input` below the instruction, `system` and `history` before it."""
    texts = {name: row.get(name) for name in ("instruction", "output")}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise RowError(f"{name} is missing, empty or no text")
    before: list[Message] = []
    if system := _optional_text(row, "system"):
        before.append({"role": "system", "content": system})
    for number, turn in enumerate(_optional_turns(row)):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) and text for text in turn)):
            raise RowError(f"history[{number}] is no pair of a question and its answer")
        before += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    more = _optional_text(row, "input")
    prompt = f"{texts['instruction']}\n{more}" if more else texts["instruction"]
    return [*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": texts["output"]}]


def _optional_text(row: Mapping[str, Any], name: str) -> str:
    """A field that may be missing or blank, which is ""."""
    text = row.get(name)
    if text is not None and not isinstance(text, str):
        raise RowError(f"{name} is no text")
    return text if text and text.strip() else ""


def _optional_turns(row: Mapping[str, Any]) -> list[Any]:
    turns = row.get("history") or []
    if not isinstance(turns, list):
        raise RowError("history is no list of pairs")
    return turns


def _turn(turn: Any, where: str) -> list[Message]:
    if not isinstance(turn, dict) or turn.get("role") not in SPEAKERS:
        raise RowError(f"{where}.role is none of {', '.join(SPEAKERS)}")
    loss = turn.get("loss", True)
    if not isinstance(loss, bool):
        raise RowError(f"{where}.loss is neither true nor false", f": {loss!r}")
    if turn["role"] == "tool":
        return _call(turn, where, loss)
    content, metadata = turn.get("content"), turn.get("metadata") or ""
    if not isinstance(content, str) or not isinstance(metadata, str):
        raise RowError(f"{where}.content is missing or no text")
    is_said = turn["role"] == "user" or (turn["role"] == "assistant" and loss)
    if is_said and not content.strip():
        raise RowError(f"{where}.content is empty")
    if turn["role"] == "assistant":
        silent = {} if loss else {"loss": False}
        return [{"role": "assistant", "content": content, **({"metadata": metadata} if metadata else {}), **silent}]
    return [{"role": turn["role"], "content": content}]


def _call(turn: dict[str, Any], where: str, loss: bool) -> list[Message]:
    name, parameters = turn.get("name"), turn.get("parameters")
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{where}.name is missing or no text")
    if not isinstance(parameters, dict) or not all(k.isidentifier() and not keyword.iskeyword(k) for k in parameters):
        raise RowError(f"{where}.parameters is no object of values with names that code can have")
    if "observation" not in turn:
        raise RowError(f"{where}.observation is missing")
    result = turn["observation"]
    call = {"role": "assistant", "metadata": name, "content": f"```python\n{call_code(parameters)}\n```"}
    observed = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    return [call if loss else {**call, "loss": False}, {"role": "observation", "content": observed}]


def call_code(parameters: Mapping[str, Any]) -> str:
    """A call of a tool as the official models write it: `tool_call(city='北京', days=3)`."""
    named = [ast.keyword(arg=name, value=ast.Constant(value)) for name, value in parameters.items()]
    return ast.unparse(ast.Call(func=ast.Name(id="tool_call"), args=[], keywords=named))
