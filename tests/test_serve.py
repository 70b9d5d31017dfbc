"""The application on Ray Serve, started as a person starts it: `serve run` with the config file of the tree."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from click import ClickException
from ray.serve.schema import ServeDeploySchema

from cluster.storage import Receipt, publish
from serve_app.app import AppArgs, ChatServer, build
from serve_app.engine_server import EngineServer
from tests.random_adapters import KINDS, write_adapter
from tests.serving import PROJECT, SERVE, replicas, served, write_endless_model
from tests.waiting import wait_for

CONFIG = PROJECT / "serve_app" / "serve.yaml"
APP = f"chat-{os.getpid()}"
QUESTION: Any = [{"role": "user", "content": "北京的人口是多少？"}]
LONG = 1500


@pytest.fixture(scope="module")
def endless(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless_model(tiny, tmp_path_factory.mktemp("model") / "endless")


@pytest.fixture(scope="module")
def url(ray_cluster: None, endless: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The config file of the tree, with another port and model and a quicker autoscaler."""
    config = yaml.safe_load(CONFIG.read_text())
    [application] = config["applications"]
    shelf = tmp_path_factory.mktemp("shelf")
    write_adapter(endless, shelf / "other", seed=1, **KINDS["everything"])
    application |= {"name": APP, "args": {"model": str(endless), "name": "tiny", "adapter_dir": str(shelf)}}
    [deployment] = application["deployments"]
    deployment["autoscaling_config"] |= {
        "target_ongoing_requests": 2,
        "upscale_delay_s": 1,
        "policy": {"policy_function": "serve_app.scaling:ByWaitingTokens"},
    }
    deployment |= {"max_ongoing_requests": 4, "max_queued_requests": 4}
    with served(config, tmp_path_factory.mktemp("serve")) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(url: str, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 8} | fields
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_the_openai_client_streams_and_does_not(client):
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=20)
    content = whole.choices[0].message.content
    assert whole.usage.completion_tokens == 20
    stream = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == content
    stopped = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=20, stop=content[4:6])
    assert stopped.choices[0].message.content == content[: content.index(content[4:6])]
    seeded = [
        client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=20, temperature=1.5, seed=seed)
        for seed in (1, 1, 2)
    ]
    first, second, other = [answer.choices[0].message.content for answer in seeded]
    assert first == second != other


def test_an_adapter_is_asked_by_its_name(client):
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    plain, other, again = [
        client.chat.completions.create(model=model, messages=QUESTION, max_tokens=9, logprobs=True).choices[0].logprobs
        for model in ("tiny", "other", "tiny")
    ]
    assert plain == again != other


def test_errors_keep_their_shape_and_answers_carry_a_request_id(client, url):
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=-1)
    assert (wrong.value.param, wrong.value.code) == ("max_tokens", "invalid_value")
    assert wrong.value.request_id
    headers = {"content-type": "application/json"}
    too_large = httpx.post(f"{url}/v1/chat/completions", content=b" " * 2**21, headers=headers, timeout=60)
    assert too_large.status_code == 413
    assert httpx.get(f"{url}/v1/models", timeout=60).headers.get_list("x-request-id") != []


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_clients_that_go_away_free_their_places(url, stream):
    for _ in range(6):  # more than a replica runs at once: places that stayed taken would show
        leave(url, stream)
    started = time.monotonic()
    assert ask(url).status_code == 200
    assert time.monotonic() - started < 8  # a long answer takes 25


def leave(url: str, stream: bool) -> None:
    """Ask for a long answer and close the connection soon."""
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": LONG, "stream": stream}
    with (
        suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=0.5) as answer,
    ):
        next(answer.iter_bytes())


def test_load_adds_a_replica_beyond_it_requests_are_refused_and_a_killed_replica_is_replaced(url):
    [first] = replicas(APP)
    leaving = threading.Event()
    with ThreadPoolExecutor(12) as threads:
        clients = [threads.submit(stream_until, leaving, url) for _ in range(12)]
        try:
            wait_for(lambda: len(replicas(APP)) == 2, 90)
            os.kill(first, signal.SIGKILL)
            time.sleep(1)
        finally:
            leaving.set()
        endings = sum([client.result() for client in clients], Counter())
    wait_for(lambda: len(replicas(APP) - {first}) == 2, 90)
    assert endings["503, try again in 1 s"] > 0
    # Those that were under way on it; on a busy machine the proxy sends it as many more before it knows of its end.
    assert 0 < endings["broken"] <= 8
    assert set(endings) <= {"answered", "503, try again in 1 s", "broken", "waited long"}
    assert [ask(url).status_code for _ in range(10)] == [200] * 10


