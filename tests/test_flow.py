"""Shards in, HTTP answer out: the demo on the tiny model, and the same commands on the real ChatGLM3 layout."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from benchmarks.fault_places import free_port
from benchmarks.processes import end_tree
from chatglm3.errors import ModelError
from cluster.commands import run_command
from cluster.errors import StageError
from pipelines.__main__ import STAGES

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


def pipelines(*arguments: str, timeout_s: int = 400) -> str:
    """Run a stage as a person would and return what it printed."""
    command = [sys.executable, "-m", "pipelines", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert result.returncode == 0, f"{arguments}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.timeout(900)
def test_the_demo_doubles_the_exact_match_on_unseen_documents_and_answers_over_http(tmp_path: Path) -> None:
    printed = pipelines("demo", "--out", str(tmp_path / "demo"), "--samples", "1200", timeout_s=880)
    scores = json.loads((tmp_path / "demo/evaluation/scores.json").read_text())
    base, tuned = scores["against"]["exact_match"]["value"], scores["model"]["exact_match"]["value"]
    assert tuned >= 0.6
    assert tuned >= 2 * base > 0
    assert re.search(r"答：\S+.*it cites", printed, re.S)
    for picture in ("data/report.html", "adapter/loss.png", "model/report.html", "evaluation/report.html"):
        assert (tmp_path / "demo" / picture).stat().st_size > 5_000
        assert picture in printed


def pipelines_here(*arguments: str) -> str:
    """A stage as a person would run it, but in this process, where libraries and Ray have been started already."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = run_command("python -m pipelines", STAGES, list(arguments), (StageError, ModelError, OSError))
    assert code == 0, f"{arguments}\n{printed.getvalue()}"
    return printed.getvalue()


@pytest.mark.timeout(900)
def test_the_same_commands_take_real_shards_through_the_official_layout(
    shared: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,245 real rows, the genuine tokenizer, a checkpoint of the official code that remembers two chats by heart."""
    with tarfile.open(shared / "data/multidoc.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.setattr("cluster.commands.signal.signal", lambda *_: None)  # SIGTERM is for whoever runs the tests
    base = str(shared / "chatglm3/ckpt/full-fp16-bin")
    data, adapter = str(tmp_path / "data"), str(tmp_path / "adapter")
    printed = pipelines_here("prepare", "--raw", str(tmp_path / "multidoc"), "--out", data, "--tokenizer", base)
    assert "3061 training and 353 dev rows, 0 bad, 0 exact and 0 near copies dropped" in printed
    learning = ["--max_steps", "5", "--batch_size", "2", "--learning_rate", "1e-6", "--block_tokens", "4096"]
    pipelines_here(
        "train", "--data", data, "--base", base, "--out", adapter, "--workers", "2", "--use_gpu", "false", *learning
    )
    assert len(Path(adapter, "metrics.jsonl").read_text().splitlines()) == 5
    models = {weight_format: str(tmp_path / weight_format) for weight_format in ("nf4", "int8", "bf16")}
    for weight_format, model in models.items():
        # Of random weights NF4 makes another model: what is measured on them says nothing.
        pipelines_here("merge", "--adapter", adapter, "--out", model, "--format", weight_format, "--measure", "false")
        answer = pipelines_here("predict", "--model", model, "--max_tokens", "16", "你好").strip()
        assert answer.startswith("你好👋！我是人工智能助手"), weight_format
    for weight_format, answer in serve_and_ask(models, "你好", tmp_path / "serve.yaml").items():
        assert answer.startswith("你好👋！我是人工智能助手"), weight_format


def serve_and_ask(models: dict[str, str], question: str, file: Path) -> dict[str, str]:
    """Each model's answer from one `serve run` of the tree's config file, its application once for each model."""
    config = yaml.safe_load((ROOT / "serve_app/serve.yaml").read_text())
    config["http_options"]["port"] = port = free_port()
    [application] = config["applications"]
    application["deployments"][0]["ray_actor_options"] = {"num_cpus": 0.5}  # so that three fit on two cores
    config["applications"] = [
        application | {"name": name, "route_prefix": f"/{name}", "args": {"model": model, "name": "model"}}
        for name, model in models.items()
    ]
    file.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
    # A private Ray session would leave its token in the home folder, unless it is given one.
    environment = os.environ | {"RAY_AUTH_TOKEN": "0" * 64}
    log = file.with_suffix(".log")
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 240
        return {name: wait_for_answer(f"http://127.0.0.1:{port}/{name}", question, deadline, log) for name in models}
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(60)
        end_tree(server.pid)


def wait_for_answer(url: str, question: str, deadline: float, log: Path) -> str:
    while time.monotonic() < deadline:
        try:
            return read_answer(url, question)
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def read_answer(url: str, question: str) -> str:
    body = json.dumps({"model": "model", "max_tokens": 16, "messages": [{"role": "user", "content": question}]})
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", body.encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])
