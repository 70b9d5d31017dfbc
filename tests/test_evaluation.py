"""Models asked over Ray Data: rows in order, scores to the digit, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatglm3 import ModelError
from chatglm3.documents import REFUSAL
from cluster import storage
from cluster.config import Config
from cluster.errors import StageError
from pipelines.evaluation import EvaluateConfig, evaluate, read_rows
from pipelines.merging import MergeConfig, merge

HELLO = "你好👋！我是人工智能助手，很高兴见到你。"
"""What the model of these tests knows by heart as the answer to 你好."""


@pytest.fixture(scope="module")
def model(shared: Path) -> Path:
    return shared / "chatglm3/ckpt/full-fp16-bin"


def prepared(folder: Path, rows: list[dict[str, Any]], split: str = "dev", **facts: str) -> str:
    """A data folder as prepare writes it, the rows in two files."""
    with storage.publish(folder, storage.receipt_of("prepare", Config(), facts=facts)) as partial:
        (partial / split).mkdir()
        for number, part in enumerate((rows[:7], rows[7:])):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (partial / split / f"part-{number}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


def test_two_models_are_scored_on_the_same_rows_in_their_order(
    ray_cluster: None, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Ten rows the model knows, with the numbers to tell them apart; two it cannot know; the base knows as much."""
    known = {"instruction": "你好", "output": f"{HELLO}[1]", "answer": HELLO, "golden": 1}
    rows = [known | {"id": f"a.json:{number}"} for number in range(10)]
    rows[3] = {"instruction": "你好", "output": REFUSAL, "answer": REFUSAL, "golden": None, "id": "a.json:3"}
    rows[8] = {"instruction": "你好", "output": "你好👋", "id": "a.json:8"}
    data = prepared(tmp_path / "data", rows)
    tuned = merge(MergeConfig(base=str(model), out=str(tmp_path / "model")))
    capsys.readouterr()
    config = EvaluateConfig(
        model=tuned,
        against="base",
        data=data,
        out=str(tmp_path / "scores"),
        max_tokens=24,
        workers=2,
        batch_size=2,
        use_gpu=False,
    )
    out = Path(evaluate(config))

    written = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in written] == [f"a.json:{number}" for number in range(10)]
    assert all(0 < row[name]["seconds"] < 60 for row in written for name in ("model", "against"))
    seconds = [row["model"].pop("seconds") for row in written]
    assert written[0]["model"] == {
        "prediction": HELLO, "tokens": 18, "exact_match": 1.0, "f1": 1.0, "rouge_l": 1.0,
        "citation_accuracy": 0.0, "citation_recall": 0.0,
    }  # fmt: skip
    assert written[3]["model"] == {
        "prediction": HELLO, "tokens": 18, "exact_match": 0.0, "f1": 0.0, "rouge_l": 0.0, "refusal_recall": 0.0,
    }  # fmt: skip
    assert written[8]["gold"] == "你好👋"
    assert "citation_accuracy" not in written[8]["model"]

    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert list(scores) == ["against", "model", "comparison", "data"]
    assert (scores["against"]["folder"], scores["model"]["folder"]) == (str(model), tuned)
    exact = scores["model"]["exact_match"]
    assert (exact["value"], exact["n"]) == (0.8, 10)
    assert exact["low"] < 0.8 < exact["high"]
    assert (scores["model"]["citation_accuracy"]["n"], scores["model"]["refusal_recall"]["n"]) == (8, 1)
    assert scores["model"]["answer_tokens"] == {"mean": 18.0, "p50": 18.0, "p95": 18.0, "max": 18.0}
    assert scores["model"]["answer_seconds"]["max"] == max(seconds)
    assert {place: found["n"] for place, found in scores["model"]["f1_by_golden_position"].items()} == {"1": 8}
    exact = scores["comparison"]["exact_match"]
    assert (exact["new"], exact["old"], exact["difference"], exact["p"], exact["n"]) == (0.8, 0.8, 0.0, 1.0, 10)
    assert {name: scores["data"][name] for name in ("folder", "split", "limit", "rows")} == {
        "folder": data, "split": "dev", "limit": 0, "rows": 10,
    }  # fmt: skip
    assert "answered wrongly 1<" in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert storage.open_folder(out, "evaluate").receipt.counts == {"rows": 10}
    printed = capsys.readouterr().out
    assert "10 rows" in printed
    assert "exact_match" in printed
    assert "80.0" in printed


