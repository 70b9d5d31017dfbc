"""The prepare stage: what stands in the rows, on which side, and what the report says."""

import hashlib
import json
import os
import signal
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatglm3 import load_tokenizer
from chatglm3.bm25 import plain_text
from chatglm3.chat import render
from chatglm3.documents import REFUSAL, parse_answer, seed_prompt
from cluster.errors import StageError
from pipelines.preparation import PrepareConfig, prepare
from pipelines.rows.cleaning import digest
from pipelines.rows.corpus import open_corpus, write_corpus
from pipelines.rows.shards import Sample
from pipelines.rows.streaming import stream
from pipelines.rows.survey import sample_key

pytestmark = pytest.mark.usefixtures("ray_cluster")


def write_rows(folder: Path, rows: list[Any], name: str = "a.json") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return folder


def row(number: int, document: str | None = None, negatives: int = 9) -> dict[str, Any]:
    text = f"关于{number}号的说明。它的颜色是{number * 7919 % 9973}号色。此外没有别的。"
    return {
        "QA": [{"question": f"{number}号是什么颜色？", "answer": f"{number * 7919 % 9973}号色"}],
        "positive_doc": [{"text": document or text}],
        "negative_doc": [{"text": f"无关的文档{number}之{i}，讲别的事。", "hard": i < 2} for i in range(negatives)],
    }


def read(folder: str | Path, side: str) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(Path(folder, side).glob("*.jsonl")) for line in file.open()]


def documents_of(row: dict[str, Any]) -> list[str]:
    """The documents of a prompt, without their numbers."""
    body = row["instruction"].split("\n\n", 1)[1].split("\n问题为：")[0]
    return [text.split("] ", 1)[1] for text in body.split("\n")]


def prepared(tmp_path: Path, rows: list[Any], **settings: Any) -> str:
    raw = write_rows(tmp_path / "raw", rows)
    return prepare(PrepareConfig(**{"raw": str(raw), "out": str(tmp_path / "out"), "near_copies": 1, **settings}))


def report_of(data: str) -> dict[str, Any]:
    return dict(json.loads(Path(data, "report.json").read_text()))


