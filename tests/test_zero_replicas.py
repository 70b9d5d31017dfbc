"""Scaled to zero: nobody asks, no replica runs; somebody asks, and is answered by one that starts."""

import os
import time
from pathlib import Path

import httpx
import pytest

from tests.serving import replicas, served
from tests.waiting import wait_for

APP = f"zero-{os.getpid()}"


@pytest.mark.slow
def test_the_first_request_after_a_quiet_time_starts_a_replica_and_is_answered(ray_cluster: None, tmp_path: Path):
    scaling = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 2, "look_back_period_s": 2}
    deployment = {"name": "ChatServer", "autoscaling_config": scaling, "ray_actor_options": {"num_cpus": 0.5}}
    application = {"name": APP, "import_path": "serve_app.app:build", "args": {"model": "tiny"}}
    with served({"applications": [application | {"deployments": [deployment]}]}, tmp_path) as url:
        wait_for(lambda: not replicas(APP), 60)
        for _ in range(20):  # Serve's own probe asks no replica
            assert httpx.get(f"{url}/-/healthz", timeout=60).text == "success"
            time.sleep(0.2)
        assert not replicas(APP)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 5}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=90)
        assert answer.json()["usage"]["completion_tokens"] == 5
        assert len(replicas(APP)) == 1
