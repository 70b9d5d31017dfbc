"""Tool calls as ChatGLM3 writes them: into the history, out of the model, and forced by a grammar."""

import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import openai
import pytest
from pydantic import BaseModel, Field

from chatglm3 import load_tokenizer, parse_reply, prompt_ids
from chatglm3.engines.guide import Guide, GuideCompiler
from chatglm3.engines.request_errors import RequestError
from chatglm3.tokenizer import ChatGlmTokenizer
from chatglm3.tool_calls import call_message, calls_grammar
from tests.test_guide import follows

WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"]},
            "at": {"type": "object", "properties": {"hour": {"type": "number"}}, "required": ["hour"]},
            "tags": {"type": "array", "items": {"type": ["string", "null"]}},
            "exact": {"anyOf": [{"type": "boolean"}, {"const": 1}]},
        },
        "required": ["city", "unit"],
    },
}
CLOCK = {"name": "报时"}


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> ChatGlmTokenizer:
    return load_tokenizer(tiny)


def written(call: dict) -> str:
    return f"{call['metadata']}\n{call['content']}"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"city": "北京"},
        {"city": 'it\'s "quoted" \\ \n ```\ntool_call(a=1)', "n": -1.5e-7, "ok": True, "none": None},
        {"nested": {"list": [1, [], {}], "一": "二"}},
        {"not-a-name": 1, "class": 2},
        {"class": 1},
        {"": 0},
    ],
)
def test_a_call_in_the_history_is_read_back_as_it_was(arguments):
    reply = parse_reply(written(call_message("get_weather", arguments)), [WEATHER])
    assert reply.tool_calls == [{"name": "get_weather", "parameters": arguments}]


def test_a_call_in_the_history_is_the_official_one():
    assert call_message("get_weather", {"city": "北京"}) == {
        "role": "assistant",
        "metadata": "get_weather",
        "content": " ```python\ntool_call(city='北京')\n```",
    }


def allowed(tokenizer: ChatGlmTokenizer, tools: list, *calls: dict, strict: Sequence[str] = ()) -> list[bool]:
    compiler = GuideCompiler(tokenizer)
    grammar = Guide("grammar", calls_grammar(tools, strict))
    found = []
    for call in calls:
        ids = tokenizer.encode(call["metadata"] + "\n") + tokenizer.encode(call["content"].removeprefix(" "))
        found.append(follows(compiler.matcher(grammar), ids))
    return found


def test_the_grammar_takes_calls_that_fit_the_schema_and_no_others(tokenizer):
    right = [
        {"city": "北京", "unit": "C"},
        {"city": "it's", "days": -3, "unit": "F", "at": {"hour": 7.5}, "tags": ["a", None], "exact": True},
        {"city": "", "unit": "C", "tags": [], "exact": 1},
    ]
    wrong = [
        {},
        {"city": "北京"},
        {"unit": "C", "city": "北京"},  # the order is the schema's
        {"city": 5, "unit": "C"},
        {"city": "北京", "unit": "K"},
        {"city": "北京", "unit": "C", "exact": 2},
        {"city": "北京", "unit": "C", "other": 1},
        {"city": "北京", "days": 1.5, "unit": "C"},
    ]
    calls = [call_message("get_weather", arguments) for arguments in right + wrong]
    assert allowed(tokenizer, [WEATHER, CLOCK], *calls) == [True] * len(right) + [False] * len(wrong)
    others = [call_message("报时", {}), call_message("报时", {"zone": [1, {"a": None}]}), call_message("unknown", {})]
    assert allowed(tokenizer, [WEATHER, CLOCK], *others) == [True, True, False]
    named = [{"metadata": "报时", "content": f"```python\ntool_call({name}=1)\n```"} for name in ("class", "classes")]
    assert allowed(tokenizer, [WEATHER, CLOCK], *named) == [False, True]  # Python takes no keyword for a name


def test_parameters_whose_names_are_no_python_names_come_as_a_dictionary(tokenizer):
    tool = {"name": "f", "parameters": {"properties": {"a-b": {"type": "integer"}, "c": {}}, "required": ["c"]}}
    calls = [call_message("f", {"a-b": 1, "c": "x"}), {"metadata": "f", "content": "```python\n{'c': [1]}\n```"}]
    assert allowed(tokenizer, [tool], *calls) == [True, True]