def stream_until(leaving: threading.Event, url: str) -> Counter[str]:
    """Ask for long answers, one after the other, and count how they end."""
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": LONG, "stream": True}
    endings: Counter[str] = Counter()
    while not leaving.is_set():
        try:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as answer:
                if answer.status_code == 500:  # uvicorn's own: it had no headers yet when its replica was killed
                    answer.raise_for_status()
                if answer.status_code != 200:
                    endings[f"{answer.status_code}, try again in {answer.headers.get('retry-after')} s"] += 1
                    leaving.wait(0.2)
                    continue
                for _ in answer.iter_bytes():
                    if leaving.is_set():
                        return endings
            endings["answered"] += 1
        except httpx.ReadTimeout:  # in the queue, before a place was free
            endings["waited long"] += 1
        except httpx.HTTPError:
            endings["broken"] += 1
    return endings


def test_the_config_file_is_served_on_this_machine_only():
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    assert config.http_options.host == "127.0.0.1"
    [application] = config.applications
    assert AppArgs(**application.args) == AppArgs()
    assert application.deployments[0].max_ongoing_requests == AppArgs().max_batch


def test_nothing_waits_in_a_queue_without_end():
    """Ray's own default: clients of a full service would wait until their deadline."""
    assert [ChatServer.max_queued_requests, EngineServer.max_queued_requests] == [64, 64]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"modle": "tiny"},
            "argument modle: Extra inputs are not permitted; the application's arguments are model, name",
        ),
        ({"engine": "vlm"}, "argument engine: Input should be 'auto'"),
        ({"max_batch": "0"}, "argument max_batch: Input should be greater than or equal to 1"),
        ({"model": "/nowhere"}, "/nowhere is not a folder"),
        ({"model": "{folder}"}, "config.json is missing"),
        ({"adapters": "one"}, "argument adapters: give NAME=FOLDER, with commas between several"),
        (
            {"requests_per_minute": "5", "tokens_per_minute": "9"},
            "requests_per_minute is a limit of each key: give api_keys too, or leave it out; the application's",
        ),
        ({"adapters": "one={folder}"}, "adapter one: {folder} holds no adapter_config.json"),
        ({"adapter_dir": "/nowhere"}, "adapter_dir /nowhere is not a folder"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_arguments_are_one_line_before_anything_starts(args, message, tmp_path):
    args = {name: value.format(folder=tmp_path) for name, value in args.items()}
    with pytest.raises(ClickException) as wrong:
        build(AppArgs(**args))
    assert message.format(folder=tmp_path) in wrong.value.message
    assert "\n" not in wrong.value.message


def test_an_adapter_of_another_prompt_format_is_refused_before_anything_starts(tmp_path):
    with publish(tmp_path / "bare", Receipt("train", {}, facts={"prompt_format": "bare"})) as partial:
        (partial / "adapter_config.json").write_text("{}")
    with pytest.raises(ClickException, match=r"adapter bare: .* was tuned with prompt_format bare, and the model is"):
        build(AppArgs(adapter_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            "{folder} is an adapter, but a model is needed here; fold it into its base first: "
            "python -m pipelines merge --adapter {folder} --out DIR",
        ),
        (
            lambda folder: (folder / "receipt.json").unlink(),
            "{folder} has no receipt.json: merge did not finish there; run it again",
        ),
        (
            lambda folder: (folder / "receipt.json").write_text('{"sta'),
            "{folder}/receipt.json is damaged (",
        ),
    ],
    ids=["adapter", "unfinished", "damaged"],
)
def test_a_folder_that_merge_did_not_finish_is_one_line_before_anything_starts(make, message, endless, tmp_path):
    folder = shutil.copytree(endless, tmp_path / "model")
    build(AppArgs(model=str(folder)))
    make(folder)
    with pytest.raises(ClickException) as wrong:
        build(AppArgs(model=str(folder)))
    assert wrong.value.message.startswith(message.format(folder=folder))
    assert "\n" not in wrong.value.message


def test_serve_run_prints_that_line_and_exits_with_1():
    command = [SERVE, "run", "serve_app.app:build", "model=/nowhere"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("Error: /nowhere is not a folder")
    assert "Traceback" not in result.stderr


def test_a_port_that_another_program_has_is_one_line_before_anything_starts():
    environment = os.environ | {"RAY_SERVE_DEFAULT_HTTP_HOST": "127.0.0.7"}
    command = [SERVE, "run", "serve_app.app:build"]
    with socket.socket() as other:
        other.bind(("127.0.0.7", 8000))
        other.listen()
        result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "Error: port 8000 of 127.0.0.7 cannot be opened (Address already in use); end the program that has it, "
        "or choose another port in serve_app/serve.yaml and: serve run serve_app/serve.yaml"
    )
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_with_a_config_file_ray_itself_names_the_port_and_the_exit_code_is_1(tmp_path):
    config = yaml.safe_load(CONFIG.read_text())
    # A private Ray session would leave its token in the home folder, unless it is given one.
    environment = os.environ | {"RAY_AUTH_TOKEN": "0" * 64}
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config["http_options"]["port"] = port = other.getsockname()[1]
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
        command = [SERVE, "run", "--address", "local", tmp_path / "serve.yaml"]
        result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert f"RuntimeError: Failed to bind to address '127.0.0.1:{port}'." in result.stderr
