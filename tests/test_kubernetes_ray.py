"""What the manifests of cpu-demo start runs on a real Ray cluster of three nodes: jobs, the endpoint, its faults.

Only paths, the port and the autoscaler's patience differ from what Kubernetes would run.
"""

import json
import shlex
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from benchmarks.fault_places import free_port
from chatglm3.tiny.knowledge import write_shards
from cluster.rollouts import deployed_model
from tests.kubernetes import JOBS, objects, one, overlay, ray_cluster
from tests.ray_nodes import Nodes, three_nodes
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with three_nodes() as started:
        yield started


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What /store and /etc/chatglm3 are in the pods, with shards for prepare."""
    folder = tmp_path_factory.mktemp("pods")
    write_shards(folder / "store" / "raw", "demo", 100, seed=1)
    [config] = [item for item in objects(overlay("cpu-demo", "train")) if item["kind"] == "ConfigMap"]
    (folder / "etc" / "chatglm3").mkdir(parents=True)
    for name, text in config["data"].items():
        (folder / "etc" / "chatglm3" / name).write_text(remapped(text, folder))
    return folder


def remapped(text: str, folder: Path) -> str:
    return text.replace("/store/", f"{folder}/store/").replace("/etc/chatglm3/", f"{folder}/etc/chatglm3/")


@pytest.fixture(scope="module")
def jobs(nodes: Nodes, store: Path) -> dict[str, str]:
    """The output of every RayJob, submitted one after another as the operator's submitter does."""
    outputs = {}
    for stage in JOBS:
        spec = one(overlay("cpu-demo", stage), "RayJob")["spec"]
        cpus = spec.get("entrypointNumCpus")
        asked = ["--entrypoint-num-cpus", str(cpus)] if cpus else []
        entrypoint = shlex.split(remapped(spec["entrypoint"], store))
        done = nodes.command("ray", "job", "submit", *asked, "--", *entrypoint)
        assert done.returncode == 0, f"{stage}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        outputs[stage] = done.stdout
    return outputs


@pytest.fixture(scope="module")
def url(nodes: Nodes, jobs: dict[str, str], store: Path) -> str:
    """`serve deploy` of the RayService's serveConfigV2."""
    config = yaml.safe_load(remapped(one(overlay("cpu-demo", "serve"), "RayService")["spec"]["serveConfigV2"], store))
    config["http_options"]["port"] = port = free_port()
    [deployment] = config["applications"][0]["deployments"]
    quick = {"target_ongoing_requests": 2, "upscale_delay_s": 1, "downscale_delay_s": 4, "look_back_period_s": 2}
    deployment["autoscaling_config"] |= quick
    (store / "serve.yaml").write_text(yaml.safe_dump(config))
    deployed = nodes.command("serve", "deploy", str(store / "serve.yaml"))
    assert deployed.returncode == 0, deployed.stderr
    wait_for(lambda: running(nodes) == 1, 240, lambda: nodes.command("serve", "status").stdout)
    return f"http://127.0.0.1:{port}"


def replicas(nodes: Nodes) -> list[dict[str, Any]]:
    """What Serve says of each, where the application runs and all of them do."""
    [application] = (nodes.get("/api/serve/applications/") or {}).get("applications", {}).values() or [{}]
    found = application.get("deployments", {}).get("ChatServer", {}).get("replicas", [])
    states = {replica["state"] for replica in found}
    return found if application.get("status") == "RUNNING" and states == {"RUNNING"} else []


def running(nodes: Nodes) -> int:
    """How many they are."""
    return len(replicas(nodes))


