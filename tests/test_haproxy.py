"""HAProxy as Ray Serve's ingress: what users see, what is open to others, and what its loss costs."""

import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.services import HAPROXY_PROCESS, Service, example_config, haproxy_environment, service
from chatglm3 import load_tokenizer
from serve_app.loopback_haproxy import narrowed
from tests.waiting import wait_for

QUESTION: Any = [{"role": "user", "content": "北京的人口是多少？"}]


@pytest.fixture(scope="module")
def env() -> Iterator[dict[str, str]]:
    with haproxy_environment() as env:
        yield {name: value for name, value in env.items() if name != "RAY_ADDRESS"}  # a Ray of its own


@pytest.fixture(scope="module")
def running(env: dict[str, str]) -> Iterator[Service]:
    config = example_config(1)
    config["applications"][0]["deployments"][0] |= {"max_ongoing_requests": 4, "max_queued_requests": 2}
    with service(config, env) as running:
        wait_for(lambda: running.processes(HAPROXY_PROCESS), 30)
        yield running


@pytest.fixture(scope="module")
def endless(tiny: Path) -> dict[str, Any]:
    """Fields of a stream that only max_tokens ends."""
    return {"stream": True, "logit_bias": {str(token): -100 for token in load_tokenizer(tiny).stop_ids}}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": QUESTION, "max_tokens": 8} | fields


def metrics_of(running: Service) -> str:
    return httpx.get(f"{running.url}/metrics", timeout=60).text


def test_answers_streams_and_refusals_are_as_without_it(running):
    url = f"{running.url}/v1/chat/completions"
    whole = httpx.post(url, json=body(), headers={"X-Request-Id": "mine"}, timeout=60)
    assert whole.json()["usage"]["completion_tokens"] == 8
    assert whole.headers.get_list("x-request-id") == ["mine"]
    streamed = httpx.post(url, json=body(stream=True), timeout=60)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert httpx.post(url, json=body(max_tokens=-1), timeout=60).json()["error"]["param"] == "max_tokens"
    headers = {"content-type": "application/json"}
    too_large = httpx.post(url, content=b" " * 2**21, headers=headers, timeout=60)
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "body_too_large")
    assert httpx.get(f"{running.url}/healthz", timeout=60).json() == {"status": "ok"}


def test_pieces_of_a_stream_come_one_by_one(running, endless):
    fields = body(max_tokens=500, **endless)
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=fields, timeout=60) as stream:
        times = [time.monotonic() for _ in stream.iter_raw()]
    assert len(times) > 100
    assert times[-1] - times[0] > 0.2


def test_a_client_that_leaves_ends_its_request(running, endless):
    fields = body(max_tokens=1500, **endless)
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=fields, timeout=60) as stream:
        assert b'"role":"assistant"' in next(stream.iter_raw())
    aborted = 'chatglm3_request_success_total{finished_reason="abort",model="tiny"} 1.0'
    wait_for(lambda: aborted in metrics_of(running), 30, lambda: metrics_of(running))


def test_beyond_the_queue_the_answer_is_503_with_a_time_to_come_again(running, endless):
    def ask(after_s: float) -> httpx.Response:
        time.sleep(after_s)  # at one moment more are refused: Ray counts those too that are about to get a place
        return client.post(f"{running.url}/v1/chat/completions", json=body(max_tokens=500, **endless))

    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(ask, [0.05 * number for number in range(12)]))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == 12 - 4 - 2
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in refused} == {(503, "1")}


def test_nothing_of_it_but_the_api_is_open_and_that_where_the_config_file_says(running, env):
    [haproxy] = running.processes(HAPROXY_PROCESS)
    listening = {tuple(at.laddr) for at in haproxy.net_connections() if at.status == psutil.CONN_LISTEN}
    ports = {int(env[f"RAY_SERVE_HAPROXY_{name}_PORT"]) for name in ("METRICS", "STATS")}
    assert listening == {("127.0.0.1", port) for port in ports | {httpx.URL(running.url).port}}
    metrics = httpx.get(f"http://127.0.0.1:{env['RAY_SERVE_HAPROXY_METRICS_PORT']}/metrics", timeout=60)
    assert "haproxy_process_uptime_seconds" in metrics.text
    [socket] = Path(env["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"]).glob("*/admin.sock")
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600


def test_a_killed_haproxy_is_back_within_20_seconds(running):
    [victim] = running.processes(HAPROXY_PROCESS)
    victim.kill()
    wait_for(lambda: not running.answers(), 5)
    began = time.monotonic()
    wait_for(running.answers, 60)
    assert time.monotonic() - began < 20
    assert httpx.post(f"{running.url}/v1/chat/completions", json=body(), timeout=60).status_code == 200


def test_a_config_that_is_not_as_it_is_known_is_refused_rather_than_left_open():
    known = "    stats socket /run/a.sock mode 666 level admin\n    bind :9101\n    bind *:8000\n  bind *:8404\n"
    assert narrowed(known) == (
        "    stats socket /run/a.sock mode 600 level admin\n"
        "    bind 127.0.0.1:9101\n    bind *:8000\n  bind 127.0.0.1:8404\n"
    )
    with pytest.raises(SystemExit, match="this version of Ray writes another HAProxy config"):
        narrowed(known.replace("  bind *:8404", "  bind :::8404"))
