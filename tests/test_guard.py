"""Who is let in: keys and their file, limits, full servers, deadlines, browsers, and what is taken down of it all."""

import asyncio
import hashlib
import json
import socket
import stat
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from chatglm3 import load_tokenizer
from chatglm3.engines import Delta, Engine, Sampling
from chatglm3.engines.request_check import check_request
from cluster.errors import StageError
from serve_app import front, keys
from serve_app.front import FrontArgs
from serve_app.keys import KeyFile, Limits, add_key
from serve_app.ledger import LocalLedger, Standing
from serve_app.metering import MeteredEngine
from serve_app.metrics import Metrics
from serve_app.routes import make_api
from serve_app.shared_ledger import SharedLedger
from tests import http_server
from tests.clockwork import Clockwork
from tests.waiting import wait_for

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "机密的问题"}]}


def clockwork(step_s: float = 0.0) -> Clockwork:
    return Clockwork("机密", step_s)


class Flood(Clockwork):
    """Writes 30 kB a token: soon more than the buffers between a server and its client hold."""

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        async with aclosing(super().generate(prompt_ids, sampling)) as deltas:
            async for delta in deltas:
                yield replace(delta, text=delta.text * 10_000)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def served(engine: Any, ledger: LocalLedger | None = None, **args: Any) -> FastAPI:
    """The whole API over an engine, as `args` want it guarded."""
    settings, measured = FrontArgs(**args), Metrics("tiny")
    metered: Engine = MeteredEngine(engine, measured, settings.max_prompt_tokens)
    limits = {"max_body_bytes": settings.max_body_bytes, "max_prompt_tokens": settings.max_prompt_tokens}
    api = make_api(metered, load_tokenizer("tiny"), "tiny", "chat", on_answer=measured.answered, **limits)
    front.install(api, settings, metered, measured, ledger=ledger)
    return api


def run(api: FastAPI, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def session() -> Any:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await work(client)

    return asyncio.run(session())


def ask(api: FastAPI, key: str | None = None, **fields: Any) -> httpx.Response:
    return run(api, lambda client: client.post("/v1/chat/completions", json=CHAT | fields, headers=bearer(key)))


def get(api: FastAPI, path: str, **headers: Any) -> httpx.Response:
    return run(api, lambda client: client.get(path, headers=headers))


def bearer(key: str | None) -> dict[str, bytes]:
    return {"Authorization": f"Bearer {key}".encode("latin-1")} if key else {}


def code_of(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


# Keys


def test_a_key_is_shown_once_and_only_its_hash_is_kept(key_file):
    key = add_key(key_file, "alice", Limits(tokens_per_minute=100))
    assert key.startswith("glm3-")
    assert len(key) == 48
    assert key_file.read_text() == f"alice {hashlib.sha256(key.encode()).hexdigest()} tokens_per_minute=100\n"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    other = add_key(key_file, "bob", Limits())
    known = KeyFile(key_file, Limits(requests_per_minute=9))
    assert (known.find(key).name, known.find(key).limits) == ("alice", Limits(9, 100))
    assert (known.find(other).name, known.find(other).limits) == ("bob", Limits(9, 0))
    assert known.find(key + "x") is None
    with pytest.raises(StageError, match="has a key for alice already; remove its line first"):
        add_key(key_file, "alice", Limits())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alice", "line 1 is not `NAME SHA256`; python -m serve_app keys add NAME writes such lines"),
        ("# c\n\nalice secret", "line 3 is not `NAME SHA256`"),
        (
            f"a {'0' * 64} fast",
            "line 1: 'fast' is no limit; use one of requests_per_minute=N, tokens_per_minute=N, answers",
        ),
        (f"a {'0' * 64}\na {'1' * 64}", "names a twice; remove one of its lines"),
        (None, r"cannot be read \(No such file or directory\); python -m serve_app keys add NAME --file .* makes one"),
    ],
)
def test_a_wrong_file_is_refused_at_the_start_with_its_line(key_file, text, message):
    if text is not None:
        key_file.write_text(text)
    with pytest.raises(StageError, match=message):
        KeyFile(key_file, Limits())


def test_the_file_is_read_again_when_it_changes_and_a_damaged_one_is_not(key_file, monkeypatch):
    monkeypatch.setattr(keys, "CHECK_EVERY_S", 0.0)
    alice = add_key(key_file, "alice", Limits())
    known = KeyFile(key_file, Limits())
    bob = add_key(key_file, "bob", Limits())
    assert known.find(bob).name == "bob"
    key_file.write_text("".join(line for line in key_file.read_text().splitlines(True) if "bob" in line))
    assert known.find(alice) is None
    key_file.write_text("???")
    assert known.find(bob).name == "bob"
    key_file.unlink()
    assert known.find(bob).name == "bob"