@dataclass
class Seen:
    """What became of requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0

    @property
    def failed(self) -> dict[str, int]:
        return {what: count for what, count in self.outcomes.items() if what != "200"}


@contextmanager
def load(url: str, clients: int, beside: frozenset[int] = frozenset()) -> Iterator[Seen]:
    """Clients that ask all the time, through any proxy but those whose process ids are `beside`."""
    seen, stop = Seen(), threading.Event()

    def ask_on_and_on(client: httpx.Client) -> None:
        while not stop.is_set():
            started = time.monotonic()
            try:
                outcome = str(ask(client).status_code)
            except httpx.HTTPError as error:
                outcome = repr(error)
            seen.outcomes[outcome] += 1
            seen.longest_s = max(seen.longest_s, time.monotonic() - started)

    with ExitStack() as stack:
        through = [stack.enter_context(closing(connected(url, beside))) for _ in range(clients)]
        threads = [threading.Thread(target=ask_on_and_on, args=(client,)) for client in through]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def connected(url: str, beside: frozenset[int]) -> httpx.Client:
    """A client with an open connection. All proxies share the port here; in Kubernetes each has its pod's address."""
    while True:
        client = httpx.Client(base_url=url, timeout=120, trust_env=False)
        stream = client.get("/healthz").extensions["network_stream"]
        _, local_port = stream.get_extra_info("socket").getsockname()
        owners = {
            connection.pid
            for connection in psutil.net_connections("tcp4")
            if connection.raddr and connection.raddr.port == local_port
        }
        if not owners & beside:
            return client
        client.close()


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"model": "chat", "messages": [{"role": "user", "content": "北京的人口是多少？"}], "max_tokens": 48}
    return client.post("/v1/chat/completions", json=body | fields)


def below(process: Any) -> frozenset[int]:
    return frozenset(child.pid for child in psutil.Process(process.pid).children(recursive=True))


def test_every_job_of_the_manifests_succeeds_in_turn(jobs, store):
    assert list(jobs) == list(JOBS)
    for folder in ("data", "adapters/v1", "models/v1", "evaluations/v1"):
        assert (store / "store" / folder / "receipt.json").is_file()
    inputs = json.loads((store / "store/models/v1/receipt.json").read_text())["inputs"]
    assert f"{store}/store/adapters/v1" in inputs


def test_ray_shows_which_model_it_serves_as_a_rollout_reads_it(nodes, url, store):
    assert deployed_model(nodes.command("serve", "config").stdout) == f"{store}/store/models/v1"
    assert yaml.safe_load(nodes.command("serve", "status").stdout)["applications"]["chat"]["status"] == "RUNNING"


def test_the_services_own_config_answers(url):
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        answer = ask(client)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"]
        assert client.get("/v1/models").json()["data"][0]["id"] == "chat"


def test_replicas_follow_the_load_up_and_down_without_a_failed_request(nodes, url):
    with load(url, clients=12) as seen:
        wait_for(lambda: running(nodes) == 3, 240, lambda: nodes.command("serve", "status").stdout)
    with load(url, clients=1) as less:
        wait_for(lambda: running(nodes) == 1, 240, lambda: nodes.command("serve", "status").stdout)
    assert seen.failed == less.failed == {}
    print(f"1 -> 3 -> 1 replicas: {seen.outcomes['200']} + {less.outcomes['200']} requests, none failed")


def test_a_pod_that_must_go_hands_its_replicas_over(nodes, url):
    [replica] = replicas(nodes)
    pod = ray_cluster(overlay("cpu-demo", "serve"))["workerGroupSpecs"][0]["template"]["spec"]
    words = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    with load(url, clients=2) as seen:
        started = time.monotonic()
        left = nodes.command(*words, replica["node_id"], RAY_ADDRESS=f"127.0.0.1:{nodes.gcs_port}")
        seconds = time.monotonic() - started
    assert left.returncode == 0, left.stderr
    assert seen.failed == {}
    assert seconds < int(words[3])
    wait_for(lambda: running(nodes) == 1, 60, lambda: nodes.command("serve", "status").stdout)
    print(f"a replica was handed over in {seconds:.0f} s, {seen.outcomes['200']} requests, none failed")


def test_the_endpoint_answers_while_the_head_is_away_and_the_new_head_knows_it(nodes, url):
    with load(url, clients=2, beside=below(nodes.head)) as seen:
        nodes.kill_gcs()
        time.sleep(5)
        during = seen.outcomes["200"]
        time.sleep(5)
        assert seen.outcomes["200"] > during  # nobody had restarted it yet
        started = time.monotonic()
        nodes.start_head()
        wait_for(lambda: running(nodes) == 1, 180)
        seconds = time.monotonic() - started
        again = seen.outcomes["200"]
        wait_for(lambda: seen.outcomes["200"] > again + 5, 60)
    assert seen.failed == {}
    print(f"the head was back in {seconds:.0f} s; {seen.outcomes['200']} requests, longest {seen.longest_s:.1f} s")
