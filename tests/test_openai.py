"""What OpenAI's API can be asked for, asked by the real openai client: choices, logprobs, forms, tools, completions."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import torch
from pydantic import BaseModel

from chatglm3 import load_model, load_tokenizer, parse_reply, prompt_ids
from chatglm3.engines import Delta, Sampling, TokenLogprob, complete
from chatglm3.engines.transformers_engine import TransformersEngine
from chatglm3.reply import SEPARATOR
from chatglm3.stream import StopTexts
from chatglm3.tokenizer import ChatGlmTokenizer
from serve_app.chat import ChatChoice
from serve_app.completions import TextChoice
from serve_app.requests import samplings
from serve_app.routes import make_api
from serve_app.schema import GenerationRequest
from tests.clockwork import Clockwork
from tests.http_server import served

QUESTION: Any = [{"role": "user", "content": "北京的人口是多少？"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "查询城市天气",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> ChatGlmTokenizer:
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def engine(tiny: Path, tokenizer: ChatGlmTokenizer) -> Iterator[TransformersEngine]:
    """The tiny model, made less sure of what it says."""
    model = load_model(tiny, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= 0.2
    engine = TransformersEngine(model, tokenizer)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(engine: TransformersEngine, tokenizer: ChatGlmTokenizer) -> Iterator[str]:
    with served(make_api(engine, tokenizer, "tiny", "chat")) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "max_tokens": 24} | fields)


def test_seeds_go_round_at_the_end_of_their_64_bits(client):
    body = GenerationRequest(model="tiny", n=3, seed=2**63 - 1)
    asked = samplings(body, max_tokens=8, logprobs=None, guide=None, adapter="")
    assert [sampling.seed for sampling in asked] == [2**63 - 1, -(2**63), -(2**63) + 1]
    answers = ask(client, n=3, seed=2**63 - 1, temperature=1.5, max_tokens=12).choices
    assert len({answer.message.content for answer in answers}) == 3


def test_choice_i_of_a_seeded_request_is_what_seed_plus_i_gives(client):
    fields = {"temperature": 1.5, "max_tokens": 16}
    answer = ask(client, n=3, seed=11, **fields)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert texts == [ask(client, seed=seed, **fields).choices[0].message.content for seed in (11, 12, 13)]
    assert answer.usage.completion_tokens <= 48


def test_choices_are_streamed_side_by_side(client):
    form = {"structured_outputs": {"regex": r"\p{Han}{20}"}}
    fields = {"n": 3, "seed": 11, "temperature": 1.5, "max_tokens": 60, "extra_body": form}
    whole = ask(client, **fields)
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True}, **fields)
    assert last.choices == []
    assert last.usage == whole.usage
    parts = [chunk.choices[0] for chunk in chunks]
    for choice in whole.choices:
        own = [part for part in parts if part.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
    order = [part.index for part in parts if part.delta.content]
    assert order != sorted(order)


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_client_that_goes_away_ends_all_its_choices(url, engine, stream):
    form = {"regex": r"\p{Han}{1500}"}
    body = {"model": "tiny", "messages": QUESTION, "n": 3, "max_tokens": 1800, "structured_outputs": form}

    async def leave() -> float:
        async with httpx.AsyncClient() as client:
            job = asyncio.create_task(client.post(f"{url}/v1/chat/completions", json=body | {"stream": stream}))
            while len(engine.running) < 3:
                await asyncio.sleep(0.001)
            job.cancel()
        started = time.monotonic()
        while engine.running:
            await asyncio.sleep(0.001)
        return time.monotonic() - started

    assert asyncio.run(leave()) < 5  # to their ends it would be 25


def test_a_stop_text_ends_one_choice_and_not_the_others(client):
    texts = [choice.message.content for choice in ask(client, n=2, seed=4, temperature=1.5).choices]
    mark = next(text for start in range(len(texts[0])) if (text := texts[0][start : start + 3]) not in texts[1])
    first, second = ask(client, n=2, seed=4, temperature=1.5, stop=mark).choices
    assert first.message.content == texts[0][: texts[0].index(mark)]
    assert second.message.content == texts[1]


def test_logprobs_belong_to_the_content_and_not_to_the_metadata_line(client, engine, tokenizer):
    [choice] = ask(client, logprobs=True, top_logprobs=2).choices
    found = choice.logprobs.content
    assert bytes(byte for token in found for byte in token.bytes).decode().strip() == choice.message.content
    for token in found:  # greedy: each is the most probable one
        assert len(token.top_logprobs) == 2
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)
        assert 0 >= token.logprob >= token.top_logprobs[1].logprob
    chunks = list(ask(client, logprobs=True, top_logprobs=2, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.content] == found
    [choice] = ask(client, logprobs=True).choices
    assert {len(token.top_logprobs) for token in choice.logprobs.content} == {0}
    assert ask(client).choices[0].logprobs is None


def test_bias_and_penalties_reach_the_engine(client, tokenizer):
    forced = tokenizer.encode("\n天")[-1]
    answer = ask(client, logit_bias={str(forced): 100, str(tokenizer.eos_id): -100}, max_tokens=4)
    assert tokenizer.decode([forced] * 4) == answer.choices[0].message.content
    assert ask(client, presence_penalty=2, frequency_penalty=2, max_tokens=60) != ask(client, max_tokens=60)


class City(BaseModel):
    name: Literal["北京", "上海"]
    people: int


def test_an_answer_has_the_form_that_was_asked_for(client, tokenizer):
    for seed in range(4):
        answer = client.chat.completions.parse(
            model="tiny", messages=QUESTION, response_format=City, temperature=1.5, seed=seed
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, City)
    quote = {str(tokenizer.encode('\n"')[-1]): 9}  # lest it writes into one string for ever
    loose = {"response_format": {"type": "json_object"}, "temperature": 0.5, "logit_bias": quote}
    loose |= {"max_tokens": 500, "seed": 1}
    content = ask(client, **loose).choices[0].message.content
    assert isinstance(json.loads(content), dict)
    assert ask(client, response_format={"type": "text"}).choices == ask(client).choices
    for outputs, texts in (({"choice": ["是", "否"]}, {"是", "否"}), ({"regex": "[ab]c"}, {"ac", "bc"})):
        answer = ask(client, temperature=2, n=6, extra_body={"structured_outputs": outputs})
        assert {choice.message.content for choice in answer.choices} <= texts
    grammar = {"grammar": 'start: "x" | "y" start'}
    assert ask(client, extra_body={"structured_outputs": grammar}).choices[0].message.content.strip("y") in ("x", "")
    numbers = {"json": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}}
    answer = ask(client, max_tokens=200, temperature=1, extra_body={"structured_outputs": numbers})
    assert len(json.loads(answer.choices[0].message.content)) == 2


def test_a_streamed_form_is_the_whole_one(client):
    fields = {"response_format": {"type": "json_object"}, "temperature": 0.5, "seed": 1, "max_tokens": 500}
    chunks = ask(client, stream=True, **fields)
    whole = ask(client, **fields).choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_demanded_call_is_one_whatever_the_model_would_say(client, tokenizer, choice):
    quote = {str(tokenizer.encode("\n'")[-1]): 5}  # lest it writes into one string for ever
    tools = [WEATHER] if choice == "required" else [CLOCK, WEATHER]
    for seed in range(3):
        fields = {"tools": tools, "tool_choice": choice, "temperature": 1, "seed": seed, "logit_bias": quote}
        [answer] = ask(client, max_tokens=300, **fields).choices
        [call] = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        assert call.function.name == "get_weather"
        arguments = json.loads(call.function.arguments)
        assert isinstance(arguments.pop("city"), str)
        assert isinstance(arguments.pop("days", 1), int)
        assert arguments == {}


def test_without_a_choice_of_tools_the_model_is_told_of_none(client):
    assert ask(client, tools=[WEATHER], tool_choice="none").choices == ask(client).choices
    told = ask(client, tools=[WEATHER])
    assert told.usage.prompt_tokens > ask(client).usage.prompt_tokens


@pytest.fixture(scope="module")
def official(shared: Path) -> Iterator[tuple[dict, openai.OpenAI]]:
    """A checkpoint of the official code that knows the recorded chats by heart, served."""
    cases = json.loads((shared / "chatglm3/chat_model_cases.json").read_text(encoding="utf-8"))
    folder = shared / "chatglm3/ckpt/full-fp16-bin"
    tokenizer = load_tokenizer(folder)
    engine = TransformersEngine(load_model(folder, dtype=torch.float32), tokenizer)
    with served(make_api(engine, tokenizer, "tiny", "chat")) as url:
        yield cases, client_of(url)
    engine.close()


def openai_form(history: list[dict], query: str, role: str) -> dict[str, Any]:
    """A recorded conversation as a client of OpenAI's API sends it."""
    fields: dict[str, Any] = {"messages": []}
    for message in [*history, {"role": role, "content": query}]:
        if "tools" in message:
            fields["tools"] = [{"type": "function", "function": tool} for tool in message["tools"]]
        reply = parse_reply(f"{message['metadata']}\n{message['content']}", [1]) if message.get("metadata") else None
        if reply and reply.tool_calls:
            [call] = reply.tool_calls
            function = {"name": call["name"], "arguments": json.dumps(call["parameters"])}
            calls = [{"id": "call_1", "type": "function", "function": function}]
            fields["messages"].append({"role": "assistant", "content": None, "tool_calls": calls})
        elif message["role"] == "observation":
            fields["messages"].append({"role": "tool", "tool_call_id": "call_1", "content": message["content"]})
        else:
            fields["messages"].append({"role": message["role"], "content": message["content"]})
    return fields