def bytes_of(data: str) -> dict[str, str]:
    files = [*Path(data, "train").iterdir(), *Path(data, "dev").iterdir()]
    return {f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# The recipe.


def test_the_default_recipe_has_its_shares_its_counts_and_a_uniform_golden_place(tmp_path: Path) -> None:
    data = prepared(tmp_path, [row(n, negatives=11) for n in range(2500)], dev_share=0)
    rows = read(data, "train")
    samples = [r for r in rows if not r["id"].endswith("-twin")]
    twins = {r["id"].removesuffix("-twin") for r in rows if r["id"].endswith("-twin")}
    assert len(samples) == 2500
    shares = {
        "alone": sum(r["documents"] == 1 and r["golden"] == 1 for r in samples) / 2500,
        "refused": sum(r["golden"] is None for r in samples) / 2500,
        "twins": len(twins) / 2500,
    }
    assert shares == pytest.approx({"alone": 0.1, "refused": 0.15, "twins": 0.05}, abs=0.02)
    counts = Counter(r["documents"] for r in samples if r["golden"] and r["documents"] > 1)
    total = sum(counts.values())
    assert {n: c / total for n, c in counts.items()} == pytest.approx({3: 0.2, 5: 0.4, 7: 0.2, 10: 0.2}, abs=0.03)
    places = Counter(r["golden"] for r in samples if r["golden"] and r["documents"] == 5)
    assert min(places.values()) > 0.14 * sum(places.values())


def test_the_number_of_documents_does_not_give_a_refusal_away(tmp_path: Path) -> None:
    rows = read(prepared(tmp_path, [row(n) for n in range(2500)], dev_share=0, refusal_share=0.4), "train")
    answered = Counter(r["documents"] for r in rows if r["golden"])
    refused = Counter(r["documents"] for r in rows if not r["golden"] and not r["id"].endswith("-twin"))
    share = {n: refused[n] / sum(refused.values()) for n in (1, 3, 5, 7)}
    assert share == pytest.approx({n: answered[n] / sum(answered.values()) for n in (1, 3, 5, 7)}, abs=0.04)


def test_an_answer_quotes_its_document_and_cites_it_where_it_stands_after_shuffling(tmp_path: Path) -> None:
    for r in read(prepared(tmp_path, [row(n) for n in range(200)], dev_share=0), "train"):
        answer = parse_answer(r["output"])
        if r["golden"] is None:
            assert r["output"] == r["answer"] == REFUSAL
            assert not any("的颜色是" in text for text in documents_of(r))
        else:
            assert answer.text == r["answer"]
            assert answer.citations == (r["golden"],)
            assert answer.quote in documents_of(r)[r["golden"] - 1]
            assert r["answer"] in answer.quote


def test_a_twin_asks_the_same_with_the_hardest_distractor_in_the_golden_documents_place(tmp_path: Path) -> None:
    rows = {r["id"]: r for r in read(prepared(tmp_path, [row(n) for n in range(40)], twin_share=0.7), "train")}
    pairs = [(rows[name.removesuffix("-twin")], twin) for name, twin in rows.items() if name.endswith("-twin")]
    assert len(pairs) > 15
    for answered, refused in pairs:
        ours, theirs = documents_of(answered), documents_of(refused)
        changed = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        assert changed == [answered["golden"] - 1]
        assert refused["output"] == REFUSAL
        assert theirs[changed[0]].split("之")[1][0] in "01", "not one of the two that are marked as hard"


def test_half_of_the_distractors_are_hard_by_bm25_where_the_data_marks_none(tmp_path: Path) -> None:
    def unmarked(n: int) -> dict[str, Any]:
        near = [{"text": f"{n}号是什么样子？颜色另说，其{i}。"} for i in range(4)]
        return row(n) | {"negative_doc": [{"text": f"毫不相干的话题{n}，{i}。"} for i in range(8)] + near}

    data = prepared(tmp_path, [unmarked(n) for n in range(60)], dev_share=0, distractors={4: 1}, twin_share=0)
    for r in read(data, "train"):
        if r["documents"] == 5 and r["golden"]:
            assert sum("颜色另说" in text for text in documents_of(r)) >= 2


def test_rows_without_negatives_take_their_distractors_from_the_documents_of_other_rows(tmp_path: Path) -> None:
    rows = [row(n, negatives=0) for n in range(200)]
    data = prepared(tmp_path, rows, hard_from="corpus", dev_share=0.2, twin_share=0)
    texts = {r["positive_doc"][0]["text"] for r in rows}
    sides = {side: read(data, side) for side in ("train", "dev")}
    golden = {side: {documents_of(r)[r["golden"] - 1] for r in found if r["golden"]} for side, found in sides.items()}
    for side, other in (("train", "dev"), ("dev", "train")):
        shown = {text for r in sides[side] for text in documents_of(r)}
        assert shown <= texts
        assert not shown & golden[other]
        assert {r["documents"] for r in sides[side] if r["golden"]} >= {1, 3, 5, 7}
    assert not list(Path(data).glob("tmp*"))


def test_the_nearest_documents_of_the_corpus_look_like_answers_and_are_not_of_the_same_group(tmp_path: Path) -> None:
    texts = ["北京的天气很好。", "上海的天气不好。", "北京的天气很好！", "毫不相干的一篇。"]
    digests = np.array(sorted(map(digest, texts)), np.uint64)
    ordered = sorted(texts, key=digest)
    groups = np.array([0 if "北京" in text else index + 1 for index, text in enumerate(ordered)])
    write_corpus(tmp_path / "index", ordered, digests, groups, np.arange(4))
    nearest = open_corpus(str(tmp_path / "index")).nearest("北京的天气怎么样？", digest(texts[0]))
    assert [ordered[index] for index in nearest] == ["上海的天气不好。"]


def test_of_several_places_the_quote_is_the_one_that_the_question_asks_for(tmp_path: Path) -> None:
    told = row(1, "甲部门有三人。乙部门的办公室在五楼。丙部门有三人。")
    told |= {"QA": [{"question": "丙部门有几人？", "answer": "三人"}]}
    (only,) = read(prepared(tmp_path, [told], dev_share=0, refusal_share=0, twin_share=0), "train")
    assert parse_answer(only["output"]).quote == "丙部门有三人。"


def test_a_quote_that_does_not_fit_gives_way_to_the_answer_which_stays_in_the_document(tmp_path: Path) -> None:
    # Of the two sentences that the answer touches, the first is long: together they leave no room.
    told = row(1, f"前言{'甲乙丙丁' * 200}。{'戊己庚辛' * 30}答案在七号。此外{'子丑寅卯' * 200}。")
    told |= {"QA": [{"question": "答案在几号？" + "请说明。" * 10, "answer": "七号"}]}
    (only,) = read(prepared(tmp_path, [told], max_tokens=256, dev_share=0, refusal_share=0, twin_share=0), "train")
    assert parse_answer(only["output"]).quote == ""
    assert "答案在七号" in documents_of(only)[only["golden"] - 1]


def test_rows_about_one_document_and_its_near_copies_and_twins_say_that_they_are_of_one_group(tmp_path: Path) -> None:
    """Two questions about each of 20 documents, the second one about a copy with another end."""
    text = "关于{0}号的说明。它的颜色是{1}号色，形状是{2}角形。{3}此外没有别的。"
    documents = [text.format(n, n * 7919 % 9973, n * 31 % 97, f"{n}甲乙丙丁" * 30) for n in range(20)]
    asked = [row(n, document) for n, document in enumerate(documents)]
    again = [row(n, f"{document}完") for n, document in enumerate(documents)]
    for n, each in enumerate(again):
        each["QA"] = [{"question": f"{n}号有几个角？", "answer": f"{n * 31 % 97}角"}]
    data = prepared(tmp_path, asked + again, near_copies=0.8, dev_share=0.3, twin_share=0.5, refusal_share=0)
    found: dict[str, set[str]] = defaultdict(set)
    for side in ("train", "dev"):
        for r in read(data, side):
            found[r["group"]].add(r["id"])
    assert len(found) == 20
    twins = {key for keys in found.values() for key in keys if key.endswith("-twin")}
    assert all(len({key.removesuffix("-twin") for key in keys}) == 2 for keys in found.values())
    assert len(twins) == sum(map(len, found.values())) - 40 > 0


def test_quotes_can_be_left_out(tmp_path: Path) -> None:
    rows = read(prepared(tmp_path, [row(n) for n in range(20)], quotes=False, dev_share=0), "train")
    assert all(r["output"] == f"{r['answer']}[{r['golden']}]" for r in rows if r["golden"])


def test_the_seed_preset_writes_the_predecessors_row_character_for_character(tmp_path: Path) -> None:
    document = "{doc}与%s，ｅ\u0301 答1"
    rows = [row(1, document) | {"QA": [{"question": "第1问？", "answer": "答1"}]}]
    assert read(prepared(tmp_path, rows, preset="seed", dev_share=0), "train") == [
        {
            "instruction": "你现在是一个可以根据文档内容进行问答的机器人，以下是用于参考的文档内容：\n\n"
            f"{document}\n问题为：第1问？\n答：",
            "output": "答1",
            "id": sample_key(Sample("第1问？", "答1", document, ())),
            "group": f"{digest(plain_text(document)):016x}",
        }
    ]


# Lengths.


@pytest.mark.parametrize("preset", ["multidoc", "seed"])
def test_documents_are_cut_around_the_evidence_and_question_and_answer_stay(tmp_path: Path, preset: Any) -> None:
    long = [row(n, "甲乙丙丁" * 900 + f"。答案是{n * 7919 % 9973}号色。" + "戊己庚辛" * 900) for n in range(1, 9)]
    for each in long:
        each["negative_doc"] = [{"text": f"{i}子丑寅卯" * 400} for i in range(12)]
    data = prepared(tmp_path, long, preset=preset, max_tokens=300, dev_share=0, refusal_share=0, twin_share=0)
    tokenizer = load_tokenizer("tiny")
    for r in read(data, "train"):
        messages = [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]
        ids, _ = render(tokenizer, messages)
        assert 200 < len(ids) <= 300
        answer = parse_answer(r["output"]).text
        assert answer in r["instruction"]
        assert r["instruction"].endswith("号是什么颜色？\n答：")
    assert report_of(data)["changes"]["golden documents cut"] == 8


def test_a_row_whose_question_and_answer_alone_are_too_long_is_quarantined(tmp_path: Path) -> None:
    long = row(1) | {"QA": [{"question": "为什么？" * 200, "answer": "因为" * 200}]}
    data = prepared(tmp_path, [long, *(row(n) for n in range(2, 30))], max_tokens=300, dev_share=0)
    (bad,) = (json.loads(line) for line in Path(data, "quarantine.jsonl").read_text().splitlines())
    assert bad["kind"] == "question and answer leave no room within --max_tokens"
    assert bad["reason"].startswith(f"{bad['kind']} 300: 1")
    assert len({r["id"][:32] for r in read(data, "train")}) == 28


# Cleaning.


def test_exact_copies_are_dropped_over_all_shards_whatever_their_white_space(tmp_path: Path) -> None:
    raw = write_rows(tmp_path / "raw", [row(1), row(1), row(2)])
    spaced = row(2) | {"QA": [{"question": " 2号 是什么颜色？", "answer": "5865号色 "}]}
    write_rows(raw, [spaced, row(3)], "b.json")
    data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), preset="seed", dev_share=0))
    assert len(read(data, "train")) == 3
    assert report_of(data)["dropped"] == {"exact copies": 2, "near copies": 0}


