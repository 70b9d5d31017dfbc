"""The HTTP API under a real server, asked by the real openai client, by httpx and by bare sockets."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
import torch

from chatglm3 import load_model, load_tokenizer, prompt_ids
from chatglm3.engines import AdapterFolders, Delta, EngineError, Load, Sampling, complete
from chatglm3.engines.transformers_engine import TransformersEngine
from chatglm3.reply import parse_reply
from chatglm3.tokenizer import ChatGlmTokenizer
from serve_app.routes import MAX_BODY_BYTES, make_api
from tests.clockwork import Clockwork
from tests.http_server import served
from tests.waiting import wait_for

QUESTION = [{"role": "user", "content": "北京的人口是多少？"}]
ANSWER_TOKENS = 1500


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> ChatGlmTokenizer:
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def engine(tiny: Path, tokenizer: ChatGlmTokenizer) -> Iterator[TransformersEngine]:
    """The tiny model, made unable to end an answer by itself."""
    model = load_model(tiny, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[list(tokenizer.stop_ids)] = 0
    engine = TransformersEngine(model, tokenizer)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(engine: TransformersEngine, tokenizer: ChatGlmTokenizer) -> Iterator[str]:
    with served(make_api(engine, tokenizer, "tiny", "chat")) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(url: str, **fields) -> httpx.Response:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 8} | fields
    headers = {"content-type": "application/json"}
    return httpx.post(f"{url}/v1/chat/completions", content=json.dumps(body), headers=headers, timeout=60)


def error_of(response: httpx.Response) -> tuple[int, str | None, str | None]:
    """Status, param and code of an answer in the shape of OpenAI's errors."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert error["type"] == ("invalid_request_error" if response.status_code < 500 else "server_error")
    return response.status_code, error["param"], error["code"]


def events_of(response: httpx.Response) -> list[dict]:
    """Events of a stream, which must end with [DONE]."""
    *events, end = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert end == "[DONE]"
    return [json.loads(event) for event in events]


def test_the_answer_is_the_engines_without_the_metadata_line(client, engine, tokenizer):
    ids = prompt_ids(tokenizer, QUESTION)
    raw = asyncio.run(complete(engine, ids, Sampling(max_tokens=30)))
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=30)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == parse_reply(raw.text).content
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 30)
    assert answer.usage.total_tokens == len(ids) + 30


def test_a_stream_is_the_answer_in_pieces(client, url):
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=30)
    chunks = list(client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=30, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 10
    assert all("usage" not in event for event in events_of(ask(url, stream=True)))


def test_usage_comes_last_in_a_stream_that_asks_for_it(url):
    *events, last = events_of(ask(url, stream=True, stream_options={"include_usage": True}))
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8


def test_stop_texts_end_what_the_client_sees(client):
    def content(**fields) -> tuple[str, str]:
        choice = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=40, **fields).choices[0]
        return choice.message.content, choice.finish_reason

    whole, _ = content()
    mark = whole[10:13]
    before = whole[: whole.index(mark)]
    assert content(stop=mark) == (before, "stop")
    assert content(stop=["never", mark, "neither"]) == (before, "stop")
    chunks = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=40, stop=mark, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before
    # The metadata line's own end is none of the client's text.
    assert content(stop="\n")[0] == whole.split("\n")[0]


def test_a_seed_repeats_an_answer(client):
    def content(seed: int) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=QUESTION, max_completion_tokens=20, temperature=1.5, top_p=0.95, seed=seed
        )
        return answer.choices[0].message.content

    assert content(1) == content(1) != content(2)


def test_every_role_and_contents_in_parts_are_taken(url):
    conversation = [
        {"role": "system", "content": "你是助手"},
        {"role": "user", "content": [{"type": "text", "text": "天"}, {"type": "text", "text": "气？"}]},
        {"role": "assistant", "content": "晴"},
        {"role": "tool", "content": "22", "tool_call_id": "call_1"},
    ]
    assert ask(url, messages=conversation).status_code == 200


