"""predict asking a model that is served: one question, a chat, documents, and what goes wrong on the way."""

import io
from pathlib import Path
from typing import Any

import pytest

from chatglm3 import ModelError, load_tokenizer
from chatglm3.documents import REFUSAL, cited_answer
from pipelines.prediction import PredictConfig, predict
from serve_app import front
from serve_app.front import FrontArgs
from serve_app.keys import Limits, add_key
from serve_app.metrics import Metrics
from serve_app.routes import make_api
from tests.clockwork import Clockwork
from tests.http_server import served


@pytest.fixture
def documents(tmp_path: Path) -> str:
    (tmp_path / "sky.txt").write_text("天空是蓝色的。海洋也是。", encoding="utf-8")
    (tmp_path / "grass.txt").write_text("草地是绿色的。", encoding="utf-8")
    return f"{tmp_path}/sky.txt,{tmp_path}/grass.txt"


def api(engine: Any, **args: Any) -> Any:
    built = make_api(engine, load_tokenizer("tiny"), "tiny", "chat")
    front.install(built, FrontArgs(**args), engine, Metrics("tiny"))
    return built


def ask(url: str, **settings: Any) -> None:
    predict(PredictConfig.parse({"url": url, "question": "你好", **settings}, "flags"))


def test_one_question_writes_the_answer_and_nothing_else_to_stdout(capsys):
    with served(api(Clockwork("你好！"))) as url:
        ask(url)
        ask(f"{url}/v1/", model="tiny")
    assert capsys.readouterr().out == "你好！\n你好！\n"


def test_a_chat_sees_its_earlier_turns(capsys, monkeypatch):
    engine = Clockwork("好")
    monkeypatch.setattr("sys.stdin", io.StringIO("一\n二\n/clear\n三\n"))
    with served(api(engine)) as url:
        ask(url, question=None)
    assert capsys.readouterr().out == "好\n好\n好\n"
    assert len(engine.asked[1]) > len(engine.asked[0]) == len(engine.asked[2])


def test_an_answer_from_documents_tells_where_it_stands(capsys, documents):
    with served(api(Clockwork(cited_answer("绿色", 2, "草地是绿色的。")))) as url:
        ask(url, documents=documents)
    out, err = capsys.readouterr()
    assert out == "绿色\n"
    assert err.strip() == f"{documents.split(',')[1]}, characters 0 to 7: 草地是绿色的。"
    with served(api(Clockwork(REFUSAL))) as url:
        ask(url, documents=documents)
    assert capsys.readouterr() == (f"{REFUSAL}\n", "")


def test_a_key_comes_from_a_file(capsys, tmp_path):
    (tmp_path / "key").write_text(add_key(tmp_path / "keys", "a", Limits()) + "\n")
    with served(api(Clockwork("好"), api_keys=str(tmp_path / "keys"))) as url:
        ask(url, api_key_file=str(tmp_path / "key"))
        with pytest.raises(ModelError, match=r"a valid API key is needed: .*; give a valid one with --api_key_file"):
            ask(url)
    assert capsys.readouterr().out == "好\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "other"}, "model 'other' is not served here"),
        ({"max_tokens": 9000}, "context of 8192|9000"),
        ({"api_key_file": "/nowhere"}, r"--api_key_file /nowhere cannot be read \(No such file or directory\)"),
    ],
)
def test_what_the_server_refuses_is_one_line(tiny_url, settings, message):
    with pytest.raises(ModelError, match=message) as error:
        ask(tiny_url, **settings)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def tiny_url():
    from chatglm3.engines import load_engine

    engine = load_engine("transformers", "tiny", max_batch=1)
    with served(api(engine)) as url:
        yield url
    engine.close()


def test_an_answer_that_breaks_off_and_a_server_that_is_gone_are_told(capsys):
    with served(api(Clockwork("好💥"))) as url, pytest.raises(ModelError, match="the answer broke off: "):
        ask(url)
    assert capsys.readouterr().out == "好"
    with pytest.raises(ModelError, match=r"cannot be asked: .*; correct --url or start it"):
        ask(url)
