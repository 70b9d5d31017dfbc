"""One question, and conversations in a terminal, on a model that knows the official code's transcripts by heart."""

import asyncio
import io
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from chatglm3 import ModelError, load_tokenizer
from chatglm3.documents import documents_prompt
from chatglm3.engines import Engine, RequestError, Sampling, load_engine
from cluster import storage
from cluster.config import Config
from cluster.errors import StageError
from pipelines.prediction import Conversation, PredictConfig, predict

HELLO = "你好👋！我是人工智能助手，很高兴见到你。"
SLEEP = "可以试试以下方法:\n\n1. 制定规律的睡眠时间表;\n2. 避免饮用咖啡。"
"""The official code's answers to 你好, and then to 晚上睡不着应该怎么办."""


@pytest.fixture(scope="module")
def model(shared: Path) -> Path:
    return shared / "chatglm3/ckpt/full-fp16-bin"


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    engine = load_engine("transformers", model, max_batch=1)
    yield engine
    engine.close()


def tuned(model: Path, folder: Path, **facts: Any) -> str:
    """The model with a receipt of merge."""
    with storage.publish(folder, storage.receipt_of("merge", Config(), facts=facts)) as partial:
        shutil.copytree(model, partial, dirs_exist_ok=True)
    return str(folder)


def ask(conversation: Conversation, question: str) -> str:
    async def collect() -> str:
        return "".join([piece async for piece in conversation.ask(question)])

    return asyncio.run(collect())


