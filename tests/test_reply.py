"""Replies against the official process_response, whole and streamed."""

import json
import random
from pathlib import Path

import pytest

from chatglm3 import load_tokenizer, parse_reply
from chatglm3.reply import ReplyStream
from chatglm3.stream import TextStream

TOOLS = [{"name": "get_weather"}]


@pytest.fixture(scope="module")
def cases(shared: Path) -> dict:
    return json.loads((shared / "chatglm3/chat_model_cases.json").read_text(encoding="utf-8"))


def told_tools(history: list[dict]) -> list | None:
    """The official rule: the first message is a system message with tools."""
    return history[0].get("tools") if history and history[0]["role"] == "system" else None


def test_every_reply_is_taken_apart_as_the_official_code_does(cases):
    """Where it raises SyntaxError (a call that is no expression), we see no tool call."""
    for case in cases["process_response"]:
        tools = told_tools(case["history"])
        reply = parse_reply(case["output"], tools)
        if "error" in case:
            assert case["error"] == "SyntaxError"
            assert reply.tool_calls == []
            assert f"{reply.metadata}\n{reply.content}" == case["output"]
            continue
        response, history = case["ok"]
        assert case["history"] + reply.messages == history
        assert reply.metadata == history[-1]["metadata"]
        if isinstance(response, str):
            assert (reply.content, reply.tool_calls) == (response, [])
        elif tools:
            assert reply.tool_calls == [response]
        else:
            assert {"name": reply.metadata.strip(), "content": reply.content} == response


def test_the_recorded_chats_end_in_the_official_response_and_history(shared, cases):
    """From the ids that the model made to what its user reads, whole and streamed; chat() leaves out the last id."""
    tokenizer = load_tokenizer(shared / "chatglm3/ckpt/full-fp16-bin")
    for case in cases["chat"]:
        ids, tools = case["new_ids"][:-1], told_tools(case["history"])
        reply = parse_reply(tokenizer.decode(ids), tools)
        assert case["callers_history_after"] + reply.messages == case["returned_history"]
        if isinstance(case["response"], str):
            assert reply.content == case["response"]
        elif "parameters" in case["response"]:
            assert reply.tool_calls == [case["response"]]
        else:
            assert {"name": reply.metadata.strip(), "content": reply.content} == case["response"]
        text, stream = TextStream(tokenizer), ReplyStream(tools)
        deltas = [stream.push(text.push([token_id])) for token_id in ids]
        assert "".join(deltas) + stream.push(text.finish()) + stream.finish() == reply.content
        assert stream.tool_calls == reply.tool_calls


def test_streamed_chats_yield_what_stream_chat_yields(shared, cases):
    """Growing text; the official code ends with an error in a tool call, and shows its name as text before that."""
    tokenizer = load_tokenizer(shared / "chatglm3/ckpt/full-fp16-bin")
    new_ids = {(len(case["history"]), case["query"]): case["new_ids"] for case in cases["chat"]}
    for case in cases["stream"]:
        tools = told_tools(case["history"])
        text, stream = TextStream(tokenizer), ReplyStream(tools)
        read = [stream.push(text.push([token_id])) for token_id in new_ids[len(case["history"]), case["query"]][:-1]]
        whole = "".join(read) + stream.push(text.finish()) + stream.finish()
        assert whole == ("" if "error" in case else case["yields"][-1])
        if "error" not in case:
            assert {"".join(read[:end]) for end in range(1, len(read) + 1)} <= {"", *case["yields"]}


def test_what_is_said_beside_a_tool_call_is_the_content():
    call = "get_weather\n ```python\ntool_call(city='上海', days=-3)\n```"
    reply = parse_reply(f"\n 我来查询。<|assistant|>{call}", TOOLS)
    assert reply.content == "我来查询。"
    assert reply.tool_calls == [{"name": "get_weather", "parameters": {"city": "上海", "days": -3}}]
    assert parse_reply(call, TOOLS).content == ""


def test_an_emoji_that_is_written_as_json_escapes_it_is_an_emoji():
    reply = parse_reply("f\n```python\ntool_call(text='\\ud83d\\ude00')\n```", TOOLS)
    assert reply.tool_calls == [{"name": "f", "parameters": {"text": "😀"}}]


@pytest.mark.parametrize(
    "code",
    [
        "tool_call(text='\\ud83d')",
        "tool_call(city=__import__('os').getcwd())",
        "__import__('os').system('true')",
        "tool_call('positional')",
        "tool_call(**{'city': 'x'})",
        "other_call(city='x')",
        "tool_call(city=name)",
        "tool_call(city={1, 2})",
        "tool_call(city=b'x')",
        "tool_call(city=1e999)",
        "[1, 2]",
        "{1: 2}",
        "tool_call(city=\0)",
        "(" * 5000,
        "-" * 5000 + "1",
        "",
    ],
)
def test_only_calls_with_literal_json_values_are_tool_calls(code):
    text = f"get_weather\n```python\n{code}\n```"
    reply = parse_reply(text, TOOLS)
    assert reply.tool_calls == []
    assert f"{reply.metadata}\n{reply.content}" == text


def streamed(text: str, tools: list | None, generator: random.Random) -> str:
    stream, result, start = ReplyStream(tools), "", 0
    while start < len(text):
        size = generator.randrange(1, 8)
        result += stream.push(text[start : start + size])
        start += size
    return result + stream.finish()


def recorded(cases: dict) -> list[tuple[str, list | None]]:
    outputs = [(case["output"], told_tools(case["history"])) for case in cases["process_response"]]
    for case in cases["chat"]:
        last = case["returned_history"][-1]
        outputs.append((f"{last['metadata']}\n{last['content']}", told_tools(case["history"])))
    return outputs


def test_streamed_replies_are_the_whole_ones(cases):
    generator = random.Random(0)
    for text, tools in recorded(cases):
        if text == "a<|assistant|>b":
            continue
        for _ in range(50):
            assert streamed(text, tools, generator) == parse_reply(text, tools).content


def test_streamed_replies_are_the_whole_ones_for_any_text():
    generator = random.Random(1)
    parts = ["\n", " ", "  ", "a", "你好", "<|assist", "ant|>", "[[训练", "时间]]", "[[训练时间]]", "<", "\u3000", "]"]
    for _ in range(5000):
        text = "".join(generator.choices(parts, k=generator.randrange(9)))
        if "<|assistant|>" in text:
            continue
        tools = generator.choice([None, TOOLS])
        assert streamed(text, tools, generator) == parse_reply(text, tools).content


def test_several_plain_messages_are_all_streamed_and_the_last_is_the_content():
    assert streamed("\n a<|assistant|>\n b", None, random.Random(0)) == "ab"
    assert parse_reply("\n a<|assistant|>\n b").content == "b"


def test_text_is_streamed_as_early_as_it_is_certain():
    stream = ReplyStream()
    pieces = ["\n", " 你", "好", " \n", "<|as", "sert|> [[训练", "时间]]。", "\n"]
    deltas = ["", "你", "好", "", "", " \n<|assert|>", " 2023年。", ""]
    assert [stream.push(piece) for piece in pieces] == deltas
    assert stream.finish() == ""
