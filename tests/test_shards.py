"""Raw shards: what is read, what is quarantined, and why."""

import contextlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import StageError
from pipelines.preparation import PrepareConfig, write_data
from pipelines.rows.lines import Line, Piece, RowError, cut, read_lines
from pipelines.rows.shards import Conversation, Sample, find_shards, parse_row, unreadable
from pipelines.rows.survey import Findings, Rules, examine, join

DIRTY = Path(__file__).resolve().parents[2] / "shared/data/dirty"
CASES = json.loads((DIRTY / "manifest.json").read_text())["cases"] if DIRTY.is_dir() else [{"id": "absent"}]
RULES = Rules("multidoc", "tiny", 8192, mask_personal_data=False)


def look(path: Path, piece_bytes: int = 1 << 20) -> Findings:
    pieces = cut(path, piece_bytes)
    return join(pieces, [examine(piece, number, RULES) for number, piece in enumerate(pieces)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_a_malformed_shard_gives_just_the_samples_that_it_should(shared: Path, case: dict[str, Any]) -> None:
    path = shared / "data/dirty" / case["file"]
    expected = case["expect"]
    if case["category"] == "selection":
        assert path not in find_shards(str(path.parent))
    elif expected["file_error"]:
        assert unreadable(path).startswith("the file is ")
    elif case["id"] == "cr_only":  # the manifest's other right answer: "one bad record reported; 0 samples"
        found = look(path)
        assert (len(found.records), len(found.bad)) == (0, 1)
    else:
        found = look(path)
        assert not unreadable(path)
        assert (len(found.records), len(found.bad)) == (expected["samples_ok"], expected["records_bad"])
        if "unique_samples" in expected:
            assert len(set(found.records["key"].tolist())) == expected["unique_samples"]


def test_all_54_kinds_of_malformed_shards_are_tried(shared: Path) -> None:
    assert len(CASES) == 54


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("truncated_last_line", 3, "not JSON: Unterminated string"),
        ("invalid_byte", 2, "not UTF-8: byte 0xe7 at position 148"),
        ("python_repr", 1, "not JSON: Expecting property name enclosed in double quotes"),
        ("deep_nesting", 2, "nested too deeply"),
        ("nan_answer", 1, "QA[0].answer is missing or no text"),
        ("empty_question_real", 1, "QA[0].question is empty"),
        ("positive_text_blank", 1, "positive_doc[0].text is empty"),
    ],
)
def test_a_bad_row_is_named_by_line_and_reason(shared: Path, name: str, line: int, reason: str) -> None:
    (bad,) = look(shared / f"data/dirty/shards/{name}.json").bad
    assert bad.place == f"{name}.json:{line}"
    assert bad.reason.startswith(reason)


def test_a_negative_with_half_a_surrogate_pair_is_dropped_and_the_sample_kept(shared: Path) -> None:
    lines = (shared / "data/dirty/shards/lone_surrogate_negative.json").read_bytes().splitlines()
    samples = [parse_row(line) for line in lines]
    assert [len(sample.negatives) for sample in samples if isinstance(sample, Sample)] == [1, 2]


def test_jsonl_files_are_read_when_asked_and_named_when_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert [path.name for path in find_shards(str(tmp_path), jsonl=True)] == ["a.jsonl"]
    with pytest.raises(StageError, match=r"holds no \*.json file.*to read the \*.jsonl files in it, add --jsonl"):
        find_shards(str(tmp_path))


# Every way of cutting a file gives the same lines with the same numbers.


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=20), max_size=12), st.integers(1, 40))
def test_pieces_of_any_size_give_the_lines_of_the_file(tmp_path: Path, parts: list[bytes], size: int) -> None:
    content = b"\n".join(parts)
    path = tmp_path / "a.json"
    path.write_bytes(content)
    pieces = cut(path, size)
    lines = [line for piece in pieces for line in read_lines(piece)]
    bom = b"\xef\xbb\xbf"
    assert b"".join(line.content for line in lines) == content.removeprefix(bom)
    assert [content[line.offset :][: len(line.content)] for line in lines[1:]] == [line.content for line in lines[1:]]
    counted = [len(list(read_lines(piece))) for piece in pieces]
    assert [line.number for line in lines] == [n for count in counted for n in range(1, count + 1)]


def test_a_line_that_is_too_long_is_one_bad_row_and_is_never_held(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("pipelines.rows.lines.LONGEST_LINE", 100)
    path = tmp_path / "a.json"
    path.write_bytes(b"a" * 250 + b"\n{}\n" + b"b" * 99 + b"\n")
    lines = list(read_lines(Piece(str(path), 0, path.stat().st_size, "a.json")))
    expected = [Line(1, 0, b"a" * 100, is_whole=False), Line(2, 251, b"{}\n"), Line(3, 254, b"b" * 99 + b"\n")]
    assert lines == expected
    assert [line for piece in cut(path, 70) for line in read_lines(piece)] == [
        replace(line, number=number) for line, number in zip(expected, (1, 1, 2), strict=True)
    ]
    (bad,) = [row for row in look(path).bad if row.line == 1]
    assert bad.reason.startswith("the line is longer than")
    assert bad.raw == "a" * 100


def test_line_numbers_count_from_the_start_of_the_file_in_every_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\n".join(["x" * n for n in range(1, 60)]) + "\n")
    for size in (7, 50, 10_000):
        assert [row.line for row in look(path, size).bad] == list(range(1, 60))


# Rows that nobody wrote on purpose.

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))
texts = st.text(st.characters(), max_size=12) | anything
items = st.lists(st.fixed_dictionaries({}, optional={"text": texts, "question": texts, "answer": texts}), max_size=2)
fields = dict.fromkeys(("QA", "positive_doc", "negative_doc", "conversations", "tools"), items | anything)
rows = st.fixed_dictionaries({}, optional=fields | {"instruction": texts, "output": texts})