def test_near_copies_are_dropped_and_near_equal_documents_stand_on_one_side(tmp_path: Path) -> None:
    rows = []
    for n in range(1, 61):
        text = f"{n * 104729}号文件：" + "".join(f"{n * k * 7919 % 99991}，" for k in range(1, 60)) + "共三页。"
        pair = [{"question": f"{n * 104729}号文件共几页？", "answer": "三页"}]
        rows.append({"QA": pair, "positive_doc": [{"text": text}]})
        other = [{"question": f"{n * 104729}号文件共几页呢？", "answer": "三页"}]
        rows.append({"QA": other, "positive_doc": [{"text": text.replace("共三页", "共三页（副本）")}]})
        third = [{"question": "另外的问题：开头写的是什么文件？", "answer": f"{n * 104729}号"}]
        rows.append({"QA": third, "positive_doc": [{"text": "再版。" + text}]})
    data = prepared(tmp_path, rows, preset="seed", near_copies=0.8, dev_share=0.3)
    report = report_of(data)
    assert report["dropped"] == {"exact copies": 0, "near copies": 60}
    assert report["leaks"]["groups"] == 60
    sides = {side: {r["instruction"].split("号文件：")[0][-12:] for r in read(data, side)} for side in ("train", "dev")}
    numbers = {side: {"".join(filter(str.isdigit, text)) for text in found} for side, found in sides.items()}
    assert numbers["dev"]
    assert not numbers["train"] & numbers["dev"]


