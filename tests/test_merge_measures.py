"""A merged model beside base and live adapter: what is measured, which form is kept, and what is refused."""

import asyncio
import gc
import json
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm3 import ModelError, load_model, load_tokenizer
from chatglm3.adapters import load_adapter
from chatglm3.chat import render
from chatglm3.engines import Sampling, load_engine
from chatglm3.tiny.exam import demo_lessons
from cluster import storage
from cluster.commands import run_command
from cluster.errors import StageError
from pipelines.__main__ import STAGES
from pipelines.evaluation import EvaluateConfig
from pipelines.merging import MergeConfig, merge
from pipelines.model_folders import open_model
from pipelines.scores.answering import ask_all
from pipelines.scores.metrics import summarize
from pipelines.scores.questions import Row, read_questions, score_answer
from pipelines.weights.agreement import Agreement, Example
from pipelines.weights.folding import MergedWeights, folded
from pipelines.weights.merge_measures import best_of
from pipelines.weights.weight_formats import through_nf4
from pipelines.weights.yardstick import Measured, live_model, load_on_device
from tests.merge_inputs import kl, trained_tiny, tuned_adapter

SETTINGS: dict[str, Any] = {"score_rows": 8, "score_tokens": 48}


@pytest.fixture(scope="module")
def tuned(rows: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained_tiny(tmp_path_factory.mktemp("tuned") / "adapter", rows)


@pytest.fixture(scope="module")
def in_bf16(tuned: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Answers of the merged model, not quantised, to questions it was tuned on."""
    out = merge(MergeConfig(adapter=tuned, measure=False, out=str(tmp_path_factory.mktemp("bf16") / "model")))
    return answers(out, read_questions(Path(rows, "train"), 24))


def test_a_merge_is_measured_beside_the_model_as_it_was_trained(tuned: str, rows: str, tmp_path: Path):
    config = MergeConfig(adapter=tuned, format="w4a16", out=str(tmp_path / "model"), **SETTINGS)
    out = Path(merge(config))
    receipt = storage.open_folder(out).receipt
    counts = receipt.counts
    assert 0 < counts["kl"] < 0.1
    assert 0.9 < counts["top1"] <= 1
    assert abs(counts["loss"] - counts["reference_loss"]) < 0.1
    assert receipt.inputs[rows] == storage.open_folder(rows).digest
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    for name in ("NF4 base with live adapter", "merged, bf16", "merged, w4a16"):
        assert name in page
        assert f"| {name} | " in card
    assert "<svg" in page
    assert "rank 16, alpha 32, targets" in card
    assert "base format nf4, learning rate 0.004, epochs 0.5, batch size 4, seed 1 |" in card
    assert 0 < counts["gptq_error"] < counts["nearest_error"] < 0.1
    errors = f"outputs off by {counts['gptq_error']:.2%}, with the nearest values {counts['nearest_error']:.2%}"
    assert f"<p>w4a16 by GPTQ: {errors}</p>" in page
    assert f"| calibration | w4a16 by GPTQ: {errors} |" in card
    nearest = merge(config.model_copy(update={"calibrate": False, "out": str(tmp_path / "near")}))
    assert counts["kl"] < storage.open_folder(nearest).receipt.counts["kl"], "GPTQ is nearer than the nearest values"


def test_a_quantised_model_is_gone_before_the_next_one_is_loaded(tiny: Path):
    gc.disable()  # as if it had no reason to run
    try:
        weight = weakref.ref(live_model(tiny, {}, in_nf4=True).model.layers[0].mlp.down_proj.weight)
        load_on_device(tiny)
        assert weight() is None
    finally:
        gc.enable()


def test_answers_may_be_as_long_as_those_that_evaluate_scores():
    """Else a long quote is cut off before the answer behind it, which is then wrong here and right there."""
    assert MergeConfig().score_tokens == EvaluateConfig().max_tokens == 256


def answers(folder: str, questions: list[Row]) -> list[str]:
    """What the embedded engine answers from a folder, one at a time: in bfloat16 near ties depend on who is beside."""
    engine = load_engine("transformers", folder, dtype="bfloat16", max_batch=1)
    instructions = [row["instruction"] for row in questions]
    try:
        asked = ask_all(engine, load_tokenizer(folder), instructions, "chat", Sampling(max_tokens=48), 16)
        return [answer.text for answer in asyncio.run(asked)]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("weight_format", "least"), [("bf16", 24), ("nf4", 12), ("int8", 17), ("fp8", 16), ("w4a16", 12)]
)
def test_the_embedded_engine_answers_from_every_format_as_was_measured_and_nearly_as_from_bf16(
    weight_format: Any, least: int, tuned: str, in_bf16: list[str], rows: str, tmp_path: Path
):
    config = MergeConfig(adapter=tuned, format=weight_format, out=str(tmp_path / "model"), **SETTINGS)
    out = Path(merge(config))
    questions = read_questions(Path(rows, "dev"), SETTINGS["score_rows"])
    given = answers(str(out), questions)
    scores = summarize([score_answer(row, answer) for row, answer in zip(questions, given, strict=True)])
    counts = storage.open_folder(out).receipt.counts
    assert counts["questions"] == len(questions)
    assert {"citation_precision", "citation_recall", "bleu_4"} < scores.keys()
    a_tie = 2 / len(questions)  # merge asks several at a time
    assert {name: each.value for name, each in scores.items()} == pytest.approx(
        {name: counts[name] for name in scores}, abs=a_tie
    )
    assert "reference_citation_recall" in counts
    for text in ((out / "report.html").read_text(), (out / "README.md").read_text()):
        assert all(name in text for name in scores)
        assert f"{counts['same_answers']} of {len(questions)}" in text
    assert sum(map(str.__eq__, answers(str(out), read_questions(Path(rows, "train"), 24)), in_bf16)) >= least


def test_onto_auto_measures_each_once_and_keeps_one(tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = MergeConfig(adapter=tuned, format="nf4", score_rows=0, out=str(tmp_path / "model"))
    losses = {}
    for onto in ("16bit", "nf4", "auto"):
        out = Path(merge(config.model_copy(update={"onto": onto})))
        losses[onto] = storage.open_folder(out).receipt.counts["loss"]
    kept = storage.open_folder(out).receipt.facts["onto"]
    assert losses["auto"] == losses[kept]
    told = f"merge: onto {kept}: 16bit has a loss of {losses['16bit']:.4f}, nf4 of {losses['nf4']:.4f}, which is "
    assert told in capsys.readouterr().out
    assert {path.name for path in out.iterdir() if path.is_dir()} == set()
    page = (out / "report.html").read_text()
    lines = ["NF4 base with live adapter", "onto 16bit, nf4", "onto nf4, nf4", "merged, bf16"]
    assert re.findall("<tr><th>([^<]*)</th><td>[0-9.]*</td><td>[0-9.]*%", page) == lines


def measured(losses: list[float], kl: float = 0.01) -> Measured:
    return Measured(Agreement(kl, 1.0, sum(losses) / len(losses), tuple((loss, 1) for loss in losses)))


@pytest.mark.parametrize(
    ("nf4", "kls", "best"),
    [
        ([0.9] * 10, (0.01, 0.01), "nf4"),
        ([0.0] + [1.0] * 9, (0.01, 0.01), "16bit"),  # one lucky row: the interval is -0.3 to 0
        ([1.1] * 10, (0.01, 0.01), "16bit"),
        ([0.9] * 10, (0.01, 0.2), "16bit"),  # past the limit
        ([1.1] * 10, (0.2, 0.01), "nf4"),
        ([math.nan] * 10, (0.2, math.nan), "16bit"),
    ],
)
def test_onto_auto_keeps_to_16_bits_unless_the_other_is_better_beyond_chance(
    nf4: list[float], kls: tuple[float, float], best: str
):
    found: Any = {"16bit": measured([1.0] * 10, kls[0]), "nf4": measured(nf4, kls[1])}
    examples = [Example([1, 2], [False, True], str(number)) for number in range(10)]
    assert best_of(found, MergeConfig(onto="auto"), examples) == best


def folded_twice_in_place(weight: torch.Tensor, updates: Any) -> torch.Tensor:
    """The commonest silent mistakes: the adapter is folded in twice, and into 4-bit weights in place."""
    return folded(through_nf4(folded(weight, updates).bfloat16()), updates)


@pytest.mark.parametrize("factor", [1.0, 0.999])
def test_a_bad_merge_is_refused_and_says_by_how_much(
    factor: float, tuned: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = MergeConfig(adapter={tuned: factor}, data=rows, out=str(tmp_path / "model"), **SETTINGS)
    right = storage.open_folder(merge(config)).receipt
    monkeypatch.setattr("pipelines.weights.folding.folded", folded_twice_in_place)
    bad = config.model_copy(update={"out": str(tmp_path / "bad")})
    with pytest.raises(
        StageError, match=r"too far from NF4 base .*: KL \d\.\d+, the limit is 0.1.*; loss .*--keep true"
    ) as error:
        merge(bad)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bad").exists()
    report = tmp_path / "bad-refused.html"
    assert f"look at {report}; " in str(error.value)
    assert "merged, bf16" in report.read_text()
    wrong = storage.open_folder(merge(bad.model_copy(update={"keep": True}))).receipt
    assert not report.exists()
    assert right.counts["kl"] < 0.05 < 0.1 < wrong.counts["kl"]
    assert right.facts["verdict"] == "within the limits"
    assert wrong.facts["verdict"] == "past the limits"
    assert wrong.facts["past_by"].startswith("KL ")
    said = f"past the limits, kept by --keep true: {wrong.facts['past_by']}"
    assert f"| verdict | {said} |" in (tmp_path / "bad/README.md").read_text()


def test_a_bad_merge_that_is_kept_does_not_pass_the_gate_of_the_right_one(
    ray_cluster: None, tuned: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On the command line, whose exit code a job goes by."""
    config = MergeConfig(adapter=tuned, measure=False, out=str(tmp_path / "right"))
    right = merge(config)
    with monkeypatch.context() as in_place:
        in_place.setattr("pipelines.weights.folding.folded", folded_twice_in_place)
        bad = merge(config.model_copy(update={"out": str(tmp_path / "bad"), "measure": True, "keep": True}))
    monkeypatch.setattr("cluster.commands.signal.signal", lambda *_: None)

    def evaluated(model: str, out: str, *gate: str) -> int:
        rows_asked = ["--data", rows, "--split", "train", "--limit", "60", "--max_tokens", "96"]
        flags = ["--model", model, *rows_asked, "--out", str(tmp_path / out), *gate]
        return run_command("python -m pipelines", STAGES, ["evaluate", *flags])

    assert evaluated(right, "first") == 0
    assert evaluated(right, "again", "--gate", str(tmp_path / "first")) == 0
    assert evaluated(bad, "worse", "--gate", str(tmp_path / "first")) == 1
    verdicts = {out: storage.open_folder(tmp_path / out).receipt.facts.get("gate_passed") for out in ("again", "worse")}
    assert verdicts == {"again": True, "worse": False}


def test_what_is_made_of_a_refused_model_carries_the_verdict_on_it(
    rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tuned_adapter("tiny", tmp_path / "adapter", std=0.2)
    bad = tmp_path / "bad"
    config = MergeConfig(adapter=str(tmp_path / "adapter"), base="tiny", data=rows, score_rows=0, out=str(bad))
    with monkeypatch.context() as twice:
        twice.setattr(
            "pipelines.weights.folding.folded", lambda weight, updates: folded(folded(weight, updates), updates)
        )
        past_by = storage.open_folder(merge(config.model_copy(update={"keep": True}))).receipt.facts["past_by"]
    said = f"past the limits, kept by --keep true: {past_by}"
    for base, name in ((bad, "copy"), (tmp_path / "copy", "copy of the copy")):
        out = Path(merge(MergeConfig(base=str(base), data=rows, score_rows=0, out=str(tmp_path / name))))
        facts = storage.open_folder(out).receipt.facts
        assert facts["verdict"] == "within the limits"
        assert (facts["base_verdict"], facts["base_past_by"]) == ("past the limits", past_by)
        assert f"| verdict on the base | {said} |" in (out / "README.md").read_text()
        assert f"warning: --base {base} is {said}; what is made of it" in capsys.readouterr().err


def test_a_limit_refuses_whatever_the_loss_is(tuned: str, tmp_path: Path):
    config = MergeConfig(adapter=tuned, max_kl=1e-5, min_top1=1, score_rows=0, out=str(tmp_path / "model"))
    with pytest.raises(StageError, match=r"KL 0.\d+, the limit is 1e-05; .*--keep true"):
        merge(config)


@pytest.mark.parametrize("broken", ["16bit", "nf4"])
def test_a_model_that_computes_no_numbers_is_past_the_limits_and_never_the_better_one(
    broken: str, tuned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def overflowing(weights: MergedWeights, name: str) -> torch.Tensor:
        weight = made(weights, name)
        return weight * torch.nan if weights.onto == broken and name == "model.norm.weight" else weight

    made = MergedWeights.__getitem__
    monkeypatch.setattr(MergedWeights, "__getitem__", overflowing)
    config = MergeConfig(adapter=tuned, score_rows=0, out=str(tmp_path / "model"))
    with pytest.raises(StageError, match=r"KL nan, the limit is 0.1; .*loss nan beside"):
        merge(config.model_copy(update={"onto": broken}))
    auto = storage.open_folder(merge(config.model_copy(update={"onto": "auto", "max_kl": 10.0, "min_top1": 0.0})))
    assert auto.receipt.facts["onto"] == {"16bit": "nf4", "nf4": "16bit"}[broken]


def test_several_adapters_are_measured_beside_their_live_sum(tuned: str, rows: str, tmp_path: Path):
    """PEFT's own, not what the folding makes of them."""
    base, parts = tmp_path / "base", {}
    for name, std in (("one", 0.3), ("two", 0.3)):
        tuned_adapter("tiny", tmp_path / name, std)
        parts[str(tmp_path / name)] = {"one": 0.6, "two": -0.4}[name]
    with torch.inference_mode():
        ids = torch.arange(5, 60)[None]
        live = live_model(open_model("tiny", "--base").path, parts, in_nf4=False)(ids).logits.float()
        plain = load_model("tiny", dtype=torch.bfloat16)(ids).logits.float()
    config = MergeConfig(adapter=parts, base="tiny", prompt_format="chat", measure=False, out=str(base))
    with torch.inference_mode():
        merged = load_model(merge(config))(ids).logits.float()
    assert kl(live, merged) < 0.02 * kl(live, plain)


@pytest.mark.parametrize(("weight_format", "split"), [("bf16", "dev"), ("w4a16", "train")])
def test_a_data_folder_without_rows_is_refused_and_without_one_it_says_that_it_does_not_measure(
    weight_format: Any, split: str, tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = MergeConfig(base="tiny", format=weight_format, out=str(tmp_path / "model"))
    merge(config)
    printed = capsys.readouterr().out
    assert "merge: not measured, because no receipt names rows to go by; give a folder that prepare wrote" in printed
    assert ("merge: not calibrated, each value is the nearest, because" in printed) == (weight_format == "w4a16")
    if weight_format == "w4a16":
        config = config.model_copy(update={"measure": False})
    with pytest.raises(StageError, match=rf"--data /nowhere has no {split} rows to go by; give a folder that prepare"):
        merge(config.model_copy(update={"data": "/nowhere"}))


def test_a_large_model_is_measured_without_a_gpu_only_if_that_is_asked_for(
    tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipelines.weights.merge_rows.QUICK_BYTES", 1 << 20)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    merge(MergeConfig(adapter=tuned, out=str(tmp_path / "model")))
    assert (
        "merge: not measured, because 0.0 GB of weights take long without a GPU; --measure true does it all the same"
        in capsys.readouterr().out
    )


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
