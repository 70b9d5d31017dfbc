"""Another model and fewer replicas under open streams: every text is whole."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import openai
import pytest
import ray
import yaml

from tests.serving import PROJECT, SERVE, replicas, served, write_endless_model
from tests.waiting import wait_for

pytestmark = pytest.mark.slow

APP = f"rolling-{os.getpid()}"
USERS = 4
LONG = 500


def config(model: Path, num_replicas: int) -> dict[str, Any]:
    deployment = {
        "name": "ChatServer",
        "num_replicas": num_replicas,
        "max_surge_percent": 100,
        "graceful_shutdown_timeout_s": 60,
        "ray_actor_options": {"num_cpus": 0.2},
    }
    args = {"model": str(model), "name": "tiny"}
    application = {"name": APP, "import_path": "serve_app.app:build", "args": args, "deployments": [deployment]}
    return {"applications": [application]}


@pytest.fixture
def models(ray_cluster: None, tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of one model, so that both say the same."""
    first = write_endless_model(tiny, tmp_path / "v1")
    return first, Path(shutil.copytree(first, tmp_path / "v2"))


@pytest.fixture
def url(models: tuple[Path, Path], tmp_path: Path) -> Iterator[str]:
    with served(config(models[0], 2), tmp_path) as url:
        yield url


def streamed(client: openai.OpenAI, number: int) -> str:
    question: Any = [{"role": "user", "content": f"北京的人口是多少？{number}"}]
    chunks = client.chat.completions.create(model="tiny", messages=question, max_tokens=LONG, stream=True)
    *parts, last = [chunk.choices[0] for chunk in chunks]
    assert last.finish_reason == "length"
    return "".join(part.delta.content or "" for part in parts)


def test_streams_are_whole_while_the_model_changes_and_a_replica_goes(url, models, tmp_path):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    wanted = [streamed(client, number) for number in range(USERS)]
    wait_for(lambda: len(replicas(APP)) == 2, 60)
    old, is_over = replicas(APP), Event()

    def user(number: int) -> list[str]:
        texts = []
        while not is_over.is_set():
            texts.append(streamed(client, number))
        return texts

    second = config(models[1], 1) | {"http_options": {"host": "127.0.0.1", "port": httpx.URL(url).port}}
    (tmp_path / "v2.yaml").write_text(yaml.safe_dump(second))
    with ThreadPoolExecutor(USERS) as threads:
        users = [threads.submit(user, number) for number in range(USERS)]
        try:
            address = ray.get_runtime_context().gcs_address
            command = [SERVE, "run", "--non-blocking", "--address", address, tmp_path / "v2.yaml"]
            subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
            wait_for(lambda: len(replicas(APP)) == 1 and not replicas(APP) & old, 120)
        finally:
            is_over.set()
        texts = [user.result() for user in users]
    assert [{*of_user} for of_user in texts] == [{text} for text in wanted]
    assert all(len(of_user) > 1 for of_user in texts)
