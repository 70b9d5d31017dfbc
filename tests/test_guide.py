"""Guides over ChatGLM3's own vocabulary: every text that the tokenizer writes is followed byte for byte."""

import json
import statistics
import time
from pathlib import Path

import pytest
from llguidance import LLMatcher

from chatglm3.engines.guide import Guide, GuideCompiler, Vocabulary
from chatglm3.tokenizer import ChatGlmTokenizer, load_tokenizer

TEXTS = [
    "",
    "北京的人口是2189万。",
    "龘靐齉𠮷𪚥 𰻞",  # rare characters, made of bytes
    "👨‍👩‍👧‍👦 🏳️‍🌈 😀",
    'quotes " and \\ and / and \t and \n and \r',
    "  two  spaces   three ",
    "\u0000\u001f\u0085\u2028\u3000\ufeff\ufffd",
    "é e\u0301 ﬁ Ⅷ ½ sop eop philosophy </s> <|user|>",
    "▁ lower one eighth block",
]


@pytest.fixture(scope="module")
def official(shared: Path) -> ChatGlmTokenizer:
    return load_tokenizer(shared / "chatglm3/ckpt/full-fp16-bin")


@pytest.fixture(scope="module")
def compiler(official: ChatGlmTokenizer) -> GuideCompiler:
    return GuideCompiler(official)


def follows(matcher: LLMatcher, ids: list[int]) -> bool:
    """Whether the guide lets a model write these ids, one after the other, and end there."""
    for token in ids:
        bits = matcher.compute_bitmask()
        if not bits[token // 8] >> token % 8 & 1:
            return False
        matcher.consume_token(token)
    return matcher.is_accepting()


def test_the_bytes_of_a_text_s_tokens_are_its_own(official, shared):
    tokens = Vocabulary(official).tokens
    cases = (shared / "chatglm3/tokenizer_cases.jsonl").read_text(encoding="utf-8").splitlines()
    texts = TEXTS + [json.loads(case)["text"] for case in cases]
    exact = [text for text in texts if official.decode(official.encode(text)) == text and "▁" not in text]
    assert len(exact) > 0.9 * len(texts)
    for text in exact:
        assert b"".join([tokens[token] for token in official.encode(text)]) == (f" {text}" if text else "").encode()


@pytest.mark.parametrize("after", ["", "\n"], ids=["bare", "chat"])
def test_json_is_followed_whatever_its_strings_hold(official, compiler, after):
    lead = official.encode(after) if after else []
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for guide in (Guide("json_object", after=after), Guide("json_schema", json.dumps(schema), after)):
        for text in TEXTS:
            content = json.dumps({"a": text}, ensure_ascii=False)
            assert follows(compiler.matcher(guide), lead + official.encode(content)), content
            assert not follows(compiler.matcher(guide), lead + official.encode(content[:-1]))
        for other in (
            "Sure",
            '{"a":"1"}',
            '{ "a": "1"}',
            '{"a": "\\u5317"}',
        ):  # as json.dumps writes it, without needless escapes
            assert not follows(compiler.matcher(guide), lead + official.encode(other))


def test_where_only_one_text_can_come_the_model_chooses_its_tokens(official, compiler):
    """Not those of `encode` alone, which begin with a space: vLLM's own tokenizer has no other way to encode."""
    matcher = compiler.matcher(Guide("regex", "北京", after="\n"))
    written = official.encode("\n")
    for token in written:
        assert matcher.consume_token(token)
    bits = matcher.compute_bitmask()
    allowed = {official.piece(token) for token in range(official.vocab_size) if bits[token // 8] >> token % 8 & 1}
    assert allowed == {"▁", "▁北", "▁北京", "北", "北京", "北京".encode()[:1]} & allowed
    assert {"北京", "北"} <= allowed


def test_every_id_that_ends_a_reply_ends_a_guided_one(official, compiler):
    for stop_id in official.stop_ids:
        assert follows(compiler.matcher(Guide("regex", "[0-9]+")), [*official.encode("12"), stop_id])
    assert not follows(compiler.matcher(Guide("regex", "[0-9]+")), [official.stop_ids[0]])


def test_a_mask_over_the_whole_vocabulary_takes_milliseconds(official, compiler):
    matcher, seconds = compiler.matcher(Guide("json_object", after="\n")), []
    for token in official.encode("\n") + official.encode(json.dumps({"a": ["天气", 1.5e3, {"b": None}]})):
        started = time.perf_counter()
        matcher.compute_bitmask()
        seconds.append(time.perf_counter() - started)
        matcher.consume_token(token)
    assert statistics.median(seconds) < 0.005