def test_recorded_chats_with_tools_are_tool_calls_for_a_client(official, shared):
    cases, client = official
    tokenizer = load_tokenizer(shared / "chatglm3/ckpt/full-fp16-bin")
    calls = 0
    for case in cases["chat"]:
        if case["kwargs"]:
            continue  # cut short, at a length of the official code's
        fields = openai_form(case["history"], case["query"], case["role"])
        whole = ask(client, max_tokens=100, **fields)
        assert whole.usage.prompt_tokens == len(case["prompt_ids"])
        [choice] = whole.choices
        expected = case["response"]
        if isinstance(expected, dict) and "parameters" in expected:
            calls += 1
            [call] = choice.message.tool_calls
            said = parse_reply(tokenizer.decode(case["new_ids"][:-1]), [1]).content
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", said or None)
            assert call.function.name == expected["name"]
            assert json.loads(call.function.arguments) == expected["parameters"]
        else:
            content = expected if isinstance(expected, str) else expected["content"]
            assert (choice.finish_reason, choice.message.content) == ("stop", content)
            assert choice.message.tool_calls is None
        assert streamed(client, max_tokens=100, **fields) == told(choice)
    assert calls == 2


def test_a_client_calls_the_tool_and_sends_its_answer_back(official):
    """The whole round: question, call, result, answer, with the client's own objects in the history."""
    _, client = official
    tool = {"name": "get_weather", "description": "查询城市天气"}
    tool["parameters"] = {"type": "object", "properties": {"city": {"description": "城市"}}, "required": ["city"]}
    system = "Answer the following questions as best as you can. You have access to the following tools:"
    messages: list = [{"role": "system", "content": system}, {"role": "user", "content": "北京天气怎么样"}]
    tools = [{"type": "function", "function": tool}]
    asked = ask(client, messages=messages, tools=tools, max_tokens=100).choices[0].message
    messages.append(asked)
    result = '{"temperature": 22, "sky": "晴"}'
    messages.append({"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": result})
    answer = ask(client, messages=messages, tools=tools, max_tokens=100).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("stop", "北京现在是晴天，气温22度。")


