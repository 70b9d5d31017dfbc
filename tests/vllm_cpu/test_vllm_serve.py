"""The vLLM engine behind Ray Serve, with speculation, asked by the openai client."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from benchmarks.processes import below
from chatglm3.chat import question_ids
from chatglm3.engines import Sampling, complete, load_engine
from chatglm3.tokenizer import load_tokenizer
from pipelines.merging import MergeConfig, merge
from tests.serving import replicas, served
from tests.waiting import wait_for

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

QUESTION = [{"role": "user", "content": "你好，你能做什么？"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
APP = "vllm-tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as merge writes it."""
    return Path(merge(MergeConfig(base="tiny", out=str(tmp_path_factory.mktemp("merged") / "model"))))


@pytest.fixture(scope="module")
def client(ray_cluster: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    config = yaml.safe_load(Path("serve_app/serve.yaml").read_text())
    [application] = config["applications"]
    application["name"] = APP
    application["args"] = {"model": str(model), "name": "tiny", "engine": "vllm", "dtype": "float32", "speculate": True}
    [deployment] = application["deployments"]
    deployment |= {"health_check_period_s": 60}  # longer than the test: what ends the replica is not this
    with served(config, tmp_path_factory.mktemp("serve")) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_an_answer_is_that_of_the_embedded_engine_whole_and_as_a_stream(client, model):
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=40, logprobs=True)
    stream = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert last.usage == whole.usage
    assert len(whole.choices[0].logprobs.content) > 3
    embedded = load_engine("transformers", model, dtype="float32")
    ids = question_ids(load_tokenizer(model), QUESTION, "chat")
    text = asyncio.run(complete(embedded, ids, Sampling(max_tokens=40))).text
    embedded.close()
    assert whole.choices[0].message.content == text.strip()


def test_a_guide_holds_though_tokens_are_guessed(client):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    guided = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=40, response_format=form)
    assert set(json.loads(guided.choices[0].message.content)) == {"a"}


def test_a_replica_whose_vllm_dies_while_it_is_idle_is_replaced_at_once(client):
    [replica] = replicas(APP)
    for process in below(replica, "EngineCore"):
        process.kill()
    wait_for(lambda: replica not in replicas(APP), 20)
    wait_for(lambda: _answers(client), 200)


def _answers(client: openai.OpenAI) -> bool:
    try:
        return bool(client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=3).id)
    except openai.OpenAIError:
        return False