def test_without_a_valid_key_there_is_no_answer(key_file):
    key = add_key(key_file, "alice", Limits())
    engine = clockwork()
    api = served(engine, api_keys=str(key_file))
    for wrong in (None, "x", key[:-1], f"{key} "[1:], "\xff"):
        response = ask(api, wrong)
        assert code_of(response) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    assert engine.asked == []
    assert ask(api, key).json()["choices"][0]["message"]["content"] == "机密"
    assert run(api, lambda client: client.get("/v1/models", headers=bearer(key))).status_code == 200
    assert get(api, "/v1/models").status_code == 401
    assert get(api, "/v1/nothing").status_code == 401
    assert get(api, "/healthz").status_code == 200


def test_a_prefix_before_all_paths_changes_nothing(key_file, tmp_path):
    key = add_key(key_file, "alice", Limits())
    api = served(clockwork(), api_keys=str(key_file), audit_log=str(tmp_path / "audit"))

    async def statuses() -> list[int]:
        transport = httpx.ASGITransport(api, root_path="/one")
        async with httpx.AsyncClient(transport=transport, base_url="http://x/one") as client:
            answers = [await client.get(path) for path in ("/healthz", "/", "/v1/models", "/v1/chat/completions")]
            answers.append(await client.get("/v1/models", headers=bearer(key)))
            return [answer.status_code for answer in answers]

    assert asyncio.run(statuses()) == [200, 200, 401, 401, 200]
    routes = [json.loads(line)["route"] for line in (tmp_path / "audit").read_text().splitlines()]
    assert routes == ["/healthz", "/", "/v1/models", "/v1/chat/completions", "/v1/models"]


def test_metrics_need_a_key_unless_they_are_open_or_off(key_file):
    key = add_key(key_file, "prometheus", Limits(requests_per_minute=1))
    guarded = served(clockwork(), api_keys=str(key_file))
    assert get(guarded, "/metrics").status_code == 401
    for _ in range(3):  # reading uses up no limit
        assert get(guarded, "/metrics", **bearer(key)).status_code == 200
    assert get(served(clockwork(), api_keys=str(key_file), metrics="open"), "/metrics").status_code == 200
    assert get(served(clockwork(), metrics="off"), "/metrics").status_code == 404
    assert get(served(clockwork()), "/metrics").status_code == 200


# Limits


@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_minute", "answers_at_once"])
def test_limits_of_keys_need_keys(limit):
    with pytest.raises(ValueError, match=f"{limit} is a limit of each key: give api_keys too, or leave it out"):
        FrontArgs(**{limit: 5})


def test_a_bucket_fills_up_within_a_minute():
    now = 0.0
    ledger = LocalLedger(clock=lambda: now)
    limits = Limits(requests_per_minute=3, tokens_per_minute=60)

    def admit(name: str = "a") -> Any:
        return asyncio.run(ledger.admit(name, limits))

    assert [admit().retry_after_s for _ in range(3)] == [0, 0, 0]
    refused = admit()
    assert (refused.exhausted, refused.retry_after_s) == ("requests", 20.0)
    assert refused.headers == {
        "retry-after": "20",
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60.00s",
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "0.00s",
    }
    assert admit("b").retry_after_s == 0
    now = 20.0
    assert admit().retry_after_s == 0
    asyncio.run(ledger.settle("a", limits, 90))
    now = 45.0
    assert (admit().exhausted, admit().retry_after_s) == ("tokens", 6.0)
    now = 51.0
    assert admit().retry_after_s == 0


def test_requests_and_tokens_beyond_a_keys_limits_wait(key_file):
    few = add_key(key_file, "few", Limits(requests_per_minute=2))
    short = add_key(key_file, "short", Limits(tokens_per_minute=15))
    free = add_key(key_file, "free", Limits())
    api = served(clockwork(), api_keys=str(key_file))
    first = ask(api, few)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert ask(api, few).status_code == 200
    refused = ask(api, few)
    assert code_of(refused) == (429, "requests_per_minute_exceeded")
    assert refused.headers["retry-after"] == "30"
    used = ask(api, short, stream=True)
    assert used.status_code == 200
    assert used.headers["x-ratelimit-remaining-tokens"] == "0"  # what it may write is taken, and given back at its end
    assert code_of(ask(api, short)) == (429, "tokens_per_minute_exceeded")
    assert [ask(api, free).status_code for _ in range(4)] == [200] * 4