def test_a_gate_ends_the_stage_with_the_folder_written_when_the_model_has_become_worse(
    ray_cluster: None, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The second model is the first one cut off after four tokens."""
    known = {"instruction": "你好", "output": HELLO}
    data = prepared(tmp_path / "data", [known | {"id": str(number)} for number in range(30)])
    config = EvaluateConfig(model=str(model), data=data, out=str(tmp_path / "first"), max_tokens=24, use_gpu=False)
    first = evaluate(config)
    assert "gate" not in json.loads(Path(first, "scores.json").read_text())
    again = config.model_copy(update={"out": str(tmp_path / "again"), "gate": f"{first}/scores.json"})
    evaluate(again)
    assert f"gate passed: {model} is not worse than {model} on the same 30 rows" in capsys.readouterr().out
    assert storage.open_folder(tmp_path / "again", "evaluate").receipt.facts == {"gate_passed": True}

    worse = again.model_copy(update={"out": str(tmp_path / "worse"), "gate": first, "max_tokens": 4})
    with pytest.raises(StageError, match=r"is worse than .*exact_match -100.0 points \(100.0 to 0.0; 95 % ") as error:
        evaluate(worse)
    assert str(error.value).startswith(f"--gate {first}: {model} is worse than {model} on the same 30 rows: ")
    assert str(error.value).endswith(f"; look at {tmp_path}/worse/report.html")
    assert "\n" not in str(error.value)
    folder = storage.open_folder(tmp_path / "worse", "evaluate")
    assert folder.receipt.facts == {"gate_passed": False}
    assert folder.receipt.inputs[first] == storage.open_folder(first).digest
    assert json.loads((folder.path / "scores.json").read_text())["gate"]["passed"] is False
    assert "&#10007; worse than" in (folder.path / "report.html").read_text(encoding="utf-8")

    with pytest.raises(StageError, match=r"--out .*first is also an input, which would be lost; name another folder"):
        evaluate(again.model_copy(update={"out": first}))


def test_a_question_that_does_not_fit_gets_no_answer_and_a_damaged_model_ends_the_stage(
    ray_cluster: None, model: Path, tmp_path: Path
):
    long = {"instruction": "长" * 9000, "output": "长"}
    data = prepared(tmp_path / "data", [long, {"instruction": "你好", "output": HELLO}])
    config = EvaluateConfig(model=str(model), data=data, out=str(tmp_path / "scores"), max_tokens=24)
    rows = [json.loads(line) for line in Path(evaluate(config), "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["model"]["prediction"] for row in rows] == ["", HELLO]
    assert [row["model"]["tokens"] for row in rows] == [0, 18]

    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    file = damaged / "pytorch_model-00002-of-00004.bin"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(StageError, match=r"asking .*damaged failed: .*00002-of-00004.bin is damaged") as error:
        evaluate(config.model_copy(update={"model": str(damaged), "out": str(tmp_path / "none")}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "none").exists()


def test_a_model_tuned_on_other_wording_than_the_datas_is_asked_with_a_warning(
    ray_cluster: None, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = prepared(tmp_path / "data", [{"instruction": "你好", "output": HELLO}], prompt_digest="old wording")
    base = merge(MergeConfig(base=str(model), out=str(tmp_path / "base")))
    for wording in ("old wording", "new wording"):
        folder = shutil.copytree(base, tmp_path / wording.split()[0])
        receipt = json.loads((folder / "receipt.json").read_text())
        receipt["facts"]["prompt_digest"] = wording
        (folder / "receipt.json").write_text(json.dumps(receipt))
        evaluate(EvaluateConfig(model=str(folder), data=data, out=str(tmp_path / "scores"), max_tokens=24))
        wanted = f"warning: {folder} was tuned with another wording of the document prompt than that of --data {data};"
        assert (wanted in capsys.readouterr().err) == (wording == "new wording")


def test_a_limit_draws_the_same_rows_every_time_in_their_order(tmp_path: Path):
    data = prepared(tmp_path / "data", [{"instruction": str(number), "output": "x"} for number in range(100)])
    drawn = [int(row["instruction"]) for row in read_rows(EvaluateConfig(data=data, limit=10))]
    assert len(drawn) == 10
    assert drawn == sorted(drawn)
    assert drawn[-1] > 50
    assert drawn == [int(row["instruction"]) for row in read_rows(EvaluateConfig(data=data, limit=10))]
    assert len(read_rows(EvaluateConfig(data=data, limit=1000))) == 100


def no_data(model: Path, tmp: Path) -> dict[str, str]:
    return {"model": str(model), "data": str(tmp / "nowhere")}


def no_dev_rows(model: Path, tmp: Path) -> dict[str, str]:
    return {"model": str(model), "data": prepared(tmp / "data", [{"instruction": "1", "output": "1"}], "train")}


def no_train_rows(model: Path, tmp: Path) -> dict[str, str]:
    rows: list[dict[str, Any]] = [{"messages": []}]
    return {"model": str(model), "data": prepared(tmp / "data", rows, "train"), "split": "train"}


def base_of_an_official_model(model: Path, tmp: Path) -> dict[str, str]:
    return {"model": str(model), "against": "base", "data": prepared(tmp / "data", [])}


def an_adapter(model: Path, tmp: Path) -> dict[str, str]:
    (tmp / "adapter").mkdir()
    (tmp / "adapter/adapter_config.json").write_text("{}")
    return {"model": str(tmp / "adapter")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_data, "nowhere: there is no such folder; run prepare first"),
        (no_dev_rows, "has no dev rows with a question; prepare again with a larger --dev_share$"),
        (no_train_rows, "has no train rows with a question; prepare again from shards with questions$"),
        (base_of_an_official_model, "--against base: no receipt says what .* was tuned from; name that model's folder"),
        (an_adapter, "is an adapter, but a model is needed here; fold it into its base first: merge --adapter"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_starts(
    make: Callable[[Path, Path], dict[str, str]], message: str, model: Path, tmp_path: Path
):
    config = EvaluateConfig(**make(model, tmp_path), out=str(tmp_path / "scores"))
    with pytest.raises((StageError, ModelError), match=message) as error:
        evaluate(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "scores").exists()