def test_personal_data_is_masked_in_question_answer_and_documents_alike(tmp_path: Path) -> None:
    told = (
        "联系人电话13812345678，身份证11010519491231002X，邮箱li.lei@example.com，座机010-62345678。编号20241124138。"
    )
    sample = {
        "QA": [{"question": "电话是多少？", "answer": "13812345678"}],
        "positive_doc": [{"text": told}],
        "negative_doc": [],
    }
    data = prepared(tmp_path, [sample], mask_personal_data=True, dev_share=0)
    (only,) = read(data, "train")
    assert "联系人电话[电话]，身份证[身份证号]，邮箱[邮箱]，座机[电话]。编号20241124138。" in only["instruction"]
    assert only["answer"] == "[电话]"
    assert report_of(data)["changes"]["masked: phone numbers"] == 3


def test_distractors_with_the_answer_and_copies_of_the_document_are_dropped_and_counted(tmp_path: Path) -> None:
    sample = row(1, negatives=3)
    golden = sample["positive_doc"][0]["text"]
    sample["negative_doc"] += [
        {"text": f" {golden} "},
        {"text": "别处也说是7919号色。"},
        {"text": "e\u0301tude 的曲子。"},
    ]
    data = prepared(tmp_path, [sample], dev_share=0, distractors=9, golden_only_share=0, refusal_share=0, twin_share=0)
    (only,) = read(data, "train")
    assert only["documents"] == 5
    assert "étude" in only["instruction"]
    assert report_of(data)["changes"] == {
        "distractors dropped: copy of another document": 1,
        "distractors dropped: hold the answer": 1,
        "texts brought to NFC": 1,
    }