def test_tokens_of_an_answer_that_was_broken_off_count_too(key_file):
    key = add_key(key_file, "a", Limits(tokens_per_minute=10))
    api = served(Clockwork("机密" * 9, step_s=0.2), api_keys=str(key_file), request_timeout_s=1.5)
    assert ask(api, key, stream=True).text.endswith('"code": "timeout"}}\n\n')
    assert code_of(ask(api, key)) == (429, "tokens_per_minute_exceeded")


def test_tokens_are_taken_before_they_are_written_and_given_back_at_the_end(key_file):
    key = add_key(key_file, "a", Limits(tokens_per_minute=1000))
    api = served(clockwork(step_s=0.02), api_keys=str(key_file))

    async def twenty(client: httpx.AsyncClient) -> list[httpx.Response]:
        body = CHAT | {"max_tokens": 300}
        asked = (client.post("/v1/chat/completions", json=body, headers=bearer(key)) for _ in range(20))
        return await asyncio.gather(*asked)

    answers = run(api, twenty)
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 17
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert code_of(refused) == (429, "tokens_per_minute_exceeded")
    assert int(refused.headers["x-ratelimit-remaining-tokens"]) < 100
    used = sum(answer.json()["usage"]["total_tokens"] for answer in answers if answer.status_code == 200)
    after = ask(api, key, max_tokens=1)
    left = 1000 - used - after.json()["usage"]["prompt_tokens"] - 1
    assert left <= int(after.headers["x-ratelimit-remaining-tokens"]) <= left + 20  # it fills up meanwhile


def test_a_request_that_may_need_more_than_a_minutes_tokens_waits_for_all_of_them():
    now, limits = 0.0, Limits(tokens_per_minute=60)
    ledger = LocalLedger(clock=lambda: now)
    assert asyncio.run(ledger.reserve("a", limits, 500)).retry_after_s == 0
    asyncio.run(ledger.settle("a", limits, 30 - 500))
    assert asyncio.run(ledger.reserve("a", limits, 500)).retry_after_s == 30
    now = 30.0
    assert asyncio.run(ledger.reserve("a", limits, 500)).retry_after_s == 0


class Checking(Clockwork):
    """Refuses what a real engine would."""

    def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        check_request(prompt_ids, sampling, 1 << 20, self.context_length)
        return super().generate(prompt_ids, sampling)


@pytest.mark.parametrize("digits", [4, 300, 400])
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_what_no_engine_could_write_takes_nothing_of_a_keys_tokens(key_file, route, digits):
    key = add_key(key_file, "a", Limits(tokens_per_minute=1000))
    api = served(Checking("机密"), api_keys=str(key_file))

    def asked(**fields: Any) -> httpx.Response:
        body = (CHAT if route.startswith("chat") else {"model": "tiny", "prompt": "机密"}) | fields
        return run(api, lambda client: client.post(f"/v1/{route}", json=body, headers=bearer(key)))

    assert asked(max_tokens=10).status_code == 200
    assert asked(max_tokens=10**digits - 1).status_code == 400  # not 429: to ask again later would not help
    after = asked(max_tokens=10)
    assert after.status_code == 200
    assert int(after.headers["x-ratelimit-remaining-tokens"]) > 900


class Unsteady:
    """A handle to a LedgerServer that does not answer each time."""

    def __init__(self, answers: dict[str, bool]) -> None:
        self.ledger, self.answers = LocalLedger(clock=lambda: 0.0), answers

    def __getattr__(self, method: str) -> Any:
        async def remote(*arguments: Any) -> Any:
            if not self.answers.get(method, True):
                raise TimeoutError
            return await getattr(self.ledger, method)(*arguments)

        return SimpleNamespace(remote=remote)


@pytest.mark.parametrize("answered", [True, False])
def test_a_reservation_is_settled_with_the_ledger_that_made_it(answered):
    limits, server = Limits(tokens_per_minute=1000), Unsteady({"reserve": answered})
    ledger = SharedLedger(server)  # type: ignore[arg-type]
    reserved = asyncio.run(ledger.reserve("a", limits, 900))
    server.answers = {"settle": answered}
    asyncio.run(ledger.settle("a", limits, 100 - 900, reserved))
    left = asyncio.run(server.ledger.admit("a", limits)).left[0][2]
    assert left == (900 if answered else 1000)
    server.answers = {"reserve": False, "admit": False}
    alone = asyncio.run(ledger.admit("a", limits)).left[0][2]
    assert alone >= (1000 if answered else 900)