def told(choice: Any) -> tuple[str, list[tuple[str, str]], str]:
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    return choice.message.content or "", calls, choice.finish_reason


def streamed(client: openai.OpenAI, **fields: Any) -> tuple[str, list[tuple[str, str]], str]:
    """A stream, put together as clients do it: pieces of calls by their index."""
    content, calls, finish_reason = "", {}, None
    for chunk in ask(client, stream=True, **fields):
        [part] = chunk.choices
        content += part.delta.content or ""
        for call in part.delta.tool_calls or ():
            name, arguments = calls.get(call.index, ("", ""))
            calls[call.index] = (name + (call.function.name or ""), arguments + (call.function.arguments or ""))
            assert (call.id is not None) == (name == "")
        finish_reason = part.finish_reason or finish_reason
    return content, [calls[index] for index in sorted(calls)], finish_reason


class Recorded(Clockwork):
    """Says the text as it is, and not after an empty line of metadata; as much of it as it may."""

    separator_id = 5
    """What SEPARATOR is written with: it is text, unless this is its id."""

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        for number, character in enumerate(self.text, 1):
            token = self.separator_id if self.text.startswith(SEPARATOR, number - 1) else 5
            yield Delta(character, (token,), "length" if number == sampling.max_tokens else None)
        yield Delta("", (2,), "stop")