@settings(max_examples=300)
@given(rows | anything, st.sampled_from(["utf-8", "utf-16", "gbk"]))
def test_no_row_crashes_the_reader_and_none_yields_an_empty_text(row: Any, encoding: str) -> None:
    try:
        item = parse_row(json.dumps(row, ensure_ascii=False).encode(encoding, "surrogatepass"))
    except (RowError, UnicodeEncodeError):
        return
    if isinstance(item, Sample):
        assert all(text.strip() for text in (item.question, item.answer, item.positive, *item.negatives))
        "".join((item.question, item.answer, item.positive, *item.negatives)).encode()
    else:
        assert any(message["role"] == "assistant" and message["content"].strip() for message in item.messages)


# Rows that are nearly right are what gets far into the stage.
words = st.text("甲乙。\n $[1]\ud800e\u0301", max_size=9) | st.sampled_from(["甲乙。甲", "甲" * 400, "答 [2]"])
documents = st.lists(st.fixed_dictionaries({"text": words}, optional={"hard": st.booleans()}), max_size=4)
questions = st.fixed_dictionaries(
    {
        "QA": st.lists(st.fixed_dictionaries({"question": words, "answer": words}), min_size=1, max_size=2),
        "positive_doc": documents,
        "negative_doc": documents,
    }
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": words},
    optional={"name": words, "parameters": st.dictionaries(words, anything), "observation": anything},
)
chats = st.fixed_dictionaries({"conversations": st.lists(turns, max_size=4)}, optional={"tools": st.lists(anything)})
instructions = st.fixed_dictionaries({"instruction": words, "output": words})


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(questions | chats | instructions | rows, max_size=8), st.sampled_from(["multidoc", "seed"]))
def test_no_row_ends_the_stage_and_all_rows_fit_and_have_texts(raw: list[Any], preset: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.json").write_text("\n".join(map(json.dumps, raw)))
        config = PrepareConfig(preset=preset, max_tokens=256, dev_share=0.2, near_copies=0.8, triples=2)
        with contextlib.suppress(StageError):  # "no row is left for training"
            account = write_data(config.model_copy(update={"max_bad_share": 1.0}), [folder / "a.json"], 1, folder)
            prompt, answer = account.statistics.lengths()
            assert max(prompt + answer) <= 256
            for file in folder.glob("train/*.jsonl"):
                for line in map(json.loads, file.read_text().splitlines()):
                    assert line.get("messages") or (line["instruction"].strip() and line["output"].strip())


# ChatGLM3's official conversations, with tools.

WEATHER = {
    "tools": [{"name": "get_weather", "parameters": {"city": {"type": "string"}}}],
    "conversations": [
        {"role": "user", "content": "北京天气？"},
        {"role": "assistant", "content": "我查一下。", "loss": False},
        {
            "role": "tool",
            "name": "get_weather",
            "parameters": {"city": "北京", "days": 3},
            "observation": {"weather": "晴"},
        },
        {"role": "assistant", "content": "晴天。"},
    ],
}


def test_a_tool_turn_is_a_call_by_the_assistant_and_the_observation_that_answers_it() -> None:
    item = parse_row(json.dumps(WEATHER).encode())
    assert isinstance(item, Conversation)
    assert item.tools == WEATHER["tools"]
    assert item.messages == [
        {"role": "user", "content": "北京天气？"},
        {"role": "assistant", "content": "我查一下。", "loss": False},
        {
            "role": "assistant",
            "metadata": "get_weather",
            "content": "```python\ntool_call(city='北京', days=3)\n```",
        },
        {"role": "observation", "content": '{"weather": "晴"}'},
        {"role": "assistant", "content": "晴天。"},
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversations": []}, "conversations is not a non-empty list"),
        ({"conversations": [{"role": "bot", "content": "x"}]}, r"conversations\[0\].role is none of system, user"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "no turn of the assistant to learn from"),
        ({"conversations": [{"role": "assistant", "content": None}]}, r"conversations\[0\].content is missing"),
        ({"conversations": [{"role": "user", "content": " "}]}, r"conversations\[0\].content is empty"),
        ({"conversations": [{"role": "assistant", "content": "x", "loss": 1}]}, r"loss is neither true nor false: 1"),
        ({"conversations": [{"role": "tool", "name": "f", "parameters": {"a b": 1}}]}, "parameters is no object of"),
        ({"conversations": [{"role": "tool", "name": "f", "parameters": {"from": 1}}]}, "names that code can have"),
        ({"conversations": [{"role": "user", "content": "\ud800"}]}, "conversations cannot be written as JSON again"),
        ({"tools": "get_weather"}, "tools is not a list"),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_bad_and_says_why(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_row(json.dumps(WEATHER | change).encode())
