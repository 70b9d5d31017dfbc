"""Paired differences: their intervals, and what chance makes of few rows."""

import math

import pytest

from chatglm3.documents import REFUSAL
from pipelines.scores.comparison import compare, compare_scores
from pipelines.scores.metrics import Points, Score, score


def answers(right: int, wrong: int) -> list[Points]:
    return [score("是", "是")] * right + [score("否", "是")] * wrong


def test_the_same_answers_differ_by_nothing():
    found = compare(answers(60, 40), answers(60, 40))["exact_match"]
    assert (found.new, found.old, found.difference, found.low, found.high, found.p) == (0.6, 0.6, 0.0, 0.0, 0.0, 1.0)
    assert not found.is_worse


def test_the_interval_of_a_difference_is_the_paired_one():
    """20 of 100 rows changed for the worse and none for the better: variance (0.2 - 0.04) / 100."""
    found = compare(answers(60, 40), answers(80, 20))["exact_match"]
    assert found.difference == pytest.approx(-0.2)
    assert found.low == pytest.approx(-0.2 - 1.96 * 0.04, abs=0.015)
    assert found.high == pytest.approx(-0.2 + 1.96 * 0.04, abs=0.015)
    assert (found.p, found.n) == (1 / 5001, 100)  # 2 of 2^20 tosses do it: none of 5,000 here
    assert found.is_worse
    assert compare(answers(80, 20), answers(60, 40))["exact_match"].low > 0


@pytest.mark.parametrize(("changed", "p", "is_worse"), [(1, 1.0, False), (5, 2 / 2**5, False), (7, 2 / 2**7, True)])
def test_few_rows_prove_little_whatever_their_interval_says(changed: int, p: float, is_worse: bool):
    """All rows changed for the worse: the bootstrap's interval is -1 to -1, the exact p of a toss 2 / 2^n."""
    found = compare(answers(0, changed), answers(changed, 0))["exact_match"]
    assert (found.low, found.high) == (-1.0, -1.0)
    assert found.p == pytest.approx(p, abs=0.006)
    assert found.is_worse == is_worse


def test_metrics_that_sum_up_otherwise_are_compared_as_wholes():
    """The new model cites two documents instead of one, and refuses nothing: precision halves, refusals are unknown."""
    new = [score("我来到北京清华大学[1][2]", "我来到北京清华大学", golden=1)] * 40
    old = [score("我来到北京[1]", "我来到北京清华大学", golden=1)] * 39 + [
        score(REFUSAL, "我来到北京清华大学", golden=1)
    ]
    found = compare(new, old)
    assert (found["citation_precision"].new, found["citation_precision"].old) == (0.5, 1.0)
    assert found["citation_precision"].is_worse
    # Three words of four, and one answer of none: precision 1, and the brevity penalty of 117 words for 160.
    assert (found["bleu_4"].new, found["bleu_4"].old) == (1.0, pytest.approx(math.exp(1 - 160 / 117)))
    assert found["bleu_4"].low > 0
    assert "refusal_precision" not in found


def test_a_comparison_is_the_same_every_time():
    new, old = answers(60, 40), answers(40, 20) + answers(30, 10)
    assert compare(new, old) == compare(new, old)


def test_two_rows_about_one_document_are_one_witness():
    """Each answer twice, as twins and several questions of one text have it: interval and p stay those of once."""
    new, old, documents = answers(60, 40), answers(53, 47), [f"{number:03d}" for number in range(100)]
    once = compare(new, old)["exact_match"]
    found = compare(new * 2, old * 2, documents * 2)["exact_match"]
    assert (found.n, found.groups) == (200, 100)
    assert (found.low, found.high, found.p) == (once.low, once.high, once.p)
    as_many = compare(new * 2, old * 2)["exact_match"]
    assert as_many.high - as_many.low < found.high - found.low
    assert as_many.p < found.p


def test_two_intervals_make_that_of_the_difference():
    found = compare_scores(Score(0.6, 0.5, 0.7, 100), Score(0.8, 0.7, 0.85, 100))
    assert found.difference == pytest.approx(-0.2)
    assert found.low == pytest.approx(-0.2 - math.hypot(0.1, 0.05))
    assert found.high == pytest.approx(-0.2 + math.hypot(0.1, 0.1))
    assert found.p is None
    assert found.is_worse
    assert not compare_scores(Score(0.7, 0.6, 0.8, 100), Score(0.8, 0.7, 0.85, 100)).is_worse
