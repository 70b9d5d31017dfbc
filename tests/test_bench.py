"""The load generator: when it asks, what it measures, and what it makes of failures."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatglm3 import load_tokenizer
from chatglm3.endpoint import Endpoint
from cluster.errors import StageError
from serve_app import front
from serve_app.bench import BenchConfig, bench
from serve_app.front import FrontArgs
from serve_app.load import Outcome, Prompt, at_once, at_times, poisson
from serve_app.load_report import in_flight, summarize
from serve_app.metrics import Metrics
from serve_app.prompts import read_prompts
from serve_app.routes import make_api
from tests.clockwork import Clockwork
from tests.http_server import served

HELLO = [{"role": "user", "content": "你好"}]


def api(engine: Any, **args: Any) -> Any:
    built = make_api(engine, load_tokenizer("tiny"), "tiny", "chat")
    front.install(built, FrontArgs(**args), engine, Metrics("tiny"))
    return built


def load(url: str, run: Any) -> list[Outcome]:
    async def session() -> list[Outcome]:
        async with Endpoint(url, timeout_s=20) as endpoint:
            return list(await run(endpoint))

    return asyncio.run(session())


def test_users_arrive_at_random_at_the_asked_rate():
    times = poisson(20.0, 4000, seed=1)
    gaps = np.diff(times)
    assert abs(gaps.mean() - 0.05) < 0.003
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05  # as exponential gaps have it
    assert poisson(20.0, 4000, seed=1) == times != poisson(20.0, 4000, seed=2)


def test_an_open_loop_does_not_wait_for_answers():
    prompts = [Prompt(HELLO, 8)] * 10
    with served(api(Clockwork("你好", step_s=0.3))) as url:
        outcomes = load(url, lambda endpoint: at_times(endpoint, "tiny", prompts, [0.02 * i for i in range(10)]))
    assert max(outcome.sent - outcome.due for outcome in outcomes) < 1  # after an answer it would be 1.2
    assert in_flight(outcomes)[1].max() == 10
    for outcome in outcomes:
        assert len(outcome.texts) == 2
        assert (outcome.completion_tokens, outcome.error) == (4, "")
        assert outcome.texts[0] - outcome.due > 0.55
        assert outcome.ended - outcome.due > 1.1
    assert 0.25 < np.median([outcome.gaps[0] for outcome in outcomes]) < 0.6


def test_a_closed_loop_has_so_many_under_way_and_no_more():
    engine = Clockwork("你好", step_s=0.05)
    with served(api(engine)) as url:
        outcomes = load(url, lambda endpoint: at_once(endpoint, "tiny", [Prompt(HELLO, 8)] * 12, 3))
    assert len(outcomes) == len(engine.asked) == 12
    assert in_flight(outcomes)[1].max() == 3


def test_failures_are_counted_by_kind():
    with served(api(Clockwork("你💥"))) as url:
        broken = load(url, lambda endpoint: at_once(endpoint, "tiny", [Prompt(HELLO, 8)], 1))
        missing = load(url, lambda endpoint: at_once(endpoint, "other", [Prompt(HELLO, 8)], 1))
    gone = load(url, lambda endpoint: at_once(endpoint, "tiny", [Prompt(HELLO, 8)], 1))
    with served(api(Clockwork("你好", step_s=1), max_inflight=1)) as url:
        busy = load(url, lambda endpoint: at_times(endpoint, "tiny", [Prompt(HELLO, 8)] * 2, [0.0, 0.2]))
    assert [outcome.error for outcome in (*broken, *missing, *gone, *busy)] == [
        "broke off: engine_error",
        "HTTP 404 model_not_found",
        "ClientConnectorError",
        "",
        "HTTP 503 overloaded",
    ]


def test_latencies_count_from_when_a_request_was_due():
    first = Outcome(due=0.0, sent=0.5, texts=[1.0, 1.5], ended=2.0, prompt_tokens=10, completion_tokens=3)
    second = Outcome(due=1.0, sent=1.0, texts=[4.0], ended=4.0, prompt_tokens=20, completion_tokens=5)
    failed = Outcome(due=0.0, sent=0.0, texts=[], ended=0.1, error="timeout")
    summary = summarize([first, second, failed])
    assert summary["errors"] == {"timeout": 1}
    assert (summary["requests"], summary["answered"], summary["most_in_flight"]) == (3, 2, 2)
    assert (summary["output_tokens_per_s"], summary["prompt_tokens_per_s"]) == (2.0, 7.5)
    assert summary["first_token_ms"]["mean"] == 2000
    assert summary["between_pieces_ms"]["p50"] == 500
    assert (summary["a_token_ms"]["p50"], summary["a_token_ms"]["max"]) == (250, 500)
    assert (summary["whole_answer_ms"]["p50"], summary["whole_answer_ms"]["max"]) == (2500, 3000)


def test_tokens_that_come_as_one_piece_share_its_time():
    joined = Outcome(due=0.0, sent=0.0, texts=[1.0, 2.0], ended=2.0, prompt_tokens=1, completion_tokens=11)
    summary = summarize([joined])
    assert (summary["a_token_ms"]["p50"], summary["between_pieces_ms"]["p50"]) == (100, 1000)


def test_prompts_come_from_a_file_from_prepare_or_by_length(tmp_path):
    rows = [
        {"instruction": "甲", "output": "乙", "max_tokens": 5},
        {"prompt": "丙"},
        {"messages": [*HELLO, {"role": "assistant", "content": "好"}]},
        {"prompt_tokens": 40},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = read_prompts(str(tmp_path / "rows.jsonl"), 8, 9, 1, seed=0)
    contents = [prompt.messages[-1]["content"] for prompt in prompts]
    assert sorted(contents[:4], key=len)[:2] in (["甲", "丙"], ["丙", "甲"])
    assert {prompt.max_tokens for prompt in prompts if prompt.messages[0]["content"] == "甲"} == {5}
    assert sum(content == "你好" for content in contents) == 2
    [random_text, other] = [content for content in contents if len(content) == 40]
    assert random_text != other  # a prefix cache must not know it
    assert abs(len(load_tokenizer("tiny").encode(random_text)) - 40) < 20
    (tmp_path / "data" / "dev").mkdir(parents=True)
    (tmp_path / "data" / "dev" / "a.jsonl").write_text(json.dumps(rows[0]))
    assert read_prompts(str(tmp_path / "data"), 1, 9, 1, seed=0) == [Prompt([{"role": "user", "content": "甲"}], 5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not readable JSON Lines"), ("", "has no rows"), ('{"a": 1}', "line 1 has none of instruction, prompt")],
)
def test_rows_that_cannot_be_asked_are_named(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(StageError, match=message):
        read_prompts(str(tmp_path / "rows.jsonl"), 1, 1, 1, seed=0)


def test_one_loop_is_chosen():
    with pytest.raises(StageError, match=r"give either --rate .* or --concurrency"):
        BenchConfig.parse({}, "flags")
    with pytest.raises(StageError, match=r"give either --rate .* or --concurrency"):
        BenchConfig.parse({"rate": 1, "concurrency": 1}, "flags")


def test_the_command_prints_a_table_and_writes_a_folder(tmp_path: Path):
    out = tmp_path / "bench"
    with served(api(Clockwork("你好"))) as url:
        command = ["bench", "--url", url, "--rate", "50", "--requests", "20", "--out", str(out)]
        done = subprocess.run([sys.executable, "-m", "serve_app", *command], capture_output=True, text=True, check=True)
    assert "20 of 20 answered" in done.stdout
    assert "first token" in done.stdout
    assert {path.name for path in out.iterdir()} == {"summary.json", "requests.jsonl", "load.svg", "receipt.json"}
    assert json.loads((out / "summary.json").read_text())["answered"] == 20
    assert len((out / "requests.jsonl").read_text().splitlines()) == 20


def test_a_load_that_nobody_answered_is_an_error(tmp_path):
    with served(api(Clockwork("💥"))) as url:
        config = BenchConfig.parse({"url": url, "concurrency": 2, "requests": 3, "out": str(tmp_path / "b")}, "flags")
        with pytest.raises(StageError, match=r"none of 3 requests .* was answered: .*engine_error': 3"):
            bench(config)
    assert not (tmp_path / "b").exists()


def test_the_commands_are_listed_without_loading_them():
    code = "import sys, serve_app.__main__; print({'torch', 'ray', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    done = subprocess.run([sys.executable, "-m", "serve_app"], capture_output=True, text=True, check=True)
    assert "keys add NAME --file FILE" in done.stdout
