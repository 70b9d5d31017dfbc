"""Who gets the rows of an engine: one request's choices half of them, one key's answers as many as it may have."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from chatglm3 import load_model, load_tokenizer
from chatglm3.engines.transformers_engine import TransformersEngine
from serve_app.keys import Limits, add_key
from tests.test_guard import bearer, code_of, run, served

ENDLESS = {str(token): -100 for token in load_tokenizer("tiny").stop_ids}


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(load_model("tiny", dtype=torch.float32), load_tokenizer("tiny"), max_batch=4)
    yield engine
    engine.close()


def body(max_tokens: int, **fields: Any) -> dict[str, Any]:
    question = [{"role": "user", "content": "北京的人口是多少？"}]
    return {"model": "tiny", "messages": question, "max_tokens": max_tokens, "logit_bias": ENDLESS} | fields


async def post(client: httpx.AsyncClient, key: str | None = None, **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=body(**fields), headers=bearer(key))


async def looks(engine: TransformersEngine, job: asyncio.Task[Any]) -> AsyncIterator[int]:
    while not job.done():
        yield len(engine.running)
        await asyncio.sleep(0.005)


def test_many_choices_of_one_request_leave_half_of_the_engine_to_others(engine):
    async def both(client: httpx.AsyncClient) -> tuple[list[int], dict[str, Any]]:
        many = asyncio.create_task(post(client, max_tokens=300, n=8, temperature=1.0, seed=1))
        rows = [number async for number in looks(engine, asyncio.create_task(asyncio.sleep(1)))]
        assert (await post(client, max_tokens=3)).status_code == 200
        assert not many.done()
        return rows, (await many).json()

    rows, answer = run(served(engine), both)
    assert max(rows) == 2
    assert [len(choice["message"]["content"]) > 0 for choice in answer["choices"]] == [True] * 8
    assert answer["usage"]["completion_tokens"] == 8 * 300


def test_a_key_has_no_more_answers_written_at_once_than_it_may(engine, tmp_path: Path):
    busy = add_key(tmp_path / "keys", "busy", Limits(answers_at_once=2))
    other = add_key(tmp_path / "keys", "other", Limits())
    api = served(engine, api_keys=str(tmp_path / "keys"), answers_at_once=3)

    async def flood(client: httpx.AsyncClient) -> list[httpx.Response]:
        long = [asyncio.create_task(post(client, busy, max_tokens=600)) for _ in range(20)]
        await asyncio.sleep(0.2)
        assert (await post(client, other, max_tokens=3)).status_code == 200
        assert sum(not job.done() for job in long) == 2
        few = [await post(client, other, max_tokens=3, n=n) for n in (4, 3)]
        return [*await asyncio.gather(*long), *few]

    *flooding, too_many, few = run(api, flood)
    assert sorted(answer.status_code for answer in flooding) == [200] * 2 + [429] * 18
    refused = next(answer for answer in flooding if answer.status_code == 429)
    assert code_of(refused) == (429, "answers_at_once_exceeded")
    assert refused.headers["retry-after"] == "1"
    assert code_of(too_many) == (400, "answers_at_once_exceeded")  # its limit is the server's, and no wait helps
    assert few.status_code == 200
    again = run(api, lambda client: post(client, busy, max_tokens=3, n=2))
    assert again.status_code == 200  # its places are free again


def test_what_is_refused_uses_up_nothing(engine, tmp_path: Path):
    key = add_key(tmp_path / "keys", "a", Limits(tokens_per_minute=10_000, answers_at_once=2))
    api = served(engine, api_keys=str(tmp_path / "keys"), audit_log=str(tmp_path / "audit"))

    async def beside_a_long_answer(client: httpx.AsyncClient) -> list[httpx.Response]:
        long = asyncio.create_task(post(client, key, max_tokens=300))
        await asyncio.sleep(0.1)
        refused = [await post(client, key, max_tokens=3, n=n) for n in (2, 2, 2, 3)]
        return [*refused, await long, await post(client, key, max_tokens=3)]

    *refused, long, last = run(api, beside_a_long_answer)
    assert [answer.status_code for answer in refused] == [429, 429, 429, 400]
    entries = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [(e["prompt_tokens"], e["rejected"]) for e in entries[:4]] == [(0, "answers_at_once_exceeded")] * 4
    used = long.json()["usage"]["total_tokens"] + last.json()["usage"]["total_tokens"]
    left = int(last.headers["x-ratelimit-remaining-tokens"])
    assert 0 <= left - (10_000 - used) < 1000  # it fills up meanwhile
    text = run(api, lambda client: client.get("/metrics", headers=bearer(key))).text
    read = long.json()["usage"]["prompt_tokens"] + last.json()["usage"]["prompt_tokens"]
    assert f'prompt_tokens_total{{model="tiny"}} {read}.0' in text