class LateLedger(LocalLedger):
    """Counts at once, and says so after a deadline."""

    async def reserve(self, name: str, limits: Limits, tokens: int) -> Standing:
        standing = await super().reserve(name, limits, tokens)
        await asyncio.sleep(0.3)
        return standing


def test_tokens_that_the_ledger_took_come_back_where_the_deadline_was_sooner(key_file):
    key = add_key(key_file, "a", Limits(tokens_per_minute=1000))
    ledger = LateLedger()
    api = served(clockwork(), ledger=ledger, api_keys=str(key_file), request_timeout_s=0.1)

    async def ask_and_wait(client: httpx.AsyncClient) -> httpx.Response:
        answer = await client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 900}, headers=bearer(key))
        await asyncio.sleep(0.5)
        return answer

    assert code_of(run(api, ask_and_wait)) == (504, "timeout")
    assert asyncio.run(ledger.admit("a", Limits(tokens_per_minute=1000))).left[0][2] == 1000


# Places and deadlines


def test_beyond_its_places_a_server_refuses_at_once():
    api = served(clockwork(step_s=0.2), max_inflight=2)

    async def three(client: httpx.AsyncClient) -> list[httpx.Response]:
        two = [asyncio.create_task(client.post("/v1/chat/completions", json=CHAT)) for _ in range(2)]
        await asyncio.sleep(0.1)
        started = time.monotonic()
        third = await client.post("/v1/chat/completions", json=CHAT)
        assert time.monotonic() - started < 0.5
        assert (await client.get("/healthz")).status_code == 200
        return [third, *await asyncio.gather(*two), await client.post("/v1/chat/completions", json=CHAT)]

    refused, *others = run(api, three)
    assert code_of(refused) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert [other.status_code for other in others] == [200, 200, 200]


def test_a_request_ends_at_its_deadline_and_so_does_its_generation():
    engine = Clockwork("机密" * 9, step_s=0.2)
    api = served(engine, request_timeout_s=1.5)
    assert code_of(ask(api)) == (504, "timeout")
    streamed = ask(api, stream=True)
    assert streamed.status_code == 200
    *pieces, last = [json.loads(event.removeprefix("data: ")) for event in streamed.text.split("\n\n") if event]
    assert pieces[1]["choices"][0]["delta"]["content"] == "机"
    assert last["error"]["code"] == "timeout"
    assert (len(engine.asked), engine.running) == (2, 0)