def test_a_distractor_that_is_nearly_the_golden_document_is_dropped(tmp_path: Path) -> None:
    text = "".join(f"第{n}条：{n * 7919 % 9973}。" for n in range(60))
    sample = row(1, text) | {"QA": [{"question": "讲的是什么？", "answer": "一份没有原话的说明"}]}
    sample["negative_doc"] = [{"text": text.replace("第7条", "第七条")}, {"text": text[::-1]}]
    data = prepared(tmp_path, [sample], dev_share=0, near_copies=0.8)
    assert report_of(data)["changes"] == {"distractors dropped: nearly the golden document": 1}


# The split.


def test_the_same_bytes_come_out_whatever_the_workers_the_order_and_the_shards_names(tmp_path: Path) -> None:
    rows = [row(n, document=None if n % 3 else f"共享文档{n // 6}，含{n * 7919 % 9973}号色。") for n in range(1300)]
    first = write_rows(tmp_path / "raw", rows[:700])
    write_rows(first, rows[700:] + rows[:5], "b.json")
    one = prepare(PrepareConfig(raw=str(first), out=str(tmp_path / "one"), workers=1))
    second = write_rows(tmp_path / "again", rows[::-1] + rows[:5], "百科-001.json")
    four = prepare(PrepareConfig(raw=str(second), out=str(tmp_path / "four"), workers=4))
    assert len(bytes_of(one)) >= 3
    assert bytes_of(one) == bytes_of(four)


def test_a_form_that_most_rows_fill_in_stays_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    form = "本表由供货单位填写，一式两份，须写明货物的名称、数量、单价和交货日期，由双方盖章后生效。" * 3
    rows = [row(n, document=f"{form}编号{n}。" if n < 60 else None) for n in range(120)]
    for seed in range(4):
        data = prepared(tmp_path / str(seed), rows, near_copies=0.8, dev_share=0.2, seed=seed, preset="seed")
        assert len({r["group"] for r in read(data, "train") if form in r["instruction"]}) == 1
        dev = read(data, "dev")
        assert dev
        assert not any(form in r["instruction"] for r in dev)
    assert "prepare: 8% of the rows are on the dev side, --dev_share is 20%: " in capsys.readouterr().out


def test_training_never_sees_a_document_of_the_dev_side(tmp_path: Path) -> None:
    rows = [row(n) for n in range(60)]
    for number, each in enumerate(rows):  # every row's positive document is a distractor elsewhere
        each["negative_doc"] = [{"text": rows[(number + step) % 60]["positive_doc"][0]["text"]} for step in range(1, 7)]
    data = prepared(tmp_path, rows, dev_share=0.2)
    golden = [documents_of(r)[r["golden"] - 1] for r in read(data, "dev") if r["golden"]]
    seen = "\n".join(r["instruction"] for r in read(data, "train"))
    assert golden
    assert not any(document in seen for document in golden)
    leaks = report_of(data)["leaks"]
    assert leaks == {
        "groups": 60,
        "groups_on_both_sides": 0,
        "documents": 60,
        "documents_on_both_sides": 0,
        "dev_documents_in_training_prompts": 0,
    }


