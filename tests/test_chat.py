"""Conversations as ids against the official build_chat_input and the predecessor's training code."""

import json
from pathlib import Path

import pytest

from chatglm3 import ModelError, example_ids, load_tokenizer, prompt_ids
from chatglm3.chat import TOOLS_CONTENT, question_ids, render
from chatglm3.tokenizer import ChatGlmTokenizer

WEATHER = {"name": "get_weather", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> ChatGlmTokenizer:
    return load_tokenizer(shared / "chatglm3/ckpt/full-fp16-bin")


def message(role: str, content: str, **others: object) -> dict:
    return {"role": role, "content": content, **others}


def texts(tokenizer: ChatGlmTokenizer, ids: list[int], where: list[bool]) -> list[str]:
    """What each target stands for, in SentencePiece's own spelling."""
    pieces = [tokenizer.piece(token_id) for token_id, wanted in zip(ids, where, strict=True) if wanted]
    return [piece or "</s>" for piece in pieces]


def test_prompts_are_the_official_ones(shared, tokenizer):
    cases = json.loads((shared / "chatglm3/chat_prompt_cases.json").read_text(encoding="utf-8"))
    assert len(cases) == 149
    for case in cases:
        ids = prompt_ids(tokenizer, [*case["history"], message(case["role"], case["query"])])
        assert ids == case["input_ids"]
        assert case["attention_mask"] == [1] * len(ids)
        assert case["position_ids"] == list(range(len(ids)))


def test_prompts_of_the_recorded_chats_are_the_official_ones(shared, tokenizer):
    cases = json.loads((shared / "chatglm3/chat_model_cases.json").read_text(encoding="utf-8"))
    for case in cases["chat"]:
        assert prompt_ids(tokenizer, [*case["history"], message(case["role"], case["query"])]) == case["prompt_ids"]
    for turn in cases["multi_turn"][0]:
        assert prompt_ids(tokenizer, [*turn["history_in"], message("user", turn["query"])]) == turn["prompt_ids"]


def test_encoding_a_whole_prompt_as_one_text_would_not_pass(shared, tokenizer):
    """What a chat template does: metadata and content as one string."""
    cases = json.loads((shared / "chatglm3/chat_prompt_cases.json").read_text(encoding="utf-8"))
    plain = [case for case in cases if not any("tools" in past for past in case["history"])]

    def templated(case: dict) -> list[int]:
        ids = list(tokenizer.prefix_ids)
        for past in [*case["history"], message(case["role"], case["query"])]:
            ids += [tokenizer.control_id(f"<|{past['role']}|>")]
            ids += tokenizer.encode(f"{past.get('metadata', '')}\n{past['content']}")
        return [*ids, tokenizer.control_id("<|assistant|>")]

    assert sum(templated(case) != case["input_ids"] for case in plain) > len(plain) / 2


def test_tools_are_told_in_the_system_message(tokenizer):
    question = message("user", "北京天气怎么样")
    told = prompt_ids(tokenizer, [message("system", TOOLS_CONTENT, tools=[WEATHER]), question])
    assert prompt_ids(tokenizer, [question], tools=[WEATHER]) == told
    assert prompt_ids(tokenizer, [message("system", TOOLS_CONTENT), question], tools=[WEATHER]) == told
    assert prompt_ids(tokenizer, [question], tools=[]) == prompt_ids(tokenizer, [question])
    with pytest.raises(ModelError, match="tools are given twice"):
        prompt_ids(tokenizer, [message("system", "", tools=[WEATHER]), question], tools=[WEATHER])


def test_only_the_answer_and_the_token_after_it_are_targets(tokenizer):
    ids, is_target = render(tokenizer, [message("user", "1+1?"), message("assistant", "Hi")])
    assert ids == [
        *prompt_ids(tokenizer, [message("user", "1+1?")]),
        *tokenizer.encode("\n"),
        *tokenizer.encode("Hi"),
        2,
    ]
    assert texts(tokenizer, ids, where=is_target) == ["▁", b"\n", "▁Hi", "</s>"]


def test_every_turn_of_the_assistant_is_a_target(tokenizer):
    conversation = [
        message("user", "weather"),
        message("assistant", "call", metadata="tool"),
        message("observation", "sunny"),
        message("assistant", "Sunny"),
        message("user", "thanks"),
    ]
    ids, is_target = render(tokenizer, conversation, tools=[WEATHER])
    assert texts(tokenizer, ids, where=is_target) == [
        *["▁tool", b"\n", "▁call", "<|observation|>"],
        *["▁", b"\n", "▁Sun", "ny", "<|user|>"],
    ]
    assert [*ids, tokenizer.control_id("<|assistant|>")] == prompt_ids(tokenizer, conversation, tools=[WEATHER])


def test_a_turn_without_loss_is_no_target_and_neither_is_the_token_that_ends_it(tokenizer):
    conversation = [
        message("user", "a"),
        {**message("assistant", "b"), "loss": False},
        message("user", "c"),
        message("assistant", "d"),
    ]
    ids, is_target = render(tokenizer, conversation)
    assert texts(tokenizer, ids, where=is_target) == ["▁", b"\n", "▁d", "</s>"]
    everything, _ = render(tokenizer, [message("user", "a"), message("assistant", "b"), *conversation[2:]])
    assert ids == everything
    ids, is_target = render(tokenizer, conversation[:2])
    assert ids[-1] == tokenizer.eos_id
    assert not any(is_target)


def test_training_examples_are_the_predecessors(shared, tokenizer):
    cases = json.loads((shared / "chatglm3/training_cases.json").read_text(encoding="utf-8"))
    assert len(cases) == 136
    for case in cases:
        limits = case["max_input_length"], case["max_output_length"]
        assert example_ids(tokenizer, case["question"], case["answer"], *limits) == (case["input_ids"], case["labels"])


def test_a_question_is_asked_in_the_format_that_was_trained(tokenizer):
    question = [message("user", "答：")]
    assert question_ids(tokenizer, question, "chat") == prompt_ids(tokenizer, question)
    bare = question_ids(tokenizer, question, "bare")
    assert bare == [64790, 64792, *tokenizer.encode("答：")]
    ids, labels = example_ids(tokenizer, "答：", "是", 512, 512)
    assert bare == ids[: labels.count(-100)]


@pytest.mark.parametrize(
    "messages",
    [[message("user", "a"), message("assistant", "b"), message("user", "c")], [message("system", "a")], []],
)
def test_the_bare_format_has_no_history(tokenizer, messages):
    with pytest.raises(ModelError, match="prompt_format bare takes one user message"):
        question_ids(tokenizer, messages, "bare")


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "messages is empty"),
        ([message("tool", "x")], "role is 'tool': use one of system, user, assistant, observation"),
        ([{"content": "x"}], "role is None"),
        ([{"role": "user"}], "content of a user message is None, not text"),
        ([message("user", ["x"])], r"content of a user message is \['x'\], not text"),
        ([message("assistant", "x", metadata=1)], "metadata of a assistant message is 1, not text"),
    ],
)
def test_bad_messages_are_refused_by_name(tokenizer, messages, fault):
    with pytest.raises(ModelError, match=fault):
        prompt_ids(tokenizer, messages)