def test_a_client_that_stops_reading_has_no_place_beyond_its_deadline():
    engine = Flood("字" * 10_000)
    api = served(engine, request_timeout_s=1, max_inflight=1)
    body = json.dumps(CHAT | {"stream": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with http_server.served(api) as url, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", httpx.URL(url).port))
        started = time.monotonic()
        client.sendall(head.encode() + body)
        wait_for(lambda: engine.asked, 30)
        assert code_of(httpx.get(f"{url}/v1/models", timeout=30)) == (503, "overloaded")
        wait_for(lambda: httpx.get(f"{url}/v1/models", timeout=30).status_code == 200, 30)
        assert 1.9 < time.monotonic() - started < 15  # the deadline, and a second in which it could have read the error
        assert engine.running == 0


def test_bodies_and_prompts_have_limits():
    api = served(clockwork(), max_body_bytes=1000, max_prompt_tokens=100)
    assert code_of(ask(api, user="x" * 1000)) == (413, "body_too_large")
    long = {"messages": [{"role": "user", "content": "很长 " * 60}]}
    refused = ask(api, **long)
    assert code_of(refused) == (400, "context_length_exceeded")
    assert "tokens, and 100 are allowed here" in refused.json()["error"]["message"]
    body = {"question": "？", "documents": ["一二三四五六七八九十" * 2 for _ in range(9)]}
    answer = run(api, lambda client: client.post("/v1/answer", json=body)).json()
    assert answer["usage"]["prompt_tokens"] <= 100
    assert answer["omitted"]


# Browsers


def test_other_sites_may_ask_only_if_they_are_named(key_file):
    key = add_key(key_file, "a", Limits())
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    named = served(clockwork(), api_keys=str(key_file), cors_origins="https://a.example,https://b.example")

    def options(api: FastAPI) -> httpx.Response:
        return run(api, lambda client: client.options("/v1/chat/completions", headers=preflight))

    assert options(named).status_code == 200
    assert options(named).headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in options(served(clockwork(), api_keys=str(key_file))).headers
    exposed = get(named, "/v1/models", origin="https://a.example", **bearer(key)).headers[
        "access-control-expose-headers"
    ]
    assert {"Retry-After", "X-Request-Id", "x-ratelimit-remaining-tokens"} <= {*exposed.split(", ")}
    other = get(named, "/v1/models", origin="https://c.example", **bearer(key))
    assert (other.status_code, "access-control-allow-origin" in other.headers) == (200, False)


# What is taken down


def test_the_audit_log_tells_everything_but_what_was_said(key_file, tmp_path):
    key = add_key(key_file, "alice", Limits(requests_per_minute=2))
    log = tmp_path / "audit.jsonl"
    api = served(clockwork(), api_keys=str(key_file), audit_log=str(log))
    answer = ask(api, key)
    ask(api, "wrong")
    ask(api, key, stream=True)
    ask(api, key)
    get(api, "/somewhere/机密", **bearer(key))
    text = log.read_text()
    assert "机密" not in text
    assert key not in text
    entries = [json.loads(line) for line in text.splitlines()]
    assert [(e["key"], e["route"], e["status"], e["rejected"]) for e in entries] == [
        ("alice", "/v1/chat/completions", 200, ""),
        ("", "/v1/chat/completions", 401, "invalid_api_key"),
        ("alice", "/v1/chat/completions", 200, ""),
        ("alice", "/v1/chat/completions", 429, "requests_per_minute_exceeded"),
        ("alice", "other", 404, ""),
    ]
    assert entries[0]["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert [e["completion_tokens"] for e in entries] == [4, 0, 4, 0, 0]
    assert [e["finish_reason"] for e in entries] == ["stop", "", "stop", "", ""]
    assert entries[0]["id"] == answer.headers["x-request-id"]
    assert entries[0]["time"].endswith("+00:00")


def test_a_prompt_is_counted_once_however_many_choices_it_has(key_file, tmp_path):
    key = add_key(key_file, "a", Limits(tokens_per_minute=100_000))
    api = served(clockwork(), api_keys=str(key_file), audit_log=str(tmp_path / "audit"), metrics="open")
    usage = ask(api, key, n=32).json()["usage"]
    [entry] = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (usage["prompt_tokens"], 32 * 4)
    assert f'prompt_tokens_total{{model="tiny"}} {usage["prompt_tokens"]}.0' in get(api, "/metrics").text
    body = {"model": "tiny", "prompt": [[5, 6], [5, 6, 7]], "n": 3}
    answer = run(api, lambda client: client.post("/v1/completions", json=body, headers=bearer(key))).json()
    entry = json.loads((tmp_path / "audit").read_text().splitlines()[-1])
    assert entry["prompt_tokens"] == answer["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_a_stop_text_ended_is_no_abort(stream, tmp_path):
    api = served(clockwork(), audit_log=str(tmp_path / "audit"))
    assert '"finish_reason":"stop"' in ask(api, stop="密", stream=stream).text
    [entry] = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert entry["finish_reason"] == "stop"
    assert 'request_success_total{finished_reason="stop",model="tiny"} 1.0' in get(api, "/metrics").text


def test_an_audit_log_that_was_moved_away_is_begun_again(tmp_path):
    log = tmp_path / "audit.jsonl"
    api = served(clockwork(), audit_log=str(log))
    ask(api)
    log.rename(tmp_path / "audit.1")
    ask(api)
    assert len(log.read_text().splitlines()) == len((tmp_path / "audit.1").read_text().splitlines()) == 1
    with pytest.raises(StageError, match=r"audit_log /nowhere/log cannot be written"):
        front.check_files(FrontArgs(audit_log="/nowhere/log"))


def test_a_mistake_of_our_own_has_a_request_id_and_may_be_read_by_other_sites(tmp_path, caplog):
    engine = clockwork()
    engine.context_length = None  # which no arithmetic expects
    api = served(engine, cors_origins="https://a.example", audit_log=str(tmp_path / "audit"))
    headers = {"origin": "https://a.example", "X-Request-Id": "abc"}
    failed = run(api, lambda client: client.post("/v1/chat/completions", json=CHAT, headers=headers))
    assert code_of(failed) == (500, "internal_error")
    assert failed.headers["x-request-id"] == "abc"
    assert failed.headers["access-control-allow-origin"] == "https://a.example"
    assert json.loads((tmp_path / "audit").read_text())["status"] == 500
    assert "POST /v1/chat/completions failed" in caplog.text


def test_a_request_id_is_taken_over_or_made():
    api = served(clockwork())
    assert get(api, "/healthz", **{"X-Request-Id": "abc-1:2"}).headers["x-request-id"] == "abc-1:2"
    made = get(api, "/healthz", **{"X-Request-Id": "a b\t"}).headers["x-request-id"]
    assert len(made) == 32
    assert get(api, "/healthz").headers["x-request-id"] != made
