"""The vLLM engine in a replica of its own, whose vLLM dies in the middle of answers."""

import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from benchmarks.processes import below
from pipelines.merging import MergeConfig, merge
from tests.serving import replicas, served, write_endless_model

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

QUESTION = [{"role": "user", "content": "你好，你能做什么？"}]
APP = "vllm-separate"


def test_an_answer_outlives_the_vllm_that_began_it(ray_cluster, tiny, tmp_path_factory):
    endless = write_endless_model(tiny, tmp_path_factory.mktemp("endless") / "base")
    model = merge(MergeConfig(base=str(endless), out=str(endless.parent / "model")))
    args = {"model": model, "name": "tiny", "engine": "vllm", "dtype": "float32", "separate_engines": True}
    engine = {"name": "EngineServer", "ray_actor_options": {"num_cpus": 0.5}, "health_check_period_s": 60}
    application = {"name": APP, "import_path": "serve_app.app:build", "args": args, "deployments": [engine]}
    with served({"applications": [application]}, tmp_path_factory.mktemp("serve")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def streamed() -> str:
            chunks = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=200, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        undisturbed = streamed()
        with ThreadPoolExecutor(2) as threads:
            streams = [threads.submit(streamed) for _ in range(2)]
            time.sleep(0.5)
            assert not any(stream.done() for stream in streams)
            [replica] = replicas(APP, "EngineServer")
            for process in below(replica, "EngineCore"):
                process.kill()
            assert [stream.result() for stream in streams] == [undisturbed] * 2