def test_the_name_of_a_role_that_a_model_quotes_calls_nothing_and_is_seen(tokenizer):
    quoted = f"见{SEPARATOR}send_mail\n```python\ntool_call(to='x')\n```"
    tools = [{"type": "function", "function": {"name": "send_mail", "parameters": {"type": "object"}}}]
    with served(make_api(Recorded(f"\n{quoted}"), tokenizer, "tiny", "chat")) as url:
        client = client_of(url)
        [choice] = ask(client, max_tokens=200, tools=tools).choices
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (quoted, None, "stop")
        body = {"question": "？", "documents": [quoted]}
        answer = httpx.post(f"{url}/v1/answer", json=body, timeout=60).json()
        assert answer["answer"] == quoted


def test_every_recorded_reply_is_told_in_openais_shape(shared, tokenizer):
    """Replies of the official process_response, said by an engine that says what it is given."""
    cases = json.loads((shared / "chatglm3/chat_model_cases.json").read_text(encoding="utf-8"))["process_response"]
    for case in cases:
        fields = openai_form(case["history"][:-1], "q", "user")
        reply = parse_reply(case["output"], fields.get("tools"))
        engine = Recorded(case["output"])
        engine.separator_id = tokenizer.control_id(SEPARATOR)
        with served(make_api(engine, tokenizer, "tiny", "chat")) as url:
            client = client_of(url)
            [choice] = ask(client, max_tokens=100, **fields).choices
            calls = [(call["name"], call["parameters"]) for call in reply.tool_calls]
            if case["output"] != "a<|assistant|>b":  # two plain messages: a stream cannot take the first one back
                assert told(choice)[0] == reply.content
            assert [(name, json.loads(arguments)) for name, arguments in told(choice)[1]] == calls
            assert choice.finish_reason == ("tool_calls" if calls else "stop")
            if "ok" in case and fields.get("tools") and isinstance(case["ok"][0], dict):
                assert calls == [(case["ok"][0]["name"], case["ok"][0]["parameters"])]
            assert streamed(client, max_tokens=100, **fields) == told(choice)


@pytest.mark.parametrize("must_call", [True, False])
def test_the_name_of_a_call_is_sent_as_soon_as_it_is_certain(tokenizer, must_call):
    text = "get_weather\n ```python\ntool_call(city='北京', days=3)\n```"
    choice = ChatChoice(0, tokenizer, True, [WEATHER["function"]], (), must_call=must_call)
    parts = [choice.push(Delta(character, (5,))) for character in text] + [choice.push(Delta("", (2,), "stop"))]
    said = [
        (place, call["function"])
        for place, its_parts in enumerate(parts)
        for part in its_parts
        for call in part["delta"].get("tool_calls", ())
    ]
    assert said == [
        (11 if must_call else len(text), {"name": "get_weather", "arguments": ""}),
        (len(text), {"arguments": '{"city": "北京", "days": 3}'}),
    ]
    assert choice.whole().finish_reason == "tool_calls"


@pytest.mark.parametrize("is_chat", [True, False])
def test_no_logprob_is_of_a_token_behind_a_stop_text(tokenizer, is_chat):
    ids = [token for text in ("北京", "上海", "广州") for token in tokenizer.encode(text)[1:]]
    logprobs = tuple(TokenLogprob(token, -0.5) for token in ids)
    piece = Delta("北京上海广州", tuple(ids), "length", logprobs=logprobs)
    if is_chat:
        choice = ChatChoice(0, tokenizer, False, None, ["上海"], has_logprobs=True)
        [told, _] = choice.push(piece)
        texts = [token["token"] for token in told["logprobs"]["content"]]
    else:
        [told] = TextChoice(0, tokenizer, StopTexts(["上海"]), True).push(piece)
        texts = told["logprobs"]["tokens"]
    assert "".join(texts) == "北京"


