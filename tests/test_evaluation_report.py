"""The page of scores and failures: what counts as which failure, and that it shows texts as texts."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from chatglm3.documents import REFUSAL, documents_prompt, seed_prompt
from pipelines.model_folders import ModelFolder
from pipelines.scores.comparison import compare
from pipelines.scores.evaluation_report import SHOWN_OF_A_KIND, failure_kinds, taken_apart, write_report
from pipelines.scores.questions import Answer, Row
from pipelines.scores.score_report import Evaluation, Result

DOCUMENTS = ["归口部门是<b>售后组</b>。", "北京 & 上海\n\n[9] 不是编号"]


def row(golden: int | None = 1, **fields: Any) -> Row:
    prompt = documents_prompt(DOCUMENTS, "归口部门是？")
    answer = REFUSAL if golden is None else "售后组"
    return {"instruction": prompt, "answer": answer, "output": answer, "golden": golden, "documents": 2, **fields}


def result(name: str, rows: list[Row], replies: list[str]) -> Result:
    answers = [Answer(reply, len(reply), 0.5) for reply in replies]
    return Result.of(ModelFolder(name, Path(name), {}, {}), name, rows, answers)


@pytest.mark.parametrize(
    ("golden", "reply", "exact", "kinds"),
    [
        (1, "售后组[1]", True, []),
        (1, "售后组[2]", True, ["wrong citation"]),
        (1, "售后组", True, ["wrong citation"]),
        (1, "北京[1]", False, ["wrong"]),
        (1, "北京[1][2]", False, ["wrong", "wrong citation"]),
        (1, REFUSAL, False, ["refused wrongly"]),
        (1, "", False, ["no answer"]),
        (None, REFUSAL, True, []),
        (None, "北京[2]", False, ["answered wrongly"]),
        (None, "", False, ["no answer"]),
    ],
)
def test_failures_have_kinds(golden: int | None, reply: str, exact: bool, kinds: list[str]) -> None:
    assert failure_kinds(row(golden), reply, exact) == kinds


def test_rows_without_a_golden_document_ask_for_no_citation() -> None:
    assert failure_kinds({"instruction": "问", "output": "答"}, "答", exact=True) == []


def test_a_prompt_is_taken_apart_into_its_documents_and_question() -> None:
    assert taken_apart(documents_prompt(DOCUMENTS, "谁？"), 2) == (DOCUMENTS, "谁？")
    assert taken_apart(seed_prompt("[1] 文档", "谁？"), None) == (["[1] 文档"], "谁？")
    assert taken_apart("你好", None) == ([], "你好")


class Page(HTMLParser):
    """Tags with their attributes, and the failures' texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_texts_of_data_and_model_are_shown_as_texts_and_nothing_is_loaded(tmp_path: Path) -> None:
    attack = "</script><script>alert(1)</script><img src=https://example.com onerror=alert(1)>\"'BODY SCRIPT"
    rows = [row(answer=attack, id=attack), {"instruction": attack, "output": "x"}]
    found = Evaluation(rows, {"model": result(attack, rows, [attack, attack])}, {})
    write_report(tmp_path / "report.html", found, {"model": attack})
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags if tag in ("script", "img", "link", "iframe")] == ["script"]
    loading = {"src", "href", "onerror", "action", "data"}
    links = [(name, value) for _, attributes in page.tags for name, value in attributes.items() if name in loading]
    assert [link for link in links if not str(link[1]).startswith("#")] == []
    assert any(attributes.get("content", "").startswith("default-src 'none'") for _, attributes in page.tags)  # type: ignore[union-attr]


def test_failures_are_there_by_kind_the_worst_first_with_the_golden_document_marked(tmp_path: Path) -> None:
    rows = [row(id="right"), row(id="cites"), row(id="half"), row(None, id="invents"), row(id="refuses")]
    model = result("new", rows, ["售后组[1]", "售后组[2]", "售后[1]", "北京[2]", REFUSAL])
    other = result("old", rows, ["北京[1]", "售后组[1]", "售后组[1]", REFUSAL, REFUSAL])
    comparison = compare(model.points, other.points)
    write_report(tmp_path / "report.html", Evaluation(rows, {"against": other, "model": model}, comparison), {})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    kinds = [attributes["data-kinds"] for tag, attributes in Page(page).tags if tag == "details"]
    assert kinds == ["answered wrongly|worse than old", "refused wrongly", "wrong|worse than old", "better than old",
                     "wrong citation"]  # fmt: skip
    choices = re.findall(r'name="kind" value="([^"]*)"(?: checked)?> [^<]*?(\d+)</label>', page)
    assert choices == [("", "5"), ("wrong", "1"), ("wrong citation", "1"), ("refused wrongly", "1"),
                       ("answered wrongly", "1"), ("better than old", "1"), ("worse than old", "2")]  # fmt: skip
    golden = "<pre class=golden><i>[1] golden</i> 归口部门是&lt;b&gt;<mark>售后组</mark>&lt;/b&gt;。</pre>"
    assert page.count(golden) == 2  # of four rows with a golden document two cite it
    assert "<i>[2] cited</i> 北京 &amp; 上海\n\n[9] 不是编号</pre>" in page
    assert "<tr><th>exact_match</th><td>60.0 (20.0 to 100.0)</td>" in page
    assert page.count("<svg") == 1


def test_hundreds_of_one_kind_do_not_crowd_out_another(tmp_path: Path) -> None:
    rows = [row(id=f"row {number}") for number in range(SHOWN_OF_A_KIND + 50)]
    replies = ["北京[1]"] * (SHOWN_OF_A_KIND + 40) + ["售后组[2]"] * 10
    write_report(tmp_path / "report.html", Evaluation(rows, {"model": result("new", rows, replies)}, {}), {})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<details") == SHOWN_OF_A_KIND + 10
    assert "wrong 340</label>" in page
    assert "At most 300 of a kind are here; all are in rows.jsonl." in page


def test_a_model_that_answers_nothing_and_one_without_failures_have_a_page(tmp_path: Path) -> None:
    rows = [{"instruction": "你好", "output": "你好"}]
    for reply, text in (("", "no answer 1</label>"), ("你好", "<h2>Failures</h2><p>None.</p>")):
        write_report(tmp_path / "report.html", Evaluation(rows, {"model": result("new", rows, [reply])}, {}), {})
        assert text in (tmp_path / "report.html").read_text(encoding="utf-8")
