"""An engine that dies by itself, under Ray Serve: its clients are told, and a new one takes its place."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest

from tests.poisoned_engine import POISON
from tests.serving import replicas, served, write_endless_model
from tests.waiting import wait_for

pytestmark = pytest.mark.slow

APP = f"dying-{os.getpid()}"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "北京的人口是多少？"}]}


@pytest.fixture(scope="module")
def url(ray_cluster: None, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = write_endless_model(tiny, tmp_path_factory.mktemp("model") / "endless")
    args = {"model": str(model), "name": "tiny"}
    application = {"name": APP, "import_path": "tests.poisoned_engine:build", "args": args}
    with served({"applications": [application]}, tmp_path_factory.mktemp("serve")) as url:
        yield url


def last_event(url: str, begun: Barrier) -> Any:
    """The last event of a long stream. An error of the transport is raised."""
    body = BODY | {"max_tokens": 1500, "stream": True}
    last = ""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        for number, line in enumerate(filter(None, answer.iter_lines())):
            if number == 3:
                begun.wait(60)
            last = line
    return json.loads(last.removeprefix("data: "))


def test_open_streams_end_with_an_error_event_and_a_new_replica_answers(url):
    [first] = replicas(APP)
    begun = Barrier(5)
    with ThreadPoolExecutor(4) as threads:
        streams = [threads.submit(last_event, url, begun) for _ in range(4)]
        begun.wait(60)
        poison = httpx.post(f"{url}/v1/chat/completions", json=BODY | {"max_tokens": POISON}, timeout=60)
        endings = [stream.result() for stream in streams]
    assert [ending["error"]["code"] for ending in endings] == ["engine_error"] * 4
    assert "the engine died: RuntimeError: CUDA error" in endings[0]["error"]["message"]
    assert (poison.status_code, poison.headers["retry-after"]) == (503, "1")  # it had no token yet
    wait_for(lambda: replicas(APP) - {first}, 60)
    wait_for(lambda: httpx.get(f"{url}/healthz", timeout=60).status_code == 200, 60)
    assert httpx.post(f"{url}/v1/chat/completions", json=BODY | {"max_tokens": 3}, timeout=60).status_code == 200
