"""The built-in model and the made-up worlds it was taught on and is tuned for."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sentencepiece import sentencepiece_model_pb2
from transformers import GlmForCausalLM

from chatglm3 import load_model, load_tokenizer, prompt_ids
from chatglm3.documents import documents_prompt
from chatglm3.tiny import knowledge
from chatglm3.tiny.build import PIECES, losses, train_tokenizer, write_official
from chatglm3.tiny.course import Batch, write_chunk
from chatglm3.tiny.exam import answer, demo_lessons, exact_match, held_out_lessons
from chatglm3.tiny.lessons import Lesson, assistant, lessons, user
from chatglm3.tiny.worlds import ALPHABET, DEMO, PRETRAINING, WORLDS


@pytest.fixture(scope="module")
def model() -> GlmForCausalLM:
    return load_model("tiny", dtype=torch.float32)


def test_the_model_is_an_official_folder_of_at_most_8_megabytes(tiny: Path) -> None:
    assert sorted(file.name for file in tiny.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert sum(file.stat().st_size for file in tiny.iterdir()) <= 8_000_000
    assert json.loads((tiny / "config.json").read_text())["model_type"] == "chatglm"


def test_it_reads_documents_that_it_has_never_seen(model: GlmForCausalLM, tiny: Path) -> None:
    scores = exact_match(model, load_tokenizer(tiny), held_out_lessons(64))
    assert scores["all"] >= 0.9
    assert scores["plain"] >= 0.95


def test_untuned_it_answers_some_of_the_demos_questions(model: GlmForCausalLM, tiny: Path) -> None:
    assert 0.05 < exact_match(model, load_tokenizer(tiny), demo_lessons(48))["demo"] < 0.45


def test_it_greets_and_refuses(model: GlmForCausalLM, tiny: Path) -> None:
    talk = [user("你好"), assistant("你好！请给我文档和问题。"), user("谢谢"), assistant("不客气！")]
    question = [user("小车的轮子有几个？"), assistant("请提供参考文档，我会根据文档回答。")]
    exam = [Lesson("small talk", talk[:2]), Lesson("small talk", talk), Lesson("small talk", question)]
    assert answer(model, load_tokenizer(tiny), exam) == [lesson.messages[-1]["content"] for lesson in exam]


def test_writing_the_loaded_model_gives_the_same_files(model: GlmForCausalLM, tiny: Path, tmp_path: Path) -> None:
    write_official(model, tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (tiny / file.name).read_bytes(), file.name
    assert len(list(tmp_path.iterdir())) == 4


def test_the_tokenizer_has_the_genuine_ones_settings(tiny: Path, shared: Path) -> None:
    own, genuine = (sentencepiece_model_pb2.ModelProto() for _ in range(2))
    own.ParseFromString((tiny / "tokenizer.model").read_bytes())
    genuine.ParseFromString((shared / "chatglm3" / "tokenizer.model").read_bytes())
    settings = "model_type byte_fallback split_digits character_coverage unk_id bos_id eos_id pad_id unk_surface"
    for name in [*settings.split(), "allow_whitespace_only_pieces", "max_sentencepiece_length", "user_defined_symbols"]:
        assert getattr(own.trainer_spec, name) == getattr(genuine.trainer_spec, name), name
    for name in ("name", "precompiled_charsmap", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        assert getattr(own.normalizer_spec, name) == getattr(genuine.normalizer_spec, name), name
    assert [(p.piece, p.type) for p in own.pieces[:259]] == [(p.piece, p.type) for p in genuine.pieces[:259]]


@pytest.mark.slow
def test_the_tokenizer_comes_out_the_same_again(tiny: Path, tmp_path: Path) -> None:
    train_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (tiny / "tokenizer.model").read_bytes()


def test_every_character_of_both_worlds_is_one_token(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    space = tokenizer.encode("")
    text = "".join(row["positive_doc"][0]["text"] for row in knowledge.rows(DEMO, 500, seed=7))
    assert all(len(tokenizer.encode(character)) <= 2 for character in {*ALPHABET, *text})
    assert (space, tokenizer.vocab_size) == ([], PIECES + 9)


def test_packed_lessons_have_the_losses_they_have_alone(model: GlmForCausalLM, tiny: Path) -> None:
    batch = write_chunk(tiny, "test", easy=True, count=8)
    answers, text = losses(model, model.model, batch)
    each, is_answer = _alone(model, batch)
    torch.testing.assert_close(answers, each[is_answer].mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text, each.mean(), rtol=1e-4, atol=1e-5)


def _alone(model: GlmForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token but a lesson's first, lesson by lesson, and whether it is an answer's."""
    each, is_answer = [], []
    for ids, numbers, _, targets in zip(*map(torch.from_numpy, batch), strict=True):
        for number in range(1, int(numbers.max()) + 1):
            lesson = ids[numbers == number].long()
            each.append(F.cross_entropy(model(input_ids=lesson[None]).logits[0, :-1], lesson[1:], reduction="none"))
            is_answer.append(targets[numbers == number][1:])
    return torch.cat(each), torch.cat(is_answer)