def test_without_a_limit_the_answer_has_512_tokens_or_what_fits(client, engine, tokenizer):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION)
    assert answer.usage.completion_tokens == 512
    long = "天气" * engine.context_length
    while (length := len(prompt_ids(tokenizer, [{"role": "user", "content": long}]))) > engine.context_length - 20:
        long = long[:-16]
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": long}])
    assert answer.usage.completion_tokens == engine.context_length - length


def test_the_model_is_listed_under_its_name(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("org/other")
    assert missing.value.code == "model_not_found"


def test_the_specification_says_what_is_taken(url):
    schemas = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]
    assert [kind["type"] for kind in schemas["Message"]["properties"]["content"]["anyOf"]] == [
        "string",
        "array",
        "null",
    ]
    assert schemas["ChatRequest"]["additionalProperties"] == {"type": "null"}


TOOL = {"type": "function", "function": {"name": "f"}}
WRONG_FIELDS = [
    ({"tools": []}, "tools", "invalid_value"),
    ({"functions": []}, "functions", "unknown_parameter"),
    ({"Temperature": 0.5}, "Temperature", "unknown_parameter"),
    ({"top-p": 0.5}, "top-p", "unknown_parameter"),
    ({"two\nlines": 1}, "two\\nlines", "unknown_parameter"),
    ({"\ud800": 1}, None, "invalid_value"),
    ({"stream_options": {"include": True}, "stream": True}, "stream_options.include", "unknown_parameter"),
    ({"messages": [{"role": "user", "content": "x", "face": "n"}]}, "messages.0.face", "unknown_parameter"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "invalid_value"),
    ({"tools": [TOOL, TOOL]}, None, "invalid_value"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": "8"}, "max_tokens", "invalid_value"),
    ({"max_tokens": True}, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": 8}, None, "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"seed": 10**40}, "seed", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_value"),
    ({"n": 33}, "n", "invalid_value"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
    ({"stop": ["a", ""]}, "stop.1", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, None, "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hi"}, "messages", "invalid_value"),
    ({"messages": [{"role": "root", "content": "x"}]}, "messages.0.role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages.0", "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "invalid_value"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None, None),
    ({"max_tokens": 10**6}, "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize(("fields", "param", "code"), WRONG_FIELDS, ids=[str(case[0])[:40] for case in WRONG_FIELDS])
def test_a_wrong_field_is_named(url, fields, param, code):
    assert error_of(ask(url, **fields)) == (400, param, code)


def test_a_prompt_that_is_too_long_is_named_as_its_route_has_it(url):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 10**6}
    refused = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert error_of(refused) == (400, "prompt", "context_length_exceeded")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{bad", "invalid_json"),
        (b"\xff", None),
        (b"[" * 100_000, None),
        (b"[]", None),
        (b"", None),
        (b"1" * 5000, None),
    ],
    ids=["bad JSON", "not UTF-8", "deep", "a list", "empty", "a huge number"],
)
def test_a_body_that_is_no_json_object_is_refused(url, body, code):
    headers = {"content-type": "application/json"}
    assert error_of(httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers)) == (400, None, code)


def test_a_body_of_another_type_is_refused(url):
    assert error_of(httpx.post(f"{url}/v1/chat/completions", data={"model": "tiny"})) == (400, None, None)


def test_wrong_models_paths_and_methods_are_refused_in_the_same_shape(url):
    assert error_of(ask(url, model="\ud800")) == (404, "model", "model_not_found")
    assert error_of(ask(url, model="gpt-5")) == (404, "model", "model_not_found")
    assert error_of(httpx.post(f"{url}/v1/embeddings", json={})) == (404, None, None)
    wrong_method = httpx.get(f"{url}/v1/chat/completions")
    assert error_of(wrong_method) == (405, None, None)
    assert wrong_method.headers["allow"] == "POST"


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_a_body_of_100_mb_is_refused_after_little_of_it(url, chunked):
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {100 * 2**20}"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
    piece = b" " * 2**16
    sent = 0
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=5) as connection:
        connection.sendall(head.encode())
        connection.settimeout(0.05)
        answer = b""
        while not answer and sent < 100 * 2**20:
            with suppress(TimeoutError, ConnectionError):
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                sent += len(piece)
            with suppress(TimeoutError):
                answer = connection.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"body_too_large"' in answer
    assert sent < 4 * MAX_BODY_BYTES