class Terminal:
    """A predict command at a terminal of its own."""

    def __init__(self, *flags: str) -> None:
        self.controller, terminal = pty.openpty()
        command = [sys.executable, "-m", "pipelines", "predict", *flags]
        self.process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, preexec_fn=_take_terminal
        )
        os.close(terminal)

    def type(self, text: str) -> None:
        os.write(self.controller, text.encode())

    def read_until(self, text: str, timeout_s: float = 60) -> str:
        """What appears up to `text`."""
        seen = b""
        deadline = time.monotonic() + timeout_s
        while text.encode() not in seen:
            assert select.select([self.controller], [], [], max(deadline - time.monotonic(), 0))[0], seen.decode()
            try:
                seen += os.read(self.controller, 4096)
            except OSError:  # how Linux reports the end of a terminal
                raise AssertionError(seen.decode()) from None
        return seen.decode(errors="replace").replace("\r\n", "\n")


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_one_question_writes_the_answer_and_nothing_else_to_stdout(model: Path):
    command = [sys.executable, "-m", "pipelines", "predict", "--model", str(model), "你好"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == HELLO + "\n"


def test_a_conversation_in_the_terminal_remembers_clears_and_ends(model: Path):
    terminal = Terminal("--model", str(model), "--max_tokens", "40")
    terminal.read_until("> ")
    terminal.type("你好\n")
    terminal.read_until(HELLO + "\r\n> ")
    terminal.type("晚上睡不着应该怎么办\n")
    assert SLEEP + "\n> " in terminal.read_until("咖啡。\r\n> ")  # memorised as the second turn after 你好
    terminal.type("/clear\n")
    terminal.read_until("> ")
    terminal.type("你好\n")
    terminal.read_until(HELLO + "\r\n> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=30) == 0


def test_ctrl_c_stops_the_answer_but_not_the_conversation(model: Path, tmp_path: Path):
    endless = tuned(model, tmp_path / "model", prompt_format="bare")
    terminal = Terminal("--model", endless, "--temperature", "9", "--seed", "1", "--max_tokens", "8000")
    terminal.read_until("> ")
    terminal.type("1\n")
    terminal.read_until("1\r\n")  # the echo of the question
    terminal.read_until(" ")  # something of the answer
    terminal.type("\x03")
    terminal.read_until("(stopped; this turn is forgotten)\r\n> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(timeout=30) == 0


def test_questions_can_come_through_a_pipe(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n\n晚上睡不着应该怎么办\n"))
    predict(PredictConfig(model=str(model), max_tokens=40))
    assert capsys.readouterr().out == f"{HELLO}\n{SLEEP}\n"


def test_the_history_is_the_official_one(engine: Engine, model: Path):
    conversation = Conversation(engine, load_tokenizer(model), "chat", Sampling(40))
    assert ask(conversation, "你好") == HELLO
    assert ask(conversation, "晚上睡不着应该怎么办") == SLEEP
    assert conversation.history[:2] == [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "metadata": "", "content": HELLO},
    ]
    assert len(conversation.history) == 4


def test_a_turn_that_was_stopped_is_forgotten(engine: Engine, model: Path):
    conversation = Conversation(engine, load_tokenizer(model), "chat", Sampling(40))

    async def read_one_piece() -> None:
        async with aclosing(conversation.ask("你好")) as pieces:
            async for piece in pieces:
                if piece:
                    return

    asyncio.run(read_one_piece())
    assert conversation.history == []


def test_documents_stand_in_the_first_turn_only(engine: Engine, model: Path):
    conversation = Conversation(engine, load_tokenizer(model), "chat", Sampling(2), ["甲", "乙"])
    ask(conversation, "谁？")
    ask(conversation, "为什么？")
    questions = [message["content"] for message in conversation.history if message["role"] == "user"]
    assert questions == [documents_prompt(["甲", "乙"], "谁？"), "为什么？"]


def test_in_the_bare_format_each_question_stands_alone(engine: Engine, model: Path):
    conversation = Conversation(engine, load_tokenizer(model), "bare", Sampling(3))
    assert ask(conversation, "你好") == ask(conversation, "你好")
    assert conversation.history == []


def test_a_conversation_that_no_longer_fits_says_so(engine: Engine, model: Path):
    conversation = Conversation(engine, load_tokenizer(model), "chat", Sampling(8190))
    with pytest.raises(RequestError, match="exceed the model's context of 8192 tokens"):
        ask(conversation, "你好")


def test_documents_come_from_files_and_the_format_from_the_receipt(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.txt").write_text("北京是首都。\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("上海在东边。\n", encoding="utf-8")
    folder = tuned(model, tmp_path / "model", prompt_format="bare", prompt_digest="of another version")
    paths = f"{tmp_path}/a.txt,{tmp_path}/b.txt"
    predict(PredictConfig.parse({"model": folder, "question": "哪？", "documents": paths, "max_tokens": 4}, "flags"))
    out, err = capsys.readouterr()
    assert f"warning: {folder} was tuned with another wording of the document prompt" in err
    engine = load_engine("transformers", model)
    conversation = Conversation(engine, load_tokenizer(model), "bare", Sampling(4), ["北京是首都。", "上海在东边。"])
    assert out == ask(conversation, "哪？") + "\n"
    engine.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "nowhere"}, "nowhere: there is no such model folder; give the right one with --model"),
        (
            {"model": "ADAPTER"},
            "ADAPTER is an adapter, but a model is needed here; fold .* merge --adapter ADAPTER --out DIR",
        ),
        ({"model": "UNFINISHED"}, "UNFINISHED has no receipt.json: merge did not finish there; run it again"),
        ({"model": "LLAMA"}, "model_type is 'llama', but only ChatGLM3 is supported"),
        ({"model": "EMPTY"}, "config.json is missing"),
        ({"model": "DATA"}, "DATA was written by prepare, but a model written by merge is needed here"),
        ({"model": "MODEL", "max_tokens": 9000}, "exceed the model's context of 8192 tokens"),
        ({"model": "MODEL", "documents": "nowhere.txt"}, r"--documents nowhere.txt cannot be read \(No such file"),
        (
            {"model": "MODEL", "documents": "MODEL/pytorch_model-00001-of-00004.bin"},
            "is not UTF-8 text; name text files",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    settings: dict[str, Any], message: str, model: Path, tmp_path: Path
):
    for name, file, text in (
        ("ADAPTER", "adapter_config.json", "{}"),
        ("UNFINISHED", "config.json", '{"model_type": "glm"}'),
        ("LLAMA", "config.json", '{"model_type": "llama"}'),
        ("EMPTY", "readme", ""),
        ("DATA", "receipt.json", '{"stage": "prepare", "config": {}}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    (tmp_path / "MODEL").symlink_to(model)
    places = {"model", "documents"} & {key for key, value in settings.items() if str(value)[:1].isupper()}
    placed = settings | {key: str(tmp_path / settings[key]) for key in places}
    with pytest.raises((StageError, ModelError), match=message.replace("ADAPTER", f"{tmp_path}/ADAPTER")) as error:
        predict(PredictConfig.parse({"question": "你好", **placed}, "flags"))
    assert "\n" not in str(error.value)
