"""Requests made to do harm: each is refused at once, and the engine goes on as if it had not been there."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from chatglm3 import load_model, load_tokenizer
from chatglm3.engines.transformers_engine import TransformersEngine
from serve_app.routes import make_api
from tests.http_server import served

QUESTION: Any = [{"role": "user", "content": "北京的人口是多少？"}]
HEADERS = {"content-type": "application/json"}
ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/answer", "/tokenize", "/detokenize"]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(load_model(tiny, dtype=torch.float32), load_tokenizer(tiny))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(engine: TransformersEngine, tiny: Path) -> Iterator[str]:
    with served(make_api(engine, load_tokenizer(tiny), "tiny", "chat")) as url:
        yield url


@pytest.fixture(autouse=True)
def the_engine_is_as_before(url: str) -> Iterator[None]:
    def answer() -> str:
        body = {"model": "tiny", "messages": QUESTION, "max_tokens": 8}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        return answer.json()["choices"][0]["message"]["content"]

    before = answer()
    yield
    assert answer() == before


def refused(url: str, path: str, body: bytes, within_s: float = 5) -> str:
    """The message of the refusal, which must come in time."""
    started = time.monotonic()
    response = httpx.post(f"{url}{path}", content=body, headers=HEADERS, timeout=30)
    assert time.monotonic() - started < within_s
    assert 400 <= response.status_code < 500, response.text
    message = response.json()["error"]["message"]
    assert "\n" not in message
    assert len(message) < 2000
    return message


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"model":' * 100_000,
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "tiny", "x": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        b"NaN",
        b'{"model": NaN, "temperature": Infinity}',
        b'{"model": "\\ud800"}',
        b'{"model": "\xff\xfe"}',
        b"\x00" * 1000,
        b'{"model": "\x00\x01"}',
        b'{"model": ' + b"9" * 100_000 + b"}",
        b'{"model": 1e999}',
        b'"' + b"x" * 2**19 + b'"',
        b"{" + b",".join(b'"%d": 1' % number for number in range(60_000)) + b"}",
    ],
    ids=["brackets", "objects", "closed", "deep", "nan", "inf", "surrogate", "utf-8", "zeros", "control", "digits",
         "overflow", "a string", "fields"],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused_on_every_route(url, path, body):
    refused(url, path, body)


def chat(**fields: Any) -> tuple[str, bytes]:
    return "/v1/chat/completions", json.dumps({"model": "tiny", "messages": QUESTION} | fields).encode()


def schema(content: Any) -> tuple[str, bytes]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": content}})


def guided(**outputs: Any) -> tuple[str, bytes]:
    return chat(structured_outputs=outputs)


def nested(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        inner = {"type": "object", "properties": {"a": inner}}
    return inner


def tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f"} | function}]


def call(arguments: str) -> list[dict[str, Any]]:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    return [*QUESTION, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "1"}]


POISON = {
    "a billion tokens of bias": chat(logit_bias={str(token): 1 for token in range(70_000)}),
    "bias of no token": chat(logit_bias={"999999999": 100}),
    "bias of nan": ("/v1/chat/completions", b'{"model": "tiny", "messages": [], "logit_bias": {"1": NaN}}'),
    "long stop texts": chat(stop=["x" * 200_000] * 4),
    "many messages": chat(messages=QUESTION * 15_000),
    "a long text": chat(messages=[{"role": "user", "content": "a" * 10**6}]),
    "a long Chinese text": chat(messages=[{"role": "user", "content": "天" * 160_000}]),
    "surrogates": chat(messages=[{"role": "user", "content": "\ud800" * 1000}]),
    "many choices": chat(n=10**9),
    "many tokens": chat(max_tokens=10**18),
    "deep schema": schema(nested(200)),
    "deep schema within limits": schema(nested(60) | {"not": 1}),
    "items": schema({"type": "array", "minItems": 10**9}),
    "items and fewer": schema({"type": "array", "minItems": 10**9, "default": {"minItems": -(10**9)}}),
    "items as a float": schema({"type": "array", "maxItems": 1e15}),
    "many items": schema({"anyOf": [{"type": "array", "minItems": 9999, "maxItems": 9999}] * 1000}),
    "multiples": schema({"type": "integer", "multipleOf": 982451653}),
    "a schema elsewhere": schema({"$ref": "http://127.0.0.1:1/x"}),
    "a file": schema({"$ref": "file:///etc/passwd"}),
    "products of schemas": schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in (1, 2)]} for i in range(20)]}
    ),
    "intersected patterns": schema({"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijkl"]}),
    "a large schema": schema({"enum": ["x" * 70_000]}),
    "a regex of nested counts": guided(regex="(((((.{1,9}){1,9}){1,9}){1,9}){1,9})"),
    "a regex of brackets": guided(regex="(" * 60_000),
    "a regex that looks around": guided(regex="(?=a)(?!b)"),
    "a regex that looks back": guided(regex=r"(a*)*\1"),
    "a regex of a large count": guided(regex="x{99999999999}"),
    "a grammar of brackets": guided(grammar="start: " + "(" * 5000 + '"a"' + ")" * 5000),
    "a grammar with a schema in it": guided(grammar='start: %json {"minItems": 1000000000}'),
    "a grammar that includes": guided(grammar="start: @other"),
    "a tool of many levels": chat(tools=tool(parameters=nested(200))),
    "a tool whose grammar is too large": chat(
        tools=tool(parameters={"properties": {f"p{i}": {"enum": ["x" * 200]} for i in range(500)}}),
        tool_choice="required",
    ),
    "many tools": chat(tools=tool() * 1000),
    "deep arguments": chat(messages=call("[" * 100_000)),
    "nested arguments": chat(messages=call('{"a":' * 500 + "1" + "}" * 500)),
    "arguments of nan": chat(messages=call('{"a": NaN}')),
    "ids of no token": ("/v1/completions", json.dumps({"model": "tiny", "prompt": [2**30]}).encode()),
    "many prompts": ("/v1/completions", json.dumps({"model": "tiny", "prompt": ["a"] * 10_000}).encode()),
    "many ids": ("/v1/completions", json.dumps({"model": "tiny", "prompt": [5] * 250_000}).encode()),
    "negative ids": ("/detokenize", b'{"tokens": [-1]}'),
}  # fmt: skip


@pytest.mark.parametrize("name", POISON)
def test_a_request_made_to_do_harm_is_refused_at_once(url, name):
    refused(url, *POISON[name])


def test_what_costs_much_but_can_be_done_is_done(url):
    """Guides at their limits: the answer comes, or is cut off at its max_tokens."""
    for path, body in (
        schema({"type": "array", "items": {"type": "integer"}, "maxItems": 9000}),
        schema(nested(30)),
        guided(regex="(a|b|ab)*c{1,900}"),
        guided(regex="[^a]{60000}"),
        guided(choice=[f"choice {number}" for number in range(1000)]),
        chat(tools=tool(parameters=nested(4)), tool_choice="required"),
    ):
        short = json.dumps(json.loads(body) | {"max_tokens": 6}).encode()
        started = time.monotonic()
        response = httpx.post(f"{url}{path}", content=short, headers=HEADERS, timeout=30)
        assert response.status_code == 200, response.text
        assert time.monotonic() - started < 5


def test_a_guide_that_fails_on_the_way_fails_its_own_request(url):
    path, body = schema({"type": "object", "properties": {f"v{i}": {} for i in range(3000)}})
    assert "cannot be followed" in refused(url, path, json.dumps(json.loads(body) | {"max_tokens": 400}).encode())
    streamed = json.dumps(json.loads(body) | {"max_tokens": 400, "stream": True}).encode()
    events = httpx.post(f"{url}{path}", content=streamed, headers=HEADERS, timeout=60).text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "invalid_request_error"