def test_a_document_in_an_instruction_row_or_a_replay_stands_on_its_documents_side(tmp_path: Path) -> None:
    rows = [row(n) for n in range(60)]
    told = [{"instruction": seed_prompt(r["positive_doc"][0]["text"], "这里讲什么？"), "output": "颜色"} for r in rows]
    replay = write_rows(tmp_path / "replay", [*told[30:], *({"instruction": f"{n}", "output": "好"} for n in range(9))])
    settings = {"replay": str(replay), "replay_share": 0.5, "dev_share": 0.3}
    data = prepared(tmp_path, [*rows, *told[:30]], **settings)
    golden = [documents_of(r)[r["golden"] - 1] for r in read(data, "dev") if r.get("golden")]
    seen = "\n".join(r["instruction"] for r in read(data, "train"))
    assert len(golden) > 5
    assert seen.count("这里讲什么？") > 20
    assert not any(document in seen for document in golden)
    assert report_of(data)["dropped"]["replay that shows the dev side"] > 3


def test_every_row_can_be_traced_to_its_line(tmp_path: Path) -> None:
    data = prepared(tmp_path, ["", *(row(n) for n in range(20))], twin_share=0.3)
    lines = {line["id"]: line for line in map(json.loads, Path(data, "sources.jsonl").read_text().splitlines())}
    for r in [*read(data, "train"), *read(data, "dev")]:
        source = lines[r["id"].removesuffix("-twin")]
        assert source["file"] == "a.json"
        assert f"：{source['line'] - 2}号是什么颜色？" in r["instruction"]


# Other kinds of rows.

CHAT = {
    "tools": [{"name": "f"}],
    "conversations": [
        {"role": "user", "content": "一？"},
        {"role": "tool", "name": "f", "parameters": {"a": 1}, "observation": "二"},
        {"role": "assistant", "content": "三"},
    ],
}


def test_conversations_and_instruction_rows_pass_through_beside_document_questions(tmp_path: Path) -> None:
    data = prepared(tmp_path, [row(1), CHAT, {"instruction": "你好", "output": "你好！"}], dev_share=0)
    rows = read(data, "train")
    assert ("你好", "你好！") in [(r.get("instruction"), r.get("output")) for r in rows]
    (chat,) = [r for r in rows if "messages" in r]
    assert [m["role"] for m in chat["messages"]] == ["user", "assistant", "observation", "assistant"]
    assert chat["tools"] == CHAT["tools"]


def test_what_stands_before_an_alpaca_question_is_learned_from_too(tmp_path: Path) -> None:
    asked = {"instruction": "他哪年出生？", "input": "只答年份", "output": "1881", "system": "简短地答。"}
    rows = [
        asked | {"history": [["谁写了《呐喊》？", "鲁迅"]]},
        asked | {"history": ["谁？"]},
        asked | {"input": ["x"]},
    ]
    data = prepared(tmp_path, rows, max_bad_share=0.9, dev_share=0)
    (chat,) = read(data, "train")
    assert [(message["role"], message["content"]) for message in chat["messages"]] == [
        ("system", "简短地答。"),
        ("user", "谁写了《呐喊》？"),
        ("assistant", "鲁迅"),
        ("user", "他哪年出生？\n只答年份"),
        ("assistant", "1881"),
    ]
    assert report_of(data)["bad"] == {"history[] is no pair of a question and its answer": 1, "input is no text": 1}


def test_the_chat_preset_takes_conversations_alone(tmp_path: Path) -> None:
    data = prepared(tmp_path, [CHAT, row(1)], preset="chat", max_bad_share=0.5, dev_share=0)
    assert report_of(data)["bad"] == {"a document question, but --preset chat takes conversations": 1}
    assert len(read(data, "train")) == 1


