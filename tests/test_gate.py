"""A model held against an earlier evaluation: paired where its rows are there, else by the intervals."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import StageError
from pipelines.scores.gate import GATED, Verdict, judge, open_earlier
from pipelines.scores.metrics import summarize
from pipelines.scores.questions import Row, digest, score_answer

ROWS: list[Row] = [
    {"id": f"a:{number}", "instruction": f"问{number}", "output": "北京[1]", "answer": "北京", "golden": 1}
    for number in range(100)
]


def replies(right: int) -> list[str]:
    return ["北京[1]"] * right + ["上海[1]"] * (100 - right)


def evaluated(folder: Path, rows: Sequence[Row], answers: Sequence[str], with_rows: bool = True) -> str:
    """What evaluate leaves of it, as far as the gate reads it."""
    folder.mkdir()
    scores = summarize([score_answer(row, reply) for row, reply in zip(rows, answers, strict=True)])
    report: dict[str, Any] = {
        "model": {"folder": "old", **{name: vars(score) for name, score in scores.items()}},
        "data": {"folder": "out/data", "split": "dev", "limit": 0, "rows": len(rows), "digest": digest(rows)},
    }
    (folder / "scores.json").write_text(json.dumps(report))
    if with_rows:
        lines = [
            {"id": row["id"], "instruction": row["instruction"], "golden": 1, "gold": "北京"}
            | {"model": {"prediction": reply}}
            for row, reply in zip(rows, answers, strict=True)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "scores.json")


def judged(gate: str, right: int, rows: list[Row] = ROWS) -> Verdict:
    points = [score_answer(row, reply) for row, reply in zip(rows, replies(right)[: len(rows)], strict=True)]
    return judge(open_earlier(gate, rows), points, summarize(points))


def test_with_the_earlier_rows_a_difference_of_a_few_is_seen(tmp_path: Path) -> None:
    gate = evaluated(tmp_path / "old", ROWS, replies(80))
    assert judged(gate, 80).passed
    assert judged(gate, 90).passed
    verdict = judged(gate, 73)  # seven rows of a hundred, all changed for the worse
    assert not verdict.passed
    assert list(verdict.worse) == ["exact_match", "f1"]
    assert str(verdict).startswith("worse than old on the same 100 rows: exact_match -7.0 points (80.0 to 73.0; 95 % ")
    assert list(verdict.differences) == ["exact_match", "f1", "citation_accuracy"]
    assert verdict.left_out == dict.fromkeys(GATED[3:], "one of them has no row for it")


def test_without_its_rows_only_a_large_difference_is(tmp_path: Path) -> None:
    gate = evaluated(tmp_path / "old", ROWS, replies(80), with_rows=False)
    assert judged(gate, 73).passed
    verdict = judged(gate, 60)
    assert list(verdict.worse) == ["exact_match", "f1"]
    assert str(verdict).startswith("worse than old by the intervals of both: exact_match -20.0 points (80.0 to 60.0;")
    assert verdict.rows == 0


def test_rows_are_paired_by_question_in_any_order_and_a_limit_leaves_the_common_ones(tmp_path: Path) -> None:
    gate = evaluated(tmp_path / "old", ROWS[:50][::-1], replies(80)[:50][::-1])
    assert judged(gate, 80).rows == 50
    assert judged(gate, 30).worse["exact_match"].difference == pytest.approx(-0.4)
    some = evaluated(tmp_path / "all", ROWS, replies(80))
    assert judged(some, 80, ROWS[:20]).rows == 20


def test_a_gate_that_can_compare_nothing_does_not_pass(tmp_path: Path) -> None:
    gate = evaluated(tmp_path / "old", ROWS[:20], replies(80)[:20], with_rows=False)
    verdict = judged(gate, 80, ROWS[:20])
    assert not verdict.passed
    assert str(verdict).startswith("not to be compared with old; exact_match is left out (its 20 rows are too few")


def test_few_rows_in_pairs_can_fail_a_model_but_not_pass_it(tmp_path: Path) -> None:
    """Of five rows that all got worse, the test's p is 1/16 at best."""
    five = judged(evaluated(tmp_path / "five", ROWS[:5], replies(5)[:5]), 0, ROWS[:5])
    assert not five.passed
    assert str(five).startswith("not to be compared with old; exact_match is left out (its 5 rows are too few to tell)")
    assert not judged(evaluated(tmp_path / "same", ROWS[:20], replies(20)[:20]), 20, ROWS[:20]).passed
    worse = judged(evaluated(tmp_path / "twenty", ROWS[:20], replies(20)[:20]), 5, ROWS[:20])
    assert not worse.passed
    assert "exact_match" in worse.worse


def test_many_rows_of_few_documents_do_not_pass_a_model(tmp_path: Path) -> None:
    points, gate = [score_answer(row, "北京[1]") for row in ROWS], evaluated(tmp_path / "old", ROWS, replies(100))
    for documents, passes in ((10, False), (50, True)):
        groups = [str(index % documents) for index in range(100)]
        verdict = judge(open_earlier(gate, ROWS), points, summarize(points, groups), groups=groups)
        assert verdict.passed == passes
    few = judge(open_earlier(gate, ROWS), points, summarize(points), groups=["1"] * 100)
    assert "exact_match is left out (its 100 rows of 1 document groups are too few to tell)" in str(few)


def broken(folder: Path, name: str) -> str:
    """A reference that cannot be used, in the way that its name says."""
    other = [row | {"instruction": f"{row['instruction']}？"} for row in ROWS]
    if name == "nowhere":
        return str(folder / "nowhere")
    rows = {"half": other[:50] + ROWS[50:], "other rows": other, "other scores": other}.get(name, ROWS)
    file = Path(evaluated(folder / "old", rows, replies(80), with_rows=name in ("half", "other rows", "bad line")))
    report = json.loads(file.read_text())
    if name == "no metric":
        del report["model"]["f1"]
    if name == "no data":
        del report["data"]
    texts = {"not json": "{", "a list": "[]", "not ours": '{"f1": 0.5}'}
    file.write_text(texts.get(name, json.dumps(report)))
    if name == "bad line":
        file.with_name("rows.jsonl").write_text('{"instruction": "问"}\n')
    return str(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"nowhere cannot be read \(No such file or directory\); give the folder of an earlier evaluate"),
        ("not json", r"scores.json is not JSON; give the folder"),
        ("a list", r"scores.json was not written by evaluate; give the folder"),
        ("not ours", r"scores.json was not written by evaluate; give the folder"),
        ("no metric", r"has no f1; put its rows.jsonl beside it, evaluate that model again, or name other"),
        ("no data", r"does not say on which questions it was measured; put its rows.jsonl beside it, or"),
        ("other scores", r"was measured on other questions: 100 dev rows of out/data, not these 100; give the same"),
        ("other rows", r"is about another data set: 0 of its 100 questions are among the 100 of this one; evaluate"),
        ("half", r"is about another data set: 50 of its 100 questions are among the 100"),
        ("bad line", r"rows.jsonl, line 1 was not written by evaluate; evaluate that model again"),
    ],
)
def test_an_earlier_evaluation_that_cannot_be_used_is_named(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=message) as error:
        open_earlier(broken(tmp_path, name), ROWS)
    assert str(error.value).startswith(f"--gate {tmp_path}")
    assert "\n" not in str(error.value)
