"""The application on Ray Serve as its operators see it: its log by request ids, its traces, its replicas by tokens."""

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.serving import PROJECT, replicas, served
from tests.trace_collector import collector
from tests.waiting import wait_for

pytestmark = pytest.mark.slow

APP = f"observed-{os.getpid()}"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Service:
    """Where it is, and the paths and bodies of what it sent to the collector of traces."""

    url: str
    exports: list[tuple[str, bytes]]

    def ask(self, text: str, **headers: str) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 3}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=120)


@pytest.fixture(scope="module")
def service(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The tree's config file, told where traces go and to have a replica for every 200 tokens that wait."""
    config = yaml.safe_load((PROJECT / "serve_app" / "serve.yaml").read_text())
    [application] = config["applications"]
    application["name"] = APP
    [deployment] = application["deployments"]
    by_tokens = {"policy_function": "serve_app.scaling:ByWaitingTokens", "policy_kwargs": {"tokens": 200}}
    deployment["autoscaling_config"] |= {"target_ongoing_requests": 32, "upscale_delay_s": 1, "policy": by_tokens}
    with collector() as (address, exports):
        told = {"OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        deployment["ray_actor_options"] = {"num_cpus": 0.5, "runtime_env": {"env_vars": told}}
        with served(config, tmp_path_factory.mktemp("serve")) as url:
            yield Service(url, exports)


def logged(request_id: str) -> list[dict[str, Any]]:
    """Lines of the replicas' logs about a request."""
    files = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray").glob(f"session_2*/logs/serve/replica_{APP}_*.log")
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [entry for entry in map(json.loads, lines) if entry.get("request_id") == request_id]


def test_a_request_is_found_in_the_log_by_the_id_that_its_answer_has(service: Service):
    answer = service.ask("北京的人口是多少？", **{"X-Request-Id": "asked-by-a-test"})
    assert answer.status_code == 200
    assert answer.headers.get_list("x-request-id") == ["asked-by-a-test"]
    wait_for(lambda: bool(logged("asked-by-a-test")), 30)
    [line] = logged("asked-by-a-test")
    assert "POST /v1/chat/completions 200" in line["message"]
    assert "人口" not in json.dumps(line, ensure_ascii=False)


def spans(service: Service) -> list[Any]:
    parsed = [ExportTraceServiceRequest.FromString(body) for _, body in service.exports]
    return [
        span
        for export in parsed
        for part in export.resource_spans
        for scope in part.scope_spans
        for span in scope.spans
    ]


def test_a_replica_sends_a_span_of_the_callers_trace(service: Service):
    service.ask("你好", traceparent=f"00-{TRACE}-{PARENT}-01")
    wait_for(lambda: any(span.trace_id.hex() == TRACE for span in spans(service)), 30)
    [span] = [span for span in spans(service) if span.trace_id.hex() == TRACE]
    assert (span.name, span.parent_span_id.hex()) == ("POST /v1/chat/completions", PARENT)
    numbers = {entry.key: entry.value.int_value for entry in span.attributes}
    assert numbers["gen_ai.usage.output_tokens"] == 3


def test_long_prompts_that_wait_add_a_replica_where_requests_would_not(service: Service):
    assert len(replicas(APP)) == 1
    stop = threading.Event()

    def ask_on_and_on(number: int) -> set[int]:
        statuses = set()
        while not stop.is_set():
            statuses.add(service.ask(f"{number}" + "北京的人口是多少？" * 250).status_code)
        return statuses

    with ThreadPoolExecutor(8) as threads:
        clients = [threads.submit(ask_on_and_on, number) for number in range(8)]
        try:
            wait_for(lambda: len(replicas(APP)) == 2, 120)
        finally:
            stop.set()
    assert set().union(*(client.result() for client in clients)) == {200}