def test_replay_is_mixed_into_training_as_its_share(tmp_path: Path) -> None:
    chats = [{"instruction": f"第{n}句", "output": "好"} for n in range(200)]
    replay = write_rows(tmp_path / "chats", chats, "chats.jsonl")
    data = prepared(tmp_path, [row(n) for n in range(90)], replay=str(replay), replay_share=0.25, dev_share=0)
    assert sum(r["output"] == "好" for r in read(data, "train")) == 30
    assert report_of(data)["dropped"]["replay not drawn"] == 170
    places = [index for index, r in enumerate(read(data, "train")) if r["output"] == "好"]
    assert 30 < sum(places) / 30 < 90, "spread over the rows"
    drawn = {r["id"] for r in read(data, "train") if r["output"] == "好"}
    again = prepared(tmp_path, [row(n) for n in range(90)], replay=str(replay), replay_share=0.25, dev_share=0, seed=7)
    assert {r["id"] for r in read(again, "train") if r["output"] == "好"} != drawn


def test_a_raw_row_that_is_replayed_too_is_no_replay(tmp_path: Path) -> None:
    chats = [{"instruction": f"第{n}句", "output": "好"} for n in range(40)]
    replay = write_rows(tmp_path / "replay", chats)
    data = prepared(tmp_path, chats[:30], preset="chat", replay=str(replay), replay_share=0.1, dev_share=0)
    assert {r["instruction"] for r in read(data, "train")} >= {f"第{n}句" for n in range(30)}


def test_triples_are_of_rows_that_are_kept_and_the_same_whatever_the_order(tmp_path: Path) -> None:
    rows = [row(n // 2) for n in range(80)]  # each twice
    one, two = (
        prepared(tmp_path / str(number), given, triples=3, dev_share=0.2, preset="seed", near_copies=0.8)
        for number, given in enumerate((rows, rows[::-1]))
    )
    texts = [[file.read_text() for file in sorted(Path(data, "triples").rglob("*.jsonl"))] for data in (one, two)]
    assert texts[0] == texts[1]
    assert sum(text.count("\n") for text in texts[0]) == 40


def test_triples_hold_the_hardest_negatives_once_for_each_question_and_document(tmp_path: Path) -> None:
    twice = row(1) | {"QA": [{"question": "1号是什么颜色？", "answer": "另一个答案"}]}
    data = prepared(tmp_path, [row(1), twice, row(2), row(3, negatives=0)], triples=4, dev_share=0)
    triples = [json.loads(line) for line in Path(data, "triples/train/part-00000.jsonl").read_text().splitlines()]
    assert sorted(t["query"] for t in triples) == ["1号是什么颜色？", "2号是什么颜色？"]
    for each in triples:
        assert len(each["pos"]) == 1
        assert len(set(each["neg"])) == 4
        assert {text.split("之")[1][0] for text in each["neg"][:2]} == {"0", "1"}


# What goes wrong, and the report.


def test_bad_rows_are_quarantined_and_too_many_fail_the_stage(tmp_path: Path) -> None:
    data = prepared(tmp_path, [*(row(n) for n in range(30)), "{half a row"], dev_share=0)
    (bad,) = (json.loads(line) for line in Path(data, "quarantine.jsonl").read_text().splitlines())
    assert (bad["file"], bad["line"], bad["raw"]) == ("a.json", 31, "{half a row\n")

    worse = write_rows(tmp_path / "worse", [row(1), "{half a row"])
    config = {"raw": str(worse), "out": str(tmp_path / "worse-out")}
    with pytest.raises(StageError, match=r"1 of 2 rows are bad \(1 x not JSON; the first is a.json:2.*max_bad_share"):
        prepare(PrepareConfig(**config))
    with pytest.raises(StageError, match=r"a.json:2: not JSON.*leave out --strict"):
        prepare(PrepareConfig(**config, strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw", "worse"]


def test_what_is_quarantined_is_masked_too(tmp_path: Path) -> None:
    broken = '{"instruction": "' + "请打" * 95 + "13812345678" + "或写信" * 200
    data = prepared(tmp_path, [row(1), broken], mask_personal_data=True, max_bad_share=0.9, dev_share=0)
    raw = json.loads(Path(data, "quarantine.jsonl").read_text())["raw"]
    assert len(raw) == 200
    assert "138" not in raw


def test_shards_without_a_row_are_told_in_one_line(tmp_path: Path) -> None:
    raw = write_rows(tmp_path / "raw", [])
    (raw / "a.json").write_bytes(b"")
    with pytest.raises(StageError, match="no row is left for training"):
        prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out")))


def test_an_unreadable_file_counts_by_its_bytes(tmp_path: Path) -> None:
    raw = write_rows(tmp_path / "raw", [row(n) for n in range(100)])
    (raw / "b.json").write_bytes(b"\x1f\x8b" + b"x" * 100)
    data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), near_copies=1, dev_share=0))
    assert json.loads(Path(data, "quarantine.jsonl").read_text())["reason"] == "the file is a gzip file; unpack it"
    (raw / "b.json").write_bytes(b"\x1f\x8b" + b"x" * 100_000)
    with pytest.raises(StageError, match=r"1 x the file is a gzip file; unpack it; the first is b.json\)"):
        prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out")))


def test_a_name_that_is_no_utf8_and_a_dollar_sign_in_a_text_end_nothing(tmp_path: Path) -> None:
    raw = write_rows(tmp_path / "raw", [*(row(n, f"$x_{n}^ 与 {n * 7919 % 9973}号色") for n in range(30)), "{$\\frac"])
    os.rename(raw / "a.json", os.fsencode(raw) + b"/\xff.json")
    data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), near_copies=1))
    assert json.loads(Path(data, "quarantine.jsonl").read_text())["file"] == "\\xff.json"
    assert json.loads(Path(data, "sources.jsonl").read_text().splitlines()[0])["file"] == "\\xff.json"


