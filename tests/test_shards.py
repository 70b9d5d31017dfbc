"""Raw shards: what is read, what is quarantined, and why."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import StageError
from pipelines.preparation import PrepareConfig, prepare
from pipelines.shards import BadRow, Sample, find_shards, read_shard


def dirty_cases(shared: Path) -> list[dict[str, Any]]:
    return json.loads((shared / "data/dirty/manifest.json").read_text())["cases"]


def test_every_malformed_shard_gives_just_the_samples_it_should(shared: Path) -> None:
    wrong = []
    for case in dirty_cases(shared):
        path = shared / "data/dirty" / case["file"]
        if case["category"] == "selection":
            continue
        items = list(read_shard(path))
        got = (sum(isinstance(i, Sample) for i in items), sum(isinstance(i, BadRow) for i in items))
        want = (case["expect"]["samples_ok"], case["expect"]["records_bad"])
        if got != want:
            wrong.append((case["id"], got, want, case.get("also_acceptable")))
    assert wrong == [("cr_only", (0, 1), (3, 0), "one bad record (or file error) reported; 0 samples")]


def test_only_files_named_json_are_shards(shared: Path) -> None:
    names = {path.name for path in find_shards(str(shared / "data/dirty/shards"))}
    assert "crlf.json" in names
    assert not names & {"extra.jsonl", "notjson", "directory.json"}


def test_a_negative_with_half_a_surrogate_pair_is_dropped_and_the_sample_kept(shared: Path) -> None:
    samples = list(read_shard(shared / "data/dirty/shards/lone_surrogate_negative.json"))
    assert [len(sample.negatives) for sample in samples if isinstance(sample, Sample)] == [1, 2]


def test_a_bad_row_is_named_by_line_and_reason(shared: Path) -> None:
    bad = [i for i in read_shard(shared / "data/dirty/shards/invalid_byte.json") if isinstance(i, BadRow)]
    assert [(row.line, row.reason.split(":")[0]) for row in bad] == [(2, "not UTF-8")]


def test_quotes_of_python_are_not_evaluated(shared: Path) -> None:
    bad = [i for i in read_shard(shared / "data/dirty/shards/python_repr.json") if isinstance(i, BadRow)]
    assert [row.reason.split(":")[0] for row in bad] == ["not JSON"]


def write_rows(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a.json").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return folder


def row(number: int, document: str | None = None) -> dict[str, Any]:
    return {
        "QA": [{"question": f"第{number}问？", "answer": f"答{number}"}],
        "positive_doc": [{"text": document or f"文档{number}说：答{number}。"}],
        "negative_doc": [{"text": f"无关{number}之{i}", "hard": i < 2} for i in range(6)],
    }


def read(folder: str | Path, side: str) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(Path(folder, side).glob("*.jsonl")) for line in file.open()]


def test_a_document_stands_on_one_side_of_the_split_whatever_the_order(tmp_path: Path) -> None:
    rows = [row(n, document=f"共享文档{n // 3}，含答{n}。") for n in range(300)]
    sides = []
    for name, ordered in (("a", rows), ("b", rows[::-1])):
        raw = write_rows(tmp_path / name, ordered)
        data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / f"{name}-out"), preset="seed"))
        train, dev = ({r["instruction"].split("，")[2] for r in read(data, side)} for side in ("train", "dev"))
        assert dev
        assert not train & dev
        sides.append({r["instruction"] for r in read(data, "dev")})
    assert sides[0] == sides[1]


def test_the_seed_preset_writes_the_predecessors_row_character_for_character(tmp_path: Path) -> None:
    raw = write_rows(tmp_path / "raw", [row(1, document="{doc}与%s，答1")])
    data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), preset="seed", dev_share=0))
    assert read(data, "train") == [
        {
            "instruction": "你现在是一个可以根据文档内容进行问答的机器人，以下是用于参考的文档内容：\n\n"
            "{doc}与%s，答1\n问题为：第1问？\n答：",
            "output": "答1",
        }
    ]


def test_multidoc_rows_cite_the_golden_document_at_a_uniform_place_or_refuse(tmp_path: Path) -> None:
    raw = write_rows(tmp_path / "raw", [row(n) for n in range(400)])
    data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), refusal_share=0.25))
    rows = read(data, "train")
    answered = [r for r in rows if r["golden"]]
    for r in answered:
        documents = r["instruction"].split("\n\n", 1)[1].split("\n问题为：")[0].split("\n")
        assert r["output"] == f"{r['answer']}[{r['golden']}]"
        assert r["answer"] in documents[r["golden"] - 1]
        assert len(documents) == r["documents"]
    counts = [{r["documents"] for r in rows if bool(r["golden"]) is kind} for kind in (True, False)]
    assert counts[0] == counts[1], "the number of documents gives the refusal away"
    assert 0.2 < 1 - len(answered) / len(rows) < 0.3
    places = [sum(r["golden"] == place for r in answered) for place in range(1, 6)]
    assert min(places) > 0.12 * len(answered)
    assert {r["answer"] for r in rows if not r["golden"]} == {"根据提供的文档无法回答该问题。"}


def test_long_documents_are_cut_and_the_question_and_the_evidence_stay(tmp_path: Path) -> None:
    long = row(7, document="甲乙丙丁" * 2000 + "答案是答7。" + "戊己庚辛" * 2000)
    raw = write_rows(tmp_path / "raw", [long])
    data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), max_tokens=256, dev_share=0, refusal_share=0))
    (only,) = read(data, "train")
    assert only["instruction"].endswith("\n问题为：第7问？\n答：")
    assert "答案是答7。" in only["instruction"]
    assert only["output"] == f"答7[{only['golden']}]"


def test_copies_are_dropped_and_counted(tmp_path: Path) -> None:
    raw = write_rows(tmp_path / "raw", [row(1), row(1), row(2)])
    data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), dev_share=0))
    assert len(read(data, "train")) == 2
    assert json.loads(Path(data, "report.json").read_text())["duplicates"] == 1


def test_bad_rows_are_quarantined_and_too_many_fail_the_stage(tmp_path: Path) -> None:
    raw = write_rows(tmp_path / "raw", [row(n) for n in range(30)] + ["{half a row"])
    data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), dev_share=0))
    (bad,) = (json.loads(line) for line in Path(data, "quarantine.jsonl").read_text().splitlines())
    assert (bad["file"], bad["line"], bad["raw"]) == ("a.json", 31, "{half a row\n")

    worse = write_rows(tmp_path / "worse", [row(1), "{half a row"])
    with pytest.raises(StageError, match=r"1 of 2 rows are bad \(1 x not JSON.*a.json:2.*max_bad_share"):
        prepare(PrepareConfig(raw=str(worse), out=str(tmp_path / "worse-out")))
    with pytest.raises(StageError, match=r"a.json:2: not JSON"):
        prepare(PrepareConfig(raw=str(worse), out=str(tmp_path / "worse-out"), strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw", "worse"]


def test_the_report_is_one_page_that_shows_pictures_and_marked_samples(tmp_path: Path) -> None:
    raw = write_rows(tmp_path / "raw", [row(n, document=f"<b>文档{n}</b>说：答{n}") for n in range(20)])
    data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out")))
    page = Path(data, "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "&lt;b&gt;文档" in page
    assert "<b>文档" not in page
    assert "<mark>" in page


def test_training_never_sees_a_document_of_the_dev_side(tmp_path: Path) -> None:
    rows = [row(n) for n in range(60)]
    for number, each in enumerate(rows):  # every row's positive document is a distractor elsewhere
        each["negative_doc"] = [{"text": rows[(number + step) % 60]["positive_doc"][0]["text"]} for step in range(1, 7)]
    raw = write_rows(tmp_path / "raw", rows)
    data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), dev_share=0.2))
    golden = [
        r["instruction"].split("\n\n", 1)[1].split("\n")[r["golden"] - 1][4:] for r in read(data, "dev") if r["golden"]
    ]
    seen = "\n".join(r["instruction"] for r in read(data, "train"))
    assert golden
    assert not any(document in seen for document in golden)


def test_unicode_line_ends_in_a_document_stay_in_one_line_of_the_row_file(tmp_path: Path) -> None:
    raw = write_rows(tmp_path / "raw", [row(1, document="甲\u2028乙\u2029丙\x85丁，答1")])
    data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), preset="seed", dev_share=0))
    text = Path(data, "train/part-00000.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 1
    assert "甲\u2028乙\u2029丙\x85丁" in json.loads(text)["instruction"]