def test_a_body_just_under_the_limit_is_read(url):
    blank = " " * (MAX_BODY_BYTES - 200)
    body = json.dumps({"model": "tiny", "messages": QUESTION, "max_tokens": 1}).encode() + blank.encode()
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert response.status_code == 200


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_client_that_goes_away_stops_the_generation(url, engine, stream):
    async def leave() -> float:
        body = {"model": "tiny", "messages": QUESTION, "max_tokens": ANSWER_TOKENS, "stream": stream}
        async with httpx.AsyncClient() as client:
            job = asyncio.create_task(client.post(f"{url}/v1/chat/completions", json=body))
            while not engine.running:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert len(engine.running) == 1
            job.cancel()
        started = time.monotonic()
        while engine.running:
            await asyncio.sleep(0.001)
        return time.monotonic() - started

    assert asyncio.run(leave()) < 5  # to its end it would be 25


def test_a_stop_text_ends_the_generation_too(url, engine):
    mark = ask(url).json()["choices"][0]["message"]["content"][-2:]
    assert ask(url, stop=mark, max_tokens=ANSWER_TOKENS).json()["usage"]["completion_tokens"] <= 8
    wait_for(lambda: engine.running == [], 5)


class FailingEngine:
    """Answers one token, then fails, as an engine that dies does."""

    context_length = 100
    healthy = True
    adapters = AdapterFolders()
    load = Load(running=0, waiting=0, waiting_tokens=0, cache_use=0.0)

    async def prepare(self, sampling: Sampling) -> None:
        """Nothing takes time."""

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        yield Delta("\n天", (1,))
        self.healthy = False
        raise EngineError("the engine died: CUDA error")

    def close(self) -> None:
        """Nothing to free."""


def test_a_dying_engine_is_told_in_every_way_a_client_listens(tokenizer):
    with served(make_api(FailingEngine(), tokenizer, "tiny", "chat")) as url:
        assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
        response = ask(url)
        assert error_of(response) == (503, None, "engine_error")
        assert response.headers["retry-after"] == "1"
        assert error_of(httpx.get(f"{url}/healthz")) == (503, None, "engine_error")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        chunks = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
        assert [next(chunks).choices[0].delta.content for _ in range(2)] == ["", "天"]
        with pytest.raises(openai.APIError, match="the engine died: CUDA error"):
            next(chunks)


class StillbornEngine(FailingEngine):
    """Fails before the first token."""

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        await asyncio.sleep(0.05)
        raise EngineError("the engine died: CUDA error")
        yield


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": QUESTION}),
        ("/v1/chat/completions", {"messages": QUESTION, "n": 2}),
        ("/v1/completions", {"prompt": "天空"}),
        ("/v1/answer", {"question": "天空？", "documents": ["天空是蓝色的。"]}),
    ],
)
def test_a_stream_that_fails_before_its_first_token_has_a_status_to_try_again_by(tokenizer, path, fields):
    with served(make_api(StillbornEngine(), tokenizer, "tiny", "chat")) as url:
        response = httpx.post(f"{url}{path}", json={"model": "tiny", "stream": True, **fields}, timeout=60)
    assert error_of(response) == (503, None, "engine_error")
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_client_that_goes_away_before_the_first_token_stops_the_generation(tokenizer, stream):
    engine = Clockwork("蓝", step_s=30)
    with served(make_api(engine, tokenizer, "tiny", "chat")) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{url}/v1/chat/completions",
                json={"model": "tiny", "messages": QUESTION, "stream": stream},
                timeout=2,
            )
        wait_for(lambda: engine.running == 0, 2)
    assert len(engine.asked) == 1


def test_a_bare_model_is_asked_without_roles_and_its_first_line_is_text(engine, tokenizer):
    with served(make_api(engine, tokenizer, "tiny", "bare")) as url:
        ids = tokenizer.prefix_ids + tokenizer.encode(QUESTION[0]["content"])
        raw = asyncio.run(complete(engine, ids, Sampling(max_tokens=8)))
        assert ask(url).json()["choices"][0]["message"]["content"] == raw.text
        assert error_of(ask(url, messages=QUESTION * 2)) == (400, None, None)
