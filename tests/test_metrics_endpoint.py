"""What Prometheus and OpenTelemetry learn: the numbers by themselves, scraped by a real Prometheus, and as spans."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.fault_places import free_port
from chatglm3 import load_tokenizer
from chatglm3.documents import REFUSAL, cited_answer
from chatglm3.engines import AdapterFolders, Load
from serve_app import front, tracing
from serve_app.front import FrontArgs
from serve_app.keys import Limits, add_key
from serve_app.metering import MeteredEngine
from serve_app.metrics import INSTRUMENTS, PREFIX, Metrics
from serve_app.routes import make_api
from tests.clockwork import Clockwork
from tests.http_server import served
from tests.trace_collector import collector
from tests.waiting import wait_for

DASHBOARD = Path(front.__file__).with_name("grafana.json")
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}]}
QUESTION = {"question": "天空？", "documents": ["天空是蓝色的。"]}


class Service:
    """A guarded API over a stand-in engine, asked without a server."""

    def __init__(self, text: str = "你好", adapters: AdapterFolders | None = None, **args: Any) -> None:
        self.engine = Clockwork(text)
        self.engine.adapters = adapters or AdapterFolders()
        self.metrics = Metrics("tiny")
        metered = MeteredEngine(self.engine, self.metrics)
        self.api = make_api(metered, load_tokenizer("tiny"), "tiny", "chat", on_answer=self.metrics.answered)
        front.install(self.api, FrontArgs(**args), metered, self.metrics)

    def request(self, method: str, path: str, **content: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return await client.request(method, path, **content)

        return asyncio.run(ask())

    def numbers(self) -> dict[str, float]:
        """What /metrics shows, but for the buckets."""
        found = {}
        for family in text_string_to_metric_families(self.request("GET", "/metrics").text):
            for sample in family.samples:
                labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
                if not sample.name.endswith(("_bucket", "_created")):
                    found[f"{sample.name.removeprefix(PREFIX)}{{{labels}}}"] = sample.value
        return found


def test_tokens_times_and_endings_are_counted():
    service = Service()
    tokens = [service.request("POST", "/v1/chat/completions", json=CHAT).json()["usage"] for _ in range(2)]
    numbers = service.numbers()
    assert numbers["prompt_tokens_total{model=tiny}"] == sum(usage["prompt_tokens"] for usage in tokens)
    assert numbers["generation_tokens_total{model=tiny}"] == sum(usage["completion_tokens"] for usage in tokens) == 8
    assert numbers["time_to_first_token_seconds_count{model=tiny}"] == 2
    assert numbers["inter_token_latency_seconds_count{model=tiny}"] == 6
    assert numbers["e2e_request_latency_seconds_count{model=tiny}"] == 2
    assert numbers["request_success_total{finished_reason=stop,model=tiny}"] == 2
    assert numbers["http_requests_total{method=POST,route=/v1/chat/completions,status=200}"] == 2


def test_what_an_adapter_reads_and_writes_is_counted_under_its_name(tmp_path):
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "adapter_config.json").write_text("{}")
    service = Service(adapters=AdapterFolders(shelf=tmp_path))
    service.request("POST", "/v1/chat/completions", json=CHAT)
    for _ in range(2):
        assert service.request("POST", "/v1/chat/completions", json=CHAT | {"model": "law"}).status_code == 200
    numbers = service.numbers()
    assert numbers["generation_tokens_total{model=tiny}"] == 4
    assert numbers["generation_tokens_total{model=law}"] == 8
    assert numbers["request_success_total{finished_reason=stop,model=law}"] == 2


def test_the_engines_load_is_as_of_the_scrape():
    service = Service()
    service.numbers()
    numbers = service.numbers()
    assert numbers["num_requests_running{model=tiny}"] == 0
    assert numbers["num_requests_waiting{model=tiny}"] == 2
    assert numbers["num_prompt_tokens_waiting{model=tiny}"] == 30
    assert numbers["kv_cache_usage_perc{model=tiny}"] == 0.25
    assert numbers["prefix_cache_hits_total{model=tiny}"] == 4  # the engine counts since its start
    assert numbers["prefix_cache_queries_total{model=tiny}"] == 10


def test_a_cache_that_began_anew_does_not_count_backwards():
    measured = Metrics("tiny")
    measured.sample(Load(0, 0, 0, 0.0, prefix_hits=5, prefix_queries=9))
    measured.sample(Load(0, 0, 0, 0.0, prefix_hits=1, prefix_queries=2))
    assert b'chatglm3_prefix_cache_hits_total{model="tiny"} 6.0' in measured.text()


def test_answers_are_counted_by_outcome_and_citations_by_how_they_were_found():
    outcomes: dict[str, float] = {}
    for text in (REFUSAL, cited_answer("蓝", 1, "天空是蓝色的。"), cited_answer("蓝色", 1), "不知道", "绿[1]"):
        service = Service(text)
        service.request("POST", "/v1/answer", json=QUESTION)
        service.request("POST", "/v1/answer", json=QUESTION | {"stream": True})
        for name, value in service.numbers().items():
            if name.startswith("document_"):
                outcomes[name] = outcomes.get(name, 0) + value
    assert outcomes == {
        "document_answers_total{model=tiny,outcome=refused}": 2,
        "document_answers_total{model=tiny,outcome=cited}": 6,
        "document_answers_total{model=tiny,outcome=uncited}": 2,
        "document_citations_total{match=exact,model=tiny}": 2,
        "document_citations_total{match=answer,model=tiny}": 2,
        "document_citations_total{match=none,model=tiny}": 2,
    }


def test_failures_and_rejections_have_their_reasons(tmp_path):
    key = {"Authorization": f"Bearer {add_key(tmp_path / 'keys', 'a', Limits())}"}
    service = Service("你💥", api_keys=str(tmp_path / "keys"), metrics="open")
    assert service.request("POST", "/v1/chat/completions", json=CHAT).status_code == 401
    assert service.request("POST", "/v1/chat/completions", json=CHAT, headers=key).status_code == 503
    assert service.request("GET", "/v1/nothing", headers=key).status_code == 404
    numbers = service.numbers()
    assert numbers["requests_rejected_total{reason=invalid_api_key}"] == 1
    assert numbers["request_success_total{finished_reason=error,model=tiny}"] == 1
    assert numbers["http_requests_total{method=GET,route=other,status=404}"] == 1


# A real Prometheus


@pytest.fixture
def prometheus() -> str:
    found = shutil.which("prometheus")
    if not found:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    return found


def test_prometheus_scrapes_it_with_a_key(prometheus: str, tmp_path: Path):
    key = add_key(tmp_path / "keys", "prometheus", Limits())
    (tmp_path / "key").write_text(key)
    service = Service("你好", api_keys=str(tmp_path / "keys"))
    with served(service.api) as url:
        headers = {"Authorization": f"Bearer {key}"}
        for _ in range(3):
            httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers, timeout=60)
        target = url.removeprefix("http://")
        job = {
            "job_name": "glm",
            "static_configs": [{"targets": [target]}],
            "authorization": {"credentials_file": "key"},
        }
        config = {"global": {"scrape_interval": "2s", "scrape_timeout": "2s"}, "scrape_configs": [job]}
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        with running(prometheus, tmp_path) as query:
            # A busy machine may miss one scrape, and the next one finds it up.
            wait_for(lambda: query("chatglm3_generation_tokens_total") == [12.0] and query("up") == [1.0], 60)
            assert query("chatglm3_time_to_first_token_seconds_count") == [3.0]
            assert query('chatglm3_request_success_total{finished_reason="stop"}') == [3.0]
            [quantile] = query("histogram_quantile(0.5, chatglm3_e2e_request_latency_seconds_bucket)")
            assert 0 < quantile < 5
            for expression in dashboard_expressions():
                query(expression.replace("$__rate_interval", "1m").replace("$model", ".*"))


def test_promtool_finds_nothing_wrong(tmp_path: Path):
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    service = Service(cited_answer("蓝", 1, "天空是蓝色的。"))
    service.request("POST", "/v1/answer", json=QUESTION)
    text = service.request("GET", "/metrics").text
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
    # vLLM's name for a share of 0 to 1, by which dashboards know it.
    known = "chatglm3_kv_cache_usage_perc"
    assert [line for line in done.stderr.splitlines() if known not in line] == []


@contextmanager
def running(program: str, folder: Path) -> Iterator[Callable[[str], list[float]]]:
    """Prometheus over the configuration in a folder; gives a function that queries it for values."""
    address = f"127.0.0.1:{free_port()}"
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)

    def query(expression: str) -> list[float]:
        try:
            answer = httpx.get(f"http://{address}/api/v1/query", params={"query": expression}, timeout=60).json()
        except httpx.TransportError:
            assert process.poll() is None, (folder / "log").read_text()
            return []
        assert answer["status"] == "success", answer
        return [float(result["value"][1]) for result in answer["data"]["result"]]

    try:
        yield query
    finally:
        process.terminate()
        process.wait(20)


# The dashboard


def dashboard_expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_the_dashboard_asks_only_for_what_is_measured():
    exported = {PREFIX + item.name for item in INSTRUMENTS}
    asked = {
        name.removesuffix("_bucket").removesuffix("_total").removesuffix("_sum").removesuffix("_count")
        for expression in dashboard_expressions()
        for name in re.findall(r"chatglm3_\w+", expression)
    }
    assert asked <= exported
    assert exported - asked == set()


# Traces


def traced(text: str, monkeypatch: pytest.MonkeyPatch, **headers: str) -> list[Any]:
    """Spans of one question to a service that answers with `text`."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(front, "make_tracer", lambda: provider.get_tracer("test"))
    Service(text).request("POST", "/v1/chat/completions", json=CHAT | {"stream": True}, headers=headers)
    return list(exporter.get_finished_spans())


def test_a_request_is_a_span_of_the_callers_trace(monkeypatch: pytest.MonkeyPatch):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    [span] = traced("你好", monkeypatch, traceparent=f"00-{trace}-{parent}-01", **{"x-request-id": "r-1"})
    assert span.name == "POST /v1/chat/completions"
    assert f"{span.context.trace_id:032x}" == trace
    assert f"{span.parent.span_id:016x}" == parent
    attributes = dict(span.attributes)
    assert attributes.pop("gen_ai.server.time_to_first_token") > 0
    assert attributes.pop("gen_ai.usage.input_tokens") > 3
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "request.id": "r-1",
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ("stop",),
    }


def test_a_request_without_a_trace_begins_one_and_a_failure_is_an_error(monkeypatch: pytest.MonkeyPatch):
    [span] = traced("💥", monkeypatch)
    assert span.parent is None
    assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)


def test_spans_are_sent_where_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    assert tracing.make_tracer() is None
    with collector() as (address, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        Service().request("GET", "/v1/models")
        wait_for(lambda: bool(received), 30)
    assert received[0][0] == "/v1/traces"
    assert b"GET /v1/models" in received[0][1]