def test_the_reports_flow_adds_up(tmp_path: Path) -> None:
    lines = ["", *(row(n) for n in range(80)), row(1), "{half a row", " "]
    report = report_of(prepared(tmp_path, lines, twin_share=0.3))
    lines, rows = report["lines"], sum(report["rows"].values())
    assert lines == {"read": 84, "blank": 2, "good": 81, "bad": 1}
    assert report["twins"] > 10
    assert lines["good"] - sum(report["dropped"].values()) + report["twins"] == rows


def test_the_report_is_one_page_that_shows_pictures_and_marked_samples(tmp_path: Path) -> None:
    rows = [row(n, document=f"<b>文档{n}</b>说：{n * 7919 % 9973}号色。") for n in range(40)]
    page = Path(prepared(tmp_path, [*rows, CHAT]), "report.html").read_text()
    assert "<svg" in page
    assert "&lt;b&gt;文档" in page
    assert "<b>文档" not in page
    assert "<mark>三</mark>" in page
    assert "nothing of the dev side is seen in training" in page


def test_unicode_line_ends_in_a_document_stay_in_one_line_of_the_row_file(tmp_path: Path) -> None:
    document = "甲\u2028乙\u2029丙\x85丁，7919号色"
    data = prepared(tmp_path, [row(1, document)], preset="seed", dev_share=0)
    text = Path(data, "train/part-00000.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 1
    assert document in json.loads(text)["instruction"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"distractors": {2: 0.5, 4: 0.1}}, "the shares of distractors add up to 0.6, not to 1"),
        ({"distractors": {-1: 1.0}}, "distractors maps numbers from 0 up to their shares"),
        ({"refusal_share": 0.6, "golden_only_share": 0.5}, "add up to more than 1"),
    ],
)
def test_shares_must_add_up(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(StageError, match=problem):
        PrepareConfig.parse(settings, "flags")


def test_what_a_killed_process_was_at_is_done_again_and_a_functions_own_error_ends_the_stage(tmp_path: Path) -> None:
    def square(number: int, marker: Path) -> int:
        if number == 5 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    def fail(number: int) -> int:
        raise ValueError(f"no square of {number}")

    marker = tmp_path / "died"
    assert list(stream(square, range(12), "square", workers=2, marker=marker)) == [n * n for n in range(12)]
    assert marker.exists()
    with pytest.raises(StageError, match="square failed: ValueError: no square of 0"):
        list(stream(fail, range(3), "square", workers=1))
