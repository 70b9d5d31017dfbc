"""The tokenizer and the text stream against the official tokenizer's own results."""

import json
import pickle
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from chatglm3 import ModelError, load_tokenizer
from chatglm3.stream import TextStream
from chatglm3.tokenizer import CONTROL_TOKENS, ChatGlmTokenizer


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> ChatGlmTokenizer:
    return load_tokenizer(shared / "chatglm3/ckpt/full-fp16-bin")


@pytest.fixture(scope="module")
def texts(shared: Path) -> list[dict]:
    lines = (shared / "chatglm3/tokenizer_cases.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def id_lists(shared: Path, texts: list[dict]) -> list[tuple[list[int], str]]:
    """Id lists with their official text: what encoding yields, and what a model may yield besides."""
    arbitrary = json.loads((shared / "chatglm3/decode_cases.json").read_text(encoding="utf-8"))
    return [(case["ids"], case["decoded"]) for case in texts] + [(case["ids"], case["text"]) for case in arbitrary]


def test_control_ids_follow_the_vocabulary(tokenizer):
    ids = [tokenizer.control_id(token) for token in CONTROL_TOKENS]
    assert ids == list(range(64789, 64798))
    assert tokenizer.vocab_size == 64798
    assert tokenizer.prefix_ids == [64790, 64792]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 2, (2, 64795, 64797))
    with pytest.raises(ModelError, match=r"robot.* is not a control token"):
        tokenizer.control_id("<|robot|>")


def test_every_text_is_encoded_as_the_official_tokenizer_encodes_it(tokenizer, texts):
    assert len(texts) == 3699
    assert [case["text"] for case in texts if tokenizer.encode(case["text"]) != case["ids"]] == []


def test_every_id_list_is_decoded_as_the_official_tokenizer_decodes_it(tokenizer, id_lists):
    assert len(id_lists) == 3699 + 1360
    assert [ids for ids, text in id_lists if tokenizer.decode(ids) != text] == []


def test_parsing_control_tokens_from_text_would_not_pass(tokenizer, texts):
    """A tokenizer that turns "sop" or "<|user|>" in a text into control ids fails the comparison above."""

    def encode_with_control_tokens(text: str) -> list[int]:
        for token in CONTROL_TOKENS:
            if token in text:
                before, after = text.split(token, maxsplit=1)
                return [
                    *encode_with_control_tokens(before),
                    tokenizer.control_id(token),
                    *encode_with_control_tokens(after),
                ]
        return tokenizer.encode(text)

    wrong = [case["text"] for case in texts if encode_with_control_tokens(case["text"]) != case["ids"]]
    assert len(wrong) > 100
    assert encode_with_control_tokens("philosophy") != tokenizer.encode("philosophy")


def test_padding_is_the_official_one(shared, tokenizer):
    cases = json.loads((shared / "chatglm3/padding_cases.json").read_text(encoding="utf-8"))
    for case in cases:
        batch = tokenizer.pad([tokenizer.prefix_ids + tokenizer.encode(text) for text in case["texts"]])
        assert batch == {key: case[key] for key in ("input_ids", "attention_mask", "position_ids")}


def test_decoding_agrees_with_sentencepiece_on_random_ids(shared, tokenizer):
    """Half of the ids are single bytes, so that runs break inside characters and across control ids."""
    sentencepiece = SentencePieceProcessor(model_file=str(shared / "chatglm3/tokenizer.model"))
    pieces = {number: sentencepiece.id_to_piece(number) for number in range(3, 64789)}
    pieces |= {tokenizer.control_id(token): token for token in CONTROL_TOKENS}
    generator = random.Random(0)
    space, double_space = sentencepiece.piece_to_id("▁"), sentencepiece.piece_to_id("▁▁")
    for _ in range(3000):
        kinds = (generator.randrange(3, 259), generator.randrange(65100), space, double_space, 64795, 0)
        weights = (6, 3, 1, 1, 1, 1)
        ids = [generator.choices(kinds, weights)[0] for _ in range(generator.randrange(1, 8))]
        ids += [generator.randrange(3, 259) for _ in range(generator.randrange(5))]
        assert tokenizer.decode(ids) == sentencepiece.decode_pieces([pieces.get(number, "") for number in ids])


def streamed(tokenizer: ChatGlmTokenizer, ids: list[int], stop: tuple[str, ...], size: int) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    deltas = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    return [*deltas, stream.finish()], stream.stopped


def test_ids_past_the_vocabulary_stand_for_nothing_and_are_not_kept(tokenizer):
    tracemalloc.start()
    assert tokenizer.decode(range(tokenizer.vocab_size, tokenizer.vocab_size + 100_000)) == ""
    assert tracemalloc.get_traced_memory()[0] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_streamed_text_is_the_decoded_text(tokenizer, id_lists, size):
    for ids, text in id_lists:
        deltas, stopped = streamed(tokenizer, ids, (), size)
        assert "".join(deltas) == text
        assert not stopped


def test_half_a_character_waits(tokenizer):
    stream = TextStream(tokenizer)
    space, *wave = tokenizer.encode("👋")
    assert [stream.push([token_id]) for token_id in [space, *wave]] == ["", "", "", "", "👋"]
    assert stream.push(wave[:2]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}" * 2


def until_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The slow definition: read character by character until the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        if ending := [mark for mark in stop if text[:end].endswith(mark)]:
            return text[: end - max(map(len, ending))], True
    return text, False


def test_a_stream_ends_before_the_first_stop_string_whatever_the_pieces(tokenizer, id_lists):
    generator = random.Random(1)
    hits = 0
    for ids, text in id_lists:
        if len(text) < 2:
            continue
        marks = []
        for _ in range(generator.randrange(1, 4)):
            start = generator.randrange(len(text))
            marks.append(text[start : start + generator.randrange(1, 6)] + generator.choice(["", "", "\0"]))
        deltas, stopped = streamed(tokenizer, ids, tuple(marks), generator.randrange(1, 4))
        assert ("".join(deltas), stopped) == until_stop(text, tuple(marks))
        hits += stopped
    assert hits > 1000


def test_text_that_may_begin_a_stop_string_is_held_back(tokenizer):
    stream = TextStream(tokenizer, stop=("\n\n问",))
    deltas = [stream.push([token_id]) for token_id in tokenizer.encode("答案\n\n1")]
    assert "".join(deltas) == "答案\n\n1"
    assert all(not delta.endswith("\n") for delta in deltas)
    assert stream.push(tokenizer.encode("\n\n问题")[1:]) + stream.finish() == ""
    assert stream.stopped
    assert stream.push(tokenizer.encode("再")) == ""


def test_lone_surrogates_are_refused_by_name(tokenizer):
    with pytest.raises(ModelError, match=r"not valid Unicode near 'a\\ud83d'"):
        tokenizer.encode("a\ud83d")


def test_a_tokenizer_can_be_sent_to_workers(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("你好 people") == tokenizer.encode("你好 people")
    assert copy.fingerprint == "e7dc4c393423b76e4373e5157ddc34803a0189ba96b21ddbb40269d31468a6f2"


def test_bad_folders_are_named(shared, tmp_path):
    with pytest.raises(ModelError, match=r"nowhere is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"tokenizer.model is missing: copy it from"):
        load_tokenizer(shared / "chatglm3/ckpt/small-fp16-bin")
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match=r"tokenizer.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_the_package_is_imported_without_torch():
    code = "import sys, chatglm3, chatglm3.stream; print({'torch', 'transformers', 'peft', 'ray'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
