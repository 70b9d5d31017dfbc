"""Every stage on the built-in tiny model and a made-up company's documents, ending with an answer over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import Field
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from chatglm3.documents import parse_answer
from chatglm3.tiny.knowledge import write_shards
from cluster.config import Config
from cluster.errors import StageError
from pipelines.evaluation import EvaluateConfig, evaluate
from pipelines.merging import merge
from pipelines.preparation import PrepareConfig, prepare
from pipelines.run.training_config import TrainConfig
from pipelines.training import train
from pipelines.weights.merge_config import MergeConfig

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 120
# Small steps and a high rate: a model of 4 million parameters learns new words for old questions in one epoch.
RECIPE: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 8,
    "block_tokens": 1024,
    "learning_rate": 4e-3,
}
# Without quotes: to copy a sentence first is more than a model of this size learns in a minute.
ROWS: dict[str, Any] = {"distractors": 3, "quotes": False, "dev_share": 0.12}
console = Console(highlight=False)
# The endpoint is on this machine: a proxy that the environment names must not be asked for it.
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class DemoConfig(Config):
    """Run prepare, train, merge, evaluate and serve on the built-in tiny model, on CPU, in a few minutes."""

    out: str = "out/demo"
    """Folder for everything that is written."""
    samples: int = Field(1600, ge=100)
    """Made-up questions to learn from and to be examined on."""
    workers: int = Field(2, ge=1)
    """Training workers."""
    port: int = Field(0, ge=0, le=65535)
    """Port of the endpoint on 127.0.0.1; 0: a free one."""
    stay: bool = False
    """Keep the endpoint up at the end, until Ctrl-C."""


def demo(config: DemoConfig) -> str:
    """Go from shards to an HTTP answer and return the output folder."""
    started = time.monotonic()
    out = Path(config.out)
    port = _free_port(config.port)  # asked for now, because at the end it would be too late to say that it is taken
    _title("1. A knowledge base", "shards in the Multi-Doc-QA schema; the tiny model has seen none of these documents")
    for shard in (out / "raw").glob("demo-*.json"):
        shard.unlink()
    write_shards(out / "raw", "demo", config.samples, seed=1)
    _title("2. prepare", "check, split by document, build multi-document prompts with cited answers")
    data = prepare(PrepareConfig(raw=str(out / "raw"), out=str(out / "data"), **ROWS))
    _title("3. train", f"QLoRA on {config.workers} Ray workers")
    adapter = train(TrainConfig(data=data, out=str(out / "adapter"), workers=config.workers, use_gpu=False, **RECIPE))
    _title("4. merge", "fold the adapter into the 16-bit base")
    model = merge(MergeConfig(adapter=adapter, out=str(out / "model")))
    _title("5. evaluate", "unseen documents: the tuned model beside its base")
    evaluate(EvaluateConfig(model=model, data=data, out=str(out / "evaluation"), against="base", use_gpu=False))
    ray.shutdown()
    _title("6. serve", "the same model behind an OpenAI-compatible endpoint")
    _serve_and_ask(out, port, config.stay)
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. Pictures to look at:")
    for picture in ("data/report.html", "adapter/loss.png", "model/report.html", "evaluation/report.html"):
        console.print(f"  {out / picture}", soft_wrap=True)
    return config.out


def _title(name: str, text: str) -> None:
    console.print(f"\n[bold cyan]{name}[/] [dim]{text}[/]")


def _serve_and_ask(out: Path, port: int, stay: bool) -> None:
    file = out / "serve.yaml"
    settings = yaml.safe_load((ROOT / "serve_app/serve.yaml").read_text(encoding="utf-8"))
    settings["http_options"]["port"] = port
    settings["applications"][0]["args"]["model"] = str((out / "model").resolve())
    file.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    with _endpoint(file, out / "serve.log", port) as url:
        _ask(url, _unseen_question(out / "data"))
        if stay:
            console.print(f"\nThe endpoint stays up at {url}/v1/chat/completions; Ctrl-C ends it.")
            signal.pause()
    console.print(f"\n[dim]Start it again with: serve run {file}[/]")


@contextmanager
def _endpoint(file: Path, log: Path, port: int) -> Iterator[str]:
    """`serve run FILE` as a process of its own, up and healthy; stopped at the end."""
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
    url = f"http://127.0.0.1:{port}"
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=on_cpu, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_until_healthy(url, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # Serve drains its replicas and takes its Ray session down
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with console.status("starting the endpoint"):
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with direct.open(f"{url}/healthz", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
    code = process.poll()
    how = f"did not start within {START_TIMEOUT_S} s" if code is None else f"ended with exit code {code}"
    lines = [line for line in Text.from_ansi(log.read_text(errors="replace")).plain.splitlines() if line.strip()]
    raise StageError(f"the endpoint {how}; its log {log} ends with: {lines[-1].strip() if lines else '(nothing)'}")


def _unseen_question(data: Path) -> dict[str, Any]:
    """A dev row that has an answer in its documents."""
    with next((data / "dev").glob("*.jsonl")).open(encoding="utf-8") as rows:
        row: dict[str, Any] = next(row for row in map(json.loads, rows) if row["golden"])
        return row


def _ask(url: str, row: dict[str, Any]) -> None:
    """Print the row's documents and question, and the endpoint's answer as it streams."""
    console.print(f"\n[dim]POST {url}/v1/chat/completions[/]")
    console.print(escape(row["instruction"].rsplit("答：", 1)[0].split("\n\n", 1)[1].strip()), soft_wrap=True)
    console.print("[bold]答：[/]", end="")
    reply = ""
    for piece in _stream(url, row["instruction"]):
        reply += piece
        console.print(f"[bold green]{escape(piece)}[/]", end="")
    answer = parse_answer(reply)
    verdict = "right" if answer.text == row["answer"] else f"the documents say {row['answer']}"
    cited = ", ".join(map(str, answer.citations)) or "no document"
    console.print(f"   [dim]({verdict}; it cites {cited}, the answer is in {row['golden']})[/]")


def _stream(url: str, prompt: str) -> Iterator[str]:
    body = {"model": "model", "messages": [{"role": "user", "content": prompt}], "stream": True, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with direct.open(request, timeout=60) as response:
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    except urllib.error.HTTPError as error:
        raise StageError(f"the endpoint answered {error.code}: {error.read().decode()}") from None


def _free_port(port: int) -> int:
    """`port` if nobody listens on it, or a free one for 0. Raises StageError if it is taken."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StageError(f"--port {port}: {error.strerror}; choose another, or 0 for a free one") from None
        free: int = probe.getsockname()[1]
        return free
