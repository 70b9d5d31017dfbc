"""Two replicas of the application on Ray Serve, as one service: one ledger of limits, and all numbers on Ray's port."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from benchmarks.fault_places import free_port
from serve_app.app import AppArgs, _is_loopback, build
from serve_app.keys import Limits, add_key
from tests.waiting import wait_for

APP = f"replicas-{os.getpid()}"


@dataclass
class Service:
    """Where it is, and keys to it."""

    url: str
    limited: str
    free: str
    audit: Path

    def ask(self, key: str, **fields: object) -> httpx.Response:
        body = {"model": APP, "messages": [{"role": "user", "content": "你好"}], "max_tokens": 5} | fields
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def service(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    limited = add_key(folder / "keys", "limited", Limits(requests_per_minute=5))
    free = add_key(folder / "keys", "free", Limits())
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = AppArgs(model="tiny", name=APP, api_keys=str(folder / "keys"), audit_log=str(folder / "audit"))
    config = {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}}
    application = build(args)
    application._bound_deployment = application._bound_deployment.options(**config)
    serve.run(application, name=APP)
    yield Service(f"http://127.0.0.1:{port}", limited, free, folder / "audit")
    serve.delete(APP)
    serve.shutdown()


def numbers_of_ray() -> list[tuple[str, str, float]]:
    """(metric, replica, value) of everything of this application that Ray's agent on this node shows."""
    node = ray.nodes()[0]
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=60).text
    series = rf'^ray_chatglm3_(\w+)\{{.*model="{APP}".*replica="(\w+)".*\}} (\S+)$'
    found = re.findall(series, text, re.MULTILINE)
    return [(name, replica, float(value)) for name, replica, value in found]


def test_what_listens_beyond_this_machine_is_known():
    assert all(map(_is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(_is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))


@pytest.mark.slow
def test_a_limit_holds_over_all_replicas(service):
    statuses = Counter(service.ask(service.limited).status_code for _ in range(12))
    assert statuses == {200: 5, 429: 7}
    refused = service.ask(service.limited)
    assert refused.headers.get_list("x-request-id") == [refused.headers["x-request-id"]]
    assert 0 < int(refused.headers["retry-after"]) <= 12


@pytest.mark.slow
def test_rays_metrics_port_shows_every_replica_and_the_sum_is_exact(service):
    def generated() -> dict[str, float]:
        return {replica: value for name, replica, value in numbers_of_ray() if name == "generation_tokens_total"}

    before = sum(line["completion_tokens"] for line in map(json.loads, service.audit.read_text().splitlines()))
    for _ in range(30):
        service.ask(service.free)
    wait_for(lambda: sum(generated().values()) == before + 150, 60)
    assert len(generated()) == 2
    assert all(value > 0 for value in generated().values())
    gauges = {replica for name, replica, _ in numbers_of_ray() if name == "num_requests_running"}
    assert gauges == set(generated())


@pytest.mark.slow
def test_one_audit_file_has_whole_lines_of_both(service):
    entries = [json.loads(line) for line in service.audit.read_text().splitlines()]
    assert {entry["key"] for entry in entries} == {"limited", "free"}


@pytest.mark.slow
def test_the_route_says_that_it_shows_one_replica_of_several(service):
    text = httpx.get(f"{service.url}/metrics", headers={"Authorization": f"Bearer {service.free}"}).text
    assert text.startswith("# One replica's numbers; the next scrape may reach another.")
    assert httpx.get(f"{service.url}/metrics").status_code == 401
    assert [httpx.get(f"{service.url}{path}").status_code for path in ("/healthz", "/")] == [200, 200]