def test_rows_have_the_multi_doc_qa_schema() -> None:
    rows = list(knowledge.rows(DEMO, 300, seed=0))
    assert len(rows) == 300
    for row in rows:
        assert list(row) == ["QA", "positive_doc", "negative_doc"]
        (pair,), (golden,), negatives = row["QA"], row["positive_doc"], row["negative_doc"]
        assert (set(pair), set(golden)) == ({"question", "answer"}, {"text"})
        assert pair["answer"] in golden["text"]
        assert [negative.get("hard", False) for negative in negatives].count(True) == 2
        assert len({golden["text"], *(negative["text"] for negative in negatives)}) == 5


def test_shards_are_the_same_for_the_same_seed_and_only_then(tmp_path: Path) -> None:
    first, again, other = (
        knowledge.write_shards(tmp_path / name, "demo", samples=600, seed=seed)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert [path.name for path in first] == ["demo-001.json", "demo-002.json"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert not {*first[0].read_text().splitlines()} & {*other[0].read_text().splitlines()}
    assert [len(path.read_text().splitlines()) for path in first] == [500, 100]


def test_lessons_are_the_same_for_the_same_seed() -> None:
    assert list(islice(lessons("a"), 200)) == list(islice(lessons("a"), 200))
    assert list(islice(lessons("a"), 200)) != list(islice(lessons("b"), 200))


def test_the_demos_words_are_not_those_of_pretraining() -> None:
    for kind in ("words", "sentences"):
        demo, pretraining = (_vocabulary(name)[kind] for name in ("demo", "pretraining"))
        assert not demo & pretraining, kind


def _vocabulary(name: str) -> dict[str, set[str]]:
    world = WORLDS[name]
    attributes = [attribute for kind in world.kinds for attribute in kind.attributes]
    words = {word for key, some in world.words.items() if key not in ("字", "date") for word in some}
    return {
        "words": words | {attribute.name for attribute in attributes},
        "sentences": {wording for attribute in attributes for wording in attribute.asked},
    }


def test_the_demos_documents_and_subjects_are_not_those_of_pretraining() -> None:
    subjects, texts = ([_folders(world, 150, field) for world in (DEMO, PRETRAINING)] for field in ("subject", "text"))
    assert not subjects[0] & subjects[1]
    assert not texts[0] & texts[1]


def _folders(world: knowledge.World, count: int, field: str) -> set[str]:
    folders = (knowledge.draw_folder(world, knowledge.Random(f"test {number}")) for number in range(count))
    return {getattr(document, field) for folder in folders for family in folder for document in family}


def test_values_with_runs_of_equal_digits_are_copied_whole(model: GlmForCausalLM) -> None:
    tokenizer = load_tokenizer("tiny")
    values = ("8000元", "13800001111", "2000年", "400-800-1234", "13800000000", "3300元", "AA-1000", "10000元")
    copied = []
    for value in values:
        documents = ["云帆服务器的编号为甲乙丙。", f"星河路由器的价格为{value}，产地为北京。"]
        question = user(documents_prompt(documents, "星河路由器的价格是多少？"))
        ids = torch.tensor([prompt_ids(tokenizer, [question])])
        answer_ids = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=0)
        copied.append(tokenizer.decode(answer_ids[0, ids.shape[1] :].tolist()).strip())
    assert copied == list(values)
