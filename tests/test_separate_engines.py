"""Engines in replicas of their own: an answer outlives the engine that began it."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from chatglm3 import load_tokenizer
from tests.random_adapters import KINDS, write_adapter
from tests.serving import replicas, served, write_endless_model
from tests.waiting import wait_for

pytestmark = pytest.mark.slow

APP = f"separate-{os.getpid()}"
LONG = 1000
NO_END = {str(token): -100 for token in load_tokenizer("tiny").stop_ids}


@pytest.fixture(scope="module")
def client(ray_cluster: None, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    model = write_endless_model(tiny, tmp_path_factory.mktemp("model") / "endless")
    shelf = tmp_path_factory.mktemp("shelf")
    write_adapter(model, shelf / "other", seed=1, **KINDS["everything"])
    application = {
        "name": APP,
        "import_path": "serve_app.app:build",
        "args": {"model": str(model), "name": "tiny", "adapter_dir": str(shelf), "separate_engines": True},
        "deployments": [
            {
                "name": "EngineServer",
                "num_replicas": 2,
                "max_ongoing_requests": 2,
                "max_queued_requests": 20,
                "ray_actor_options": {"num_cpus": 0.5},
            }
        ],
    }
    with served({"applications": [application]}, tmp_path_factory.mktemp("serve")) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, number: int, **fields: Any) -> Any:
    question: Any = [{"role": "user", "content": f"北京的人口是多少？{number}"}]
    return client.chat.completions.create(**{"model": "tiny", "messages": question, "max_tokens": 12} | fields)


def streamed(client: openai.OpenAI, number: int, **fields: Any) -> str:
    chunks = ask(client, number, max_tokens=LONG, stream=True, **fields)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def engines() -> set[int]:
    return replicas(APP, "EngineServer")


def kill(victims: set[int]) -> None:
    for victim in victims:
        os.kill(victim, signal.SIGKILL)


# At a temperature even this model may draw the end of its answer.
@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 1.5, "seed": 5, "logit_bias": NO_END}], ids=["greedy", "seeded"]
)
def test_streams_are_whole_although_engines_are_killed_in_the_middle(client, fields):
    undisturbed = [streamed(client, number, **fields) for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        streams = [threads.submit(streamed, client, number, **fields) for number in range(4)]
        time.sleep(0.5)
        assert not any(stream.done() for stream in streams)
        kill({min(engines())})
        assert [stream.result() for stream in streams] == undisturbed
    wait_for(lambda: len(engines()) == 2, 60)


def test_without_any_engine_left_a_stream_waits_for_a_new_one(client):
    undisturbed = streamed(client, 0)
    with ThreadPoolExecutor(1) as thread:
        stream = thread.submit(streamed, client, 0)
        time.sleep(0.5)
        assert not stream.done()
        kill(engines())
        assert stream.result() == undisturbed
    wait_for(lambda: len(engines()) == 2, 60)


def test_a_request_that_kills_engines_comes_to_two_of_them_at_most(client):
    wait_for(lambda: len(engines()) == 2, 60)
    chunks = ask(client, 0, max_tokens=2000, stream=True)
    for _ in range(5):
        next(chunks)
    kill(engines())
    waited = 0.0
    while waited < 3:  # what was on its way comes at once, the rest from a new engine
        asked = time.monotonic()
        next(chunks)
        waited = time.monotonic() - asked
    kill(engines())
    with pytest.raises(openai.APIError) as broken:
        list(chunks)
    assert broken.value.code == "engine_error"
    wait_for(lambda: len(engines()) == 2, 60)


def test_what_an_engine_refuses_keeps_its_name(client):
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(client, 1, max_tokens=9000)
    assert wrong.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        ask(client, 1, model="nobody")
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError):
        ask(client, 1, response_format=schema)


def test_an_adapter_is_asked_by_its_name(client):
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    plain, other, again = [
        ask(client, 1, model=model, logprobs=True).choices[0].logprobs for model in ("tiny", "other", "tiny")
    ]
    assert plain == again != other


def test_clients_that_go_away_free_their_places(client):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 2000, "stream": True}
    for _ in range(12):
        with httpx.stream("POST", f"{client.base_url}chat/completions", json=body, timeout=30) as answer:
            next(answer.iter_bytes())
    time.sleep(1)
    started = time.monotonic()
    ask(client, 2)
    assert time.monotonic() - started < 5  # those 12 would have taken 15


def answers(client: openai.OpenAI) -> bool:
    try:
        return bool(ask(client, 3).choices[0].finish_reason == "length")
    except openai.OpenAIError:
        return False


def test_a_stream_that_meets_a_full_queue_is_refused_with_a_status(client):
    def status(number: int) -> tuple[int, str | None]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": f"{number}"}], "max_tokens": 2000}
        try:
            with httpx.stream(
                "POST", f"{client.base_url}chat/completions", json=body | {"stream": True}, timeout=6
            ) as got:
                if got.status_code == 503:
                    assert json.loads(got.read())["error"]["code"] == "overloaded"
                time.sleep(3)  # holding the place
                return got.status_code, got.headers.get("retry-after")
        except httpx.ReadTimeout:  # it waits in the queue
            return 0, None

    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(status, range(40)))
    assert (200, None) in found
    assert (503, "1") in found
    wait_for(lambda: answers(client), 60)