@pytest.mark.parametrize(("max_tokens", "calls"), [(7, []), (12, [("get_weather", "")]), (50, [("get_weather", "")])])
def test_a_call_that_is_cut_off_has_its_name_alone_and_is_no_content(tokenizer, max_tokens, calls):
    text = "get_weather\n ```python\ntool_call(city='北京', days=3)\n```"
    with served(make_api(Recorded(text), tokenizer, "tiny", "chat")) as url:
        client = client_of(url)
        fields = {"tools": [WEATHER], "max_tokens": max_tokens, "stop": "tool"}
        [choice] = ask(client, **fields).choices
        assert not choice.message.content
        assert told(choice)[1:] == (calls, "length")
        assert streamed(client, **fields) == ("", calls, "length")
        whole = ask(client, **fields | {"max_tokens": 100}).choices[0]
        assert told(whole)[1:] == ([("get_weather", '{"city": "北京", "days": 3}')], "tool_calls")


def test_an_answer_can_be_sent_back_as_the_client_has_it(client):
    message = ask(client).choices[0].message
    more = [{"role": "user", "name": "bob", "content": "谢谢"}]
    for echoed in (message, message.model_dump(), message.model_dump() | {"annotations": []}):
        assert ask(client, messages=[*QUESTION, echoed, *more], extra_body={"metadata": None, "store": None}).choices
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [called]}]
    turns += [{"role": "tool", "name": "f", "tool_call_id": "1", "content": "1"}]
    assert ask(client, messages=[*QUESTION, *turns]).choices


def test_a_completion_goes_on_with_the_text(client, engine, tokenizer):
    prompt = "天空是"
    ids = tokenizer.prefix_ids + tokenizer.encode(prompt)
    raw = asyncio.run(complete(engine, ids, Sampling(max_tokens=16)))
    answer = client.completions.create(model="tiny", prompt=prompt)
    assert answer.object == "text_completion"
    assert answer.choices[0].text.removeprefix(" ") == raw.text
    assert prompt + answer.choices[0].text == tokenizer.decode(
        [token for token in (*ids[2:], *raw.token_ids) if token not in tokenizer.stop_ids]
    )
    assert answer.choices[0].finish_reason == raw.finish_reason
    assert answer.usage.prompt_tokens == len(ids)
    assert client.completions.create(model="tiny", prompt=ids).choices == answer.choices
    chunks = client.completions.create(model="tiny", prompt=prompt, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_several_prompts_times_n_are_choices_in_order(client):
    fields: Any = {"model": "tiny", "n": 2, "temperature": 1.5, "seed": 3, "max_tokens": 8}
    answer = client.completions.create(prompt=["天空", "草地"], **fields)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    separate = [client.completions.create(prompt=prompt, **fields).choices for prompt in ("天空", "草地")]
    assert [choice.text for choice in answer.choices] == [choice.text for one in separate for choice in one]


def test_a_completion_has_logprobs_in_the_older_shape(client):
    [choice] = client.completions.create(model="tiny", prompt="天空是", logprobs=2, max_tokens=5).choices
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert found.text_offset[0] == 0
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())


class Joined(Clockwork):
    """Its seven tokens come as one piece, as engines join them for many streams."""

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        tokens = load_tokenizer("tiny").encode("北京的人口是多少")[:7]
        logprobs = tuple(TokenLogprob(token, -0.5) for token in tokens)
        yield Delta(load_tokenizer("tiny").decode(tokens), tuple(tokens), "length", logprobs)


