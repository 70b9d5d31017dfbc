"""Scores of answers, worked out by hand from the official rules."""

import math
import subprocess
import sys

import numpy as np
import pytest

from chatglm3.documents import REFUSAL, cited_answer, parse_answer
from pipelines.scores.metrics import bleu, exact_match, f1, ngram_counts, rouge_l, score, segments, summarize


def test_exact_match_ignores_case_and_punctuation_as_cmrc_2018_does():
    assert exact_match("《红楼梦》。", "红楼梦") == 1.0
    assert exact_match(" Python-3", "python3") == 1.0
    assert exact_match("1,000", "1000") == 0.0  # the official list has no ASCII comma
    assert exact_match("曹雪芹", "曹雪") == 0.0


def test_segments_are_chinese_characters_and_other_words():
    assert segments("《红楼梦》有120回") == ["红", "楼", "梦", "有", "120", "回"]
    assert segments("约3.5%，Terry Gates等") == ["约", "3.5", "%", "terry", "gates", "等"]
    assert segments("共1,000人,Prim算法") == ["共", "1,000", "人", ",", "prim", "算", "法"]
    assert segments("POW/POS") == ["powpos"]  # the official script drops `/` without ending the word


def test_f1_counts_the_longest_common_run_not_all_common_characters():
    # 曹雪芹 is common to both: 3 of 5 and 3 of 3.
    assert f1("作者曹雪芹", "曹雪芹") == pytest.approx(2 * 3 / (5 + 3))
    # 北京 and 大学 are common, but the longest run is 2 of 5 and 2 of 4.
    assert f1("北京的大学", "北京大学") == pytest.approx(2 * 2 / (5 + 4))
    assert f1("", "北京") == 0.0


def test_rouge_l_is_the_common_subsequence_of_words():
    # 我 / 来到 / 北京 / 清华大学 against 我 / 在 / 北京: two of four and two of three.
    assert rouge_l("我来到北京清华大学", "我在北京") == pytest.approx(2 * 2 / (4 + 3))
    assert rouge_l("", "我在北京") == 0.0


def test_bleu_is_of_the_corpus_over_words_and_not_smoothed():
    # 我 / 来到 / 北京 / 清华大学: all of its n-grams are in the gold answer, which is as long.
    whole = ngram_counts("我来到北京清华大学", "我来到北京清华大学")
    assert whole == (4, 3, 2, 1, 4, 3, 2, 1, 4, 4)
    # 我 / 来到 / 北京: 3, 2, 1 and no n-grams, one word short of the gold answer.
    short = ngram_counts("我来到北京", "我来到北京清华大学")
    assert short == (3, 2, 1, 0, 3, 2, 1, 0, 3, 4)
    assert float(bleu(np.array(whole))) == 1.0
    assert float(bleu(np.array(short))) == pytest.approx(math.exp(1 - 4 / 3))  # precision 1, and the brevity penalty
    assert float(bleu(np.array(whole) + np.array(short))) == pytest.approx(math.exp(1 - 8 / 7))
    assert float(bleu(np.array(ngram_counts("", "我来到北京")))) == 0.0


def test_bleu_is_that_of_sacrebleu():
    """sacrebleu 2.6.0 on the same words, with smooth_method="none" and effective_order=True, gives this number."""
    pairs = [("我来到北京清华大学读书了", "我来到北京清华大学读书"), ("部门经理签字后生效", "由部门经理签字后立即生效")]
    rows = [score(prediction, gold) for prediction, gold in pairs]
    assert summarize(rows)["bleu_4"].value == pytest.approx(0.6231838376616488, abs=1e-12)


def test_refusals_have_the_same_words_so_bleu_leaves_rows_without_an_answer_out():
    right, wrong = score(REFUSAL, REFUSAL, answerable=False), score(REFUSAL, "我来到北京清华大学", golden=1)
    assert right["bleu_4"][-1] == 0.0
    assert wrong["bleu_4"] == (0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 1.0)


def test_a_cited_answer_is_scored_without_its_citation():
    points = score("曹雪芹[2]", "曹雪芹", golden=2)
    assert points["exact_match"] == (1.0, 1.0)
    assert points["citation_accuracy"] == (1.0, 1.0)
    assert score("曹雪芹[1]", "曹雪芹", golden=2)["citation_accuracy"] == (0.0, 1.0)


def test_citing_every_document_is_no_right_citation():
    assert score("曹雪芹[1][2][3]", "曹雪芹", golden=2)["citation_accuracy"] == (0.0, 1.0)


