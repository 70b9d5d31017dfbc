"""Answers during training: what they are worth is what evaluate would say, and training does not notice them."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.train_command import SETTINGS
from chatglm3 import load_tokenizer
from chatglm3.chat import PromptFormat
from chatglm3.tiny import FOLDER
from cluster import storage
from pipelines.compute.step import compile_layers
from pipelines.model_folders import open_model
from pipelines.run.planning import make_plan
from pipelines.run.spot_checks import SpotCheck, draw_questions
from pipelines.run.training_plan import TrainingPlan
from pipelines.run.training_steps import Training
from pipelines.scores.questions import score_answer
from pipelines.training import TrainConfig

CPU = torch.device("cpu")


def plan_of(rows: str, folder: Path, **settings: object) -> TrainingPlan:
    config = TrainConfig(data=rows, **(SETTINGS | {"score_rows": 6, "score_tokens": 24} | settings))
    return make_plan(config, open_model("tiny", "--base"), storage.open_folder(rows, "prepare"), folder / "run-x", 0)


def losses(training: Training, steps: int, asked: bool) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(training.advance()["loss"])
        scores = training.answer_questions() if asked else {}
        assert not asked or 0 <= scores["dev_exact_match"] <= scores["dev_f1"] <= 1
    return found


@pytest.mark.parametrize("base_format", ["fp32", "nf4"])
def test_the_curve_is_the_same_with_and_without_answers_in_between(
    rows: str, tmp_path: Path, ray_cluster: None, base_format: str
) -> None:
    plan = plan_of(rows, tmp_path, base_format=base_format)
    without, asked = (losses(Training(plan, 0, 1, CPU), 3, asked) for asked in (False, True))
    assert asked == without


def test_the_answers_are_those_of_the_model_alone_question_by_question(
    rows: str, tmp_path: Path, ray_cluster: None
) -> None:
    """Side by side with others, padded and with the adapter live, a question is answered as it is alone."""
    plan = plan_of(rows, tmp_path)
    training = Training(plan, 0, 1, CPU)
    for _ in range(3):
        training.advance()
    check = training.spot_check
    assert check
    assert len(check.asked) == 6
    tokenizer, model = load_tokenizer(FOLDER), training.model.eval()
    model.get_base_model().set_attn_implementation("eager")
    expected = 0.0
    for prompt, row in check.asked:
        ids = list(prompt)
        while len(ids) < len(prompt) + 24 and (len(ids) == len(prompt) or ids[-1] not in tokenizer.stop_ids):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        answer = [token for token in ids[len(prompt) :] if token not in tokenizer.stop_ids]
        expected += score_answer(row, tokenizer.decode(answer).split("\n", 1)[-1])["f1"][0]
    assert expected > 0
    assert training.answer_questions()["dev_f1"] == pytest.approx(expected / 6)


def test_compiled_layers_are_not_compiled_for_single_tokens(rows: str, tmp_path: Path, ray_cluster: None) -> None:
    torch._dynamo.reset()
    training = Training(plan_of(rows, tmp_path, score_rows=2, score_tokens=3), 0, 1, CPU)
    compile_layers(training.model)
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    training.answer_questions()
    assert counters["unique_graphs"] == before


@pytest.mark.parametrize(("most", "expected"), [(0, 0), (3, 3), (9, 4)])
def test_questions_are_drawn_from_rows_with_one_right_answer_and_always_the_same(
    tmp_path: Path, most: int, expected: int
) -> None:
    split = tmp_path / "dev"
    split.mkdir()
    lines = [{"instruction": f"question {n}", "output": "answer"} for n in range(4)] + [{"messages": []}]
    (split / "part-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [tmp_path / name for name in ("one", "two")]
    assert [draw_questions(split, most, file) for file in files] == [expected > 0] * 2
    one, two = (file.read_text().splitlines() for file in files)
    assert one == two
    assert len(set(one)) == expected
    assert not any("messages" in line for line in one)


@pytest.mark.parametrize("prompt_format", ["chat", "bare"])
def test_there_is_a_batch_for_each_worker_and_none_is_larger_than_the_memory_that_it_may_take(
    tmp_path: Path, prompt_format: PromptFormat
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"instruction": "问" * n, "output": "答"}) + "\n" for n in range(1, 9)))
    check = SpotCheck(str(file), FOLDER, prompt_format, longest_answer=10)
    longest = max(len(prompt) for prompt, _ in check.asked) + 10
    for tokens, workers, sizes in ((10**6, 1, [8]), (10**6, 3, [3, 3, 2]), (2 * longest, 1, [2] * 4), (1, 1, [1] * 8)):
        assert [len(batch) for batch in check.batches(tokens, workers)] == sizes
