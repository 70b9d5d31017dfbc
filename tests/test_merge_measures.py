"""A merged model beside base and live adapter: what is measured, which form is kept, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm3 import ModelError, load_model, load_tokenizer
from chatglm3.adapters import load_adapter
from chatglm3.chat import render
from chatglm3.tiny.exam import demo_lessons
from cluster import storage
from cluster.errors import StageError
from pipelines.folding import folded
from pipelines.merging import MergeConfig, merge
from pipelines.weight_formats import through_nf4
from tests.merge_inputs import demo_rows, kl, tuned_adapter, tuned_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return demo_rows(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tuned_tiny(tmp_path_factory.mktemp("tuned") / "adapter")


def test_a_merge_is_measured_beside_the_model_as_it_was_trained(tuned: str, data: str, tmp_path: Path):
    out = Path(merge(MergeConfig(adapter=tuned, data=data, format="w4a16", out=str(tmp_path / "model"))))
    counts = storage.open_folder(out).receipt.counts
    assert 0 < counts["kl"] < 0.1
    assert 0.9 < counts["top1"] <= 1
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    for name in ("NF4 base with live adapter", "merged, bf16", "merged, w4a16"):
        assert name in page
        assert f"| {name} | " in card
    assert "<svg" in page
    nearest = merge(MergeConfig(adapter=tuned, data=data, format="w4a16", calibrate=False, out=str(tmp_path / "near")))
    assert counts["kl"] < storage.open_folder(nearest).receipt.counts["kl"], "GPTQ is nearer than the nearest values"


def test_onto_auto_keeps_what_answers_better(tuned: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = MergeConfig(adapter=tuned, data=data, format="nf4", out=str(tmp_path / "model"))
    losses = {}
    for onto in ("16bit", "nf4", "auto"):
        out = merge(config.model_copy(update={"onto": onto}))
        losses[onto] = storage.open_folder(out).receipt.counts["loss"]
    assert losses["auto"] == min(losses.values())
    assert storage.open_folder(out).receipt.facts["onto"] == min(("16bit", "nf4"), key=lambda onto: losses[onto])
    assert {path.name for path in Path(out).iterdir() if path.is_dir()} == set()


def test_a_bad_merge_is_refused_and_says_by_how_much(
    tuned: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The commonest silent mistakes: the adapter is folded in twice, and into 4-bit weights in place."""

    def folded_twice_in_place(weight: torch.Tensor, updates: Any) -> torch.Tensor:
        return folded(through_nf4(folded(weight, updates).bfloat16()), updates)

    config = MergeConfig(adapter=tuned, data=data, out=str(tmp_path / "model"))
    right = storage.open_folder(merge(config)).receipt.counts
    monkeypatch.setattr("pipelines.folding.folded", folded_twice_in_place)
    bad = config.model_copy(update={"out": str(tmp_path / "bad")})
    with pytest.raises(
        StageError, match=r"too far from NF4 base .*: KL \d\.\d+, the limit is 0.1.*; loss .*--keep true"
    ) as error:
        merge(bad)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bad").exists()
    wrong = storage.open_folder(merge(bad.model_copy(update={"keep": True}))).receipt.counts
    assert right["kl"] < 0.05 < 0.1 < wrong["kl"]


def test_a_model_of_the_bare_format_is_not_measured_on_conversations(tmp_path: Path):
    (tmp_path / "dev").mkdir()
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    (tmp_path / "dev/part-00000.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    config = MergeConfig(base="tiny", prompt_format="bare", data=str(tmp_path), measure=True, out=str(tmp_path / "out"))
    with pytest.raises(ModelError, match="a conversation has turns, which --prompt_format bare has not"):
        merge(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weight_format", "least_agreement", "most_kl"), [("bf16", 0.97, 0.001), ("int8", 0.95, 0.003), ("nf4", 0.92, 0.03)]
)
def test_the_formats_agree_with_base_and_live_adapter_as_measured(
    weight_format: str, least_agreement: float, most_kl: float, tmp_path: Path
):
    """Top-1 agreement and KL on the answers to 24 questions of the demo: 0.99, 0.98, 0.97; 0.0002, 0.001, 0.011."""
    tuned_adapter("tiny", tmp_path / "adapter", std=0.01)
    merge(MergeConfig(adapter=str(tmp_path / "adapter"), base="tiny", format=weight_format, out=str(tmp_path / "out")))
    live = load_adapter(load_model("tiny", dtype=torch.float32), tmp_path / "adapter")
    wanted, found = answer_logits(live), answer_logits(load_model(tmp_path / "out"))
    assert (wanted.argmax(-1) == found.argmax(-1)).float().mean() > least_agreement
    assert kl(wanted, found) < most_kl


def answer_logits(model: Any) -> torch.Tensor:
    """Logits of every token of the right answers to ten of the demo's questions."""
    tokenizer = load_tokenizer("tiny")
    rows = []
    for lesson in demo_lessons(10):
        ids, is_target = render(tokenizer, lesson.messages)
        with torch.inference_mode():
            rows.append(model(torch.tensor([ids])).logits[0, :-1][torch.tensor(is_target[1:])])
    return torch.cat(rows).float()