def test_citations_have_precision_and_recall():
    """Right; right with another; wrong; none; and one to a question that no document answers."""
    replies = [("北京[2]", 2), ("北京[1][2]", 2), ("北京[3]", 2), ("北京", 2), ("北京[1]", None)]
    rows = [score(reply, "北京", golden, answerable=golden is not None) for reply, golden in replies]
    scores = summarize(rows)
    assert (scores["citation_precision"].value, scores["citation_precision"].n) == (2 / 5, 4)
    assert (scores["citation_recall"].value, scores["citation_recall"].n) == (2 / 4, 4)
    assert (scores["citation_accuracy"].value, scores["citation_accuracy"].n) == (1 / 4, 4)


def test_rows_without_a_golden_document_say_nothing_of_citations_and_refusals():
    points = score("曹雪芹", "曹雪芹")
    assert [name for name, value in points.items() if value[-1]] == ["exact_match", "f1", "rouge_l", "bleu_4"]


def test_a_refusal_and_an_answer_have_nothing_in_common():
    wrong_refusal = score(REFUSAL, "根据提供的文档", golden=1)
    assert (wrong_refusal["f1"], wrong_refusal["refusal_precision"]) == ((0.0, 1.0), (0.0, 1.0))
    invented = score("根据提供的文档是北京[1]", REFUSAL, answerable=False)
    assert (invented["f1"], invented["refusal_recall"]) == ((0.0, 1.0), (0.0, 1.0))
    right = score(REFUSAL, REFUSAL, answerable=False)
    assert {name: value[0] for name, value in right.items() if value[-1]} == {
        "exact_match": 1.0, "f1": 1.0, "rouge_l": 1.0, "refusal_precision": 1.0, "refusal_recall": 1.0,
    }  # fmt: skip


def test_refusals_have_precision_and_recall():
    rows = [score(REFUSAL, REFUSAL, answerable=False)] * 3 + [score("北京", REFUSAL, answerable=False)]
    rows += [score(REFUSAL, "北京", golden=1)] * 2 + [score("北京[1]", "北京", golden=1)] * 4
    scores = summarize(rows)
    assert (scores["refusal_precision"].value, scores["refusal_precision"].n) == (3 / 5, 5)
    assert (scores["refusal_recall"].value, scores["refusal_recall"].n) == (3 / 4, 4)
    assert (scores["citation_accuracy"].value, scores["citation_accuracy"].n) == (4 / 6, 6)


def test_the_interval_is_the_binomial_one_and_the_same_every_time():
    rows = [score("是", "是")] * 60 + [score("否", "是")] * 40
    scores = summarize(rows)
    assert scores["exact_match"].value == 0.6
    assert scores["exact_match"].low == pytest.approx(0.6 - 0.096, abs=0.015)  # 1.96 * sqrt(0.6 * 0.4 / 100)
    assert scores["exact_match"].high == pytest.approx(0.6 + 0.096, abs=0.015)
    assert summarize(rows) == scores
    assert "refusal_recall" not in scores


def test_the_interval_is_that_of_the_documents_whose_rows_are_right_or_wrong_together():
    rows, documents = [score("是", "是")] * 60 + [score("否", "是")] * 40, [f"{number:03d}" for number in range(100)]
    once, twice = summarize(rows)["exact_match"], summarize(rows * 2, documents * 2)["exact_match"]
    assert (twice.value, twice.low, twice.high) == (once.value, once.low, once.high)
    assert (twice.n, twice.groups, once.groups) == (200, 100, 100)
    assert summarize(rows * 2)["exact_match"].high < twice.high


def test_scoring_is_silent_and_needs_no_torch():
    program = (
        "import sys; from pipelines.scores.metrics import rouge_l; rouge_l('你好', '你好');"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_a_quoted_answer_is_scored_by_what_follows_the_quote():
    reply = cited_answer("售后组", 2, "归口部门为售后组。")
    assert reply == "原文[2]：归口部门为售后组。\n答：售后组"
    answer = parse_answer(reply)
    assert (answer.text, answer.citations, answer.quote, answer.refused) == (
        "售后组",
        (2,),
        "归口部门为售后组。",
        False,
    )
    assert score(reply, "售后组", golden=2)["citation_accuracy"] == (1.0, 1.0)
    assert score(reply, "售后组", golden=2)["exact_match"] == (1.0, 1.0)
