"""The tokenizer as transformers' AutoTokenizer has it, against the official one's own results."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chatglm3 import load_tokenizer
from chatglm3.auto_tokenizer import write_auto_tokenizer
from chatglm3.chat import TOOLS_CONTENT, prompt_ids, render
from chatglm3.tokenizer import CONTROL_TOKENS


@pytest.fixture(scope="module")
def tokenizer(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("auto")
    write_auto_tokenizer((shared / "chatglm3/tokenizer.model").read_bytes(), folder, TOOLS_CONTENT)
    return AutoTokenizer.from_pretrained(folder)


def test_every_text_has_the_official_ids_and_comes_back(tokenizer: Any, shared: Path) -> None:
    lines = (shared / "chatglm3/tokenizer_cases.jsonl").read_text(encoding="utf-8").splitlines()
    special = (*CONTROL_TOKENS, "</s>", "<unk>")  # in a text, AutoTokenizer takes these for what they name
    cases = [case for case in map(json.loads, lines) if not any(token in case["text"] for token in special)]
    assert len(cases) > 3500
    wrong = [c["text"] for c in cases if tokenizer.encode(c["text"], add_special_tokens=False) != c["ids"]]
    assert wrong == []
    assert [c["text"] for c in cases if tokenizer.decode(c["ids"]) != c["decoded"]] == []


def test_a_plain_text_gets_the_prefix_and_special_ids_are_those_of_the_official_tokenizer(
    tokenizer: Any, shared: Path
) -> None:
    ours = load_tokenizer(shared / "chatglm3/ckpt/full-fp16-bin")
    assert tokenizer("你好")["input_ids"] == ours.prefix_ids + ours.encode("你好")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (2, 0, "left")
    assert [tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS] == list(range(64789, 64798))


CONVERSATIONS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "system", "content": "简短回答。"}, {"role": "user", "content": " 1 + 1 = ?\n"}],
    [
        {"role": "user", "content": "天气"},
        {"role": "assistant", "content": "", "metadata": "get_weather"},
        {"role": "observation", "content": '{"晴": 1}'},
        {"role": "assistant", "content": "晴。"},
        {"role": "user", "content": "多谢"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [{"name": "f", "description": "查询", "parameters": {"城市": "x"}}]])
def test_the_chat_template_gives_the_official_ids(tokenizer: Any, shared: Path, messages: Any, tools: Any) -> None:
    ours = load_tokenizer(shared / "chatglm3/ckpt/full-fp16-bin")
    asked = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert asked == prompt_ids(ours, messages, tools)
    whole = [*messages, {"role": "assistant", "content": "再见"}]
    told = tokenizer.apply_chat_template(whole, tools=tools, return_dict=False)
    assert told == render(ours, whole, tools)[0][:-1], "but for the </s> at the end"