def test_what_a_schema_says_in_words_unknown_here_allows_any_value(tokenizer):
    properties = {
        "a": {"$ref": "#/x"},
        "b": True,
        "c": {"type": 7},
        "d": {"anyOf": []},
        "e": {"items": 3, "type": "array"},
    }
    tool = {"name": "f", "parameters": {"properties": properties}}
    call = call_message("f", {"a": {"k": [None]}, "b": "x", "c": False, "d": -1, "e": [1, "y"]})
    assert allowed(tokenizer, [tool], call) == [True]


class Unit(Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


class Place(BaseModel):
    city: str
    unit: Unit


class Journey(BaseModel):
    begin: Place
    others: list[Place]


def strict_tool(model: type[BaseModel]) -> dict:
    return openai.pydantic_function_tool(model, name="f")["function"]


def test_a_model_of_models_is_kept_to_in_a_strict_call(tokenizer):
    begin, other = {"city": "北京", "unit": "C"}, {"city": "上海", "unit": "F"}
    calls = [
        call_message("f", {"begin": begin, "others": others}) for others in ([], [other, begin], [{"city": "x"}], [1])
    ]
    calls += [call_message("f", {"begin": begin | {"unit": "K"}, "others": []}), call_message("f", {"begin": "x"})]
    assert allowed(tokenizer, [strict_tool(Journey)], *calls, strict=["f"]) == [True, True, False, False, False, False]


def test_a_call_without_parameters_has_none(tokenizer):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
    assert allowed(tokenizer, [tool], call_message("f", {}), call_message("f", {"a": 1})) == [True, False]


class Tree(BaseModel):
    left: "Tree | None"
    right: "Tree | None"


class Aged(BaseModel):
    years: int = Field(ge=0)


class Counted(BaseModel):
    counts: dict[str, int]


@pytest.mark.parametrize(
    ("model", "what"),
    [(Tree, "more than 8 levels"), (Aged, "minimum"), (Counted, "additionalProperties")],
    ids=["a tree", "a limit", "any names"],
)
def test_what_a_strict_call_cannot_be_kept_to_is_refused_by_name(model, what):
    tool = {"name": "f", "parameters": model.model_json_schema()}
    assert len(calls_grammar([tool])) < 10_000
    with pytest.raises(RequestError, match=f"a call of tool 'f' cannot be kept to its parameters' {what}"):
        calls_grammar([tool], strict=["f"])


def test_many_and_deep_parameters_make_a_grammar_of_their_own_size():
    deep: dict = {"type": "string"}
    for _ in range(50):
        deep = {"type": "object", "properties": {"a": deep}}
    small, large = [
        len(calls_grammar([{"name": "f", "parameters": {"properties": {f"p{i:03}": {} for i in range(size)}}}]))
        for size in (100, 200)
    ]
    assert large < 2.2 * small
    assert len(calls_grammar([{"name": "f", "parameters": deep}])) < 2000


@pytest.mark.parametrize("parameters", [{"properties": []}, {"properties": {"a": {}}, "required": "a"}])
def test_parameters_that_are_no_schema_are_refused_by_the_tools_name(parameters):
    with pytest.raises(RequestError, match="parameters of tool 'f' are no JSON schema of an object"):
        calls_grammar([{"name": "f", "parameters": parameters}])


def test_the_recorded_history_has_the_official_ids(shared):
    tokenizer = load_tokenizer(shared / "chatglm3/ckpt/full-fp16-bin")
    cases = json.loads((shared / "chatglm3/chat_model_cases.json").read_text(encoding="utf-8"))["chat"]
    [case] = [case for case in cases if any(message.get("metadata") for message in case["history"])]
    system, question, _ = case["history"]
    messages = [system, question, call_message("get_weather", {"city": "北京"})]
    messages.append({"role": case["role"], "content": case["query"]})
    assert prompt_ids(tokenizer, messages) == case["prompt_ids"]