def test_tokens_that_come_together_begin_at_places_of_their_own(tokenizer):
    with served(make_api(Joined(""), tokenizer, "tiny", "chat")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        [choice] = client.completions.create(model="tiny", prompt="x", logprobs=0, max_tokens=7).choices
    found = choice.logprobs
    assert len(found.tokens) == 7
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [len("".join(found.tokens[:place])) for place in range(7)]


def test_tokens_are_what_the_model_reads(url, tokenizer):
    def post(path: str, **body: Any) -> Any:
        return httpx.post(f"{url}/{path}", json=body, timeout=60).json()

    text = "北京 sop </s> 👋"
    ids = tokenizer.encode(text)
    found = post("tokenize", prompt=text)
    assert (found["tokens"], found["count"], found["max_model_len"]) == (tokenizer.prefix_ids + ids, len(ids) + 2, 2048)
    assert post("tokenize", prompt=text, add_special_tokens=False, model="tiny")["tokens"] == ids
    assert post("detokenize", tokens=ids) == {"prompt": text}
    assert post("tokenize", messages=QUESTION)["tokens"] == prompt_ids(tokenizer, QUESTION)
    tools = [WEATHER["function"]]
    assert post("tokenize", messages=QUESTION, tools=[WEATHER])["tokens"] == prompt_ids(tokenizer, QUESTION, tools)
    strings = post("tokenize", prompt="a\n", return_token_strs=True)["token_strs"]
    assert "".join(strings) == "[gMASK]sop a\\x0a"


def test_many_streams_at_once_are_those_of_one_at_a_time(client):
    def text(seed: int) -> str:
        chunks = ask(client, temperature=1.2, seed=seed, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(text, range(24)))
    assert together == [text(seed) for seed in range(24)]
    assert len(set(together)) > 12


REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("completions", {"echo": True}, "echo", "False"),
    ("completions", {"suffix": "x"}, "suffix", "None"),
    ("completions", {"best_of": 2}, "best_of", "1"),
    ("completions", {"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ("completions", {"prompt": ["a"] * 20, "n": 2}, None, "prompts times n are 40, and 32 are allowed"),
    ("completions", {"prompt": []}, "prompt", ""),
    ("completions", {"prompt": [2**20]}, None, "outside of the vocabulary"),
    ("chat/completions", {"audio": {}}, "audio", "not supported"),
    ("chat/completions", {"top_logprobs": 2}, None, "top_logprobs needs logprobs"),
    ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ("chat/completions", {"logit_bias": {"x": 1}}, "logit_bias", "pattern"),
    ("chat/completions", {"logit_bias": {"1": 101}}, "logit_bias.1", "100"),
    ("chat/completions", {"logit_bias": {"999999999": 1}}, None, "logit_bias has ids outside of the vocabulary"),
    ("chat/completions", {"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "1024"),
    ("chat/completions", {"presence_penalty": 2.5}, "presence_penalty", "2"),
    ("chat/completions", {"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format", "goes with"),
    (
        "chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}},
        None,
        "the json_schema cannot be followed",
    ),
    ("chat/completions", {"structured_outputs": {}}, "structured_outputs", "exactly one of"),
    ("chat/completions", {"structured_outputs": {"regex": "(?=a)"}}, None, "look-around"),
    ("chat/completions", {"structured_outputs": {"regex": "\ud800"}}, "structured_outputs.regex", "unicode"),
    ("chat/completions", {"structured_outputs": {"choice": ["\ud800"]}}, None, "cannot be followed"),
    ("chat/completions", {"tool_choice": "required"}, None, "tool_choice needs tools"),
    ("chat/completions", {"tools": [CLOCK], "tool_choice": WEATHER}, "tool_choice", ""),
    (
        "chat/completions",
        {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
        "none of the tools",
    ),
    (
        "chat/completions",
        {"tools": [CLOCK], "response_format": {"type": "json_object"}},
        "response_format",
        "together with tools",
    ),
    (
        "chat/completions",
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": 1}}}],
            "tool_choice": "required",
        },
        None,
        "parameters of tool 'f'",
    ),
    ("chat/completions", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", ""),
    (
        "chat/completions",
        {"tools": [CLOCK, {"type": "function", "function": {"name": "f", "strict": True}}]},
        "tools.1.function.strict",
        "is not kept to its schema",
    ),
    (
        "chat/completions",
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "[NaN]"}}],
                }
            ]
        },
        "messages.0.tool_calls.0.function.arguments",
        "NaN",
    ),
    ("chat/completions", {"messages": [{"role": "user", "tool_calls": []}]}, "messages.0.tool_calls", ""),
]


@pytest.mark.parametrize(("path", "fields", "param", "message"), REFUSED, ids=[str(case[1])[:40] for case in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(url, path, fields, param, message):
    body = {"model": "tiny", "max_tokens": 4} | ({"prompt": "a"} if path == "completions" else {"messages": QUESTION})
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{url}/v1/{path}", content=json.dumps(body | fields), headers=headers, timeout=60)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["param"] == param or (error["param"] or "").startswith(f"{param}."), error


def test_a_model_without_roles_is_told_of_no_tools(engine, tokenizer):
    with served(make_api(engine, tokenizer, "tiny", "bare")) as url, pytest.raises(openai.BadRequestError) as refused:
        ask(client_of(url), tools=[WEATHER])
    assert refused.value.param == "tools"
