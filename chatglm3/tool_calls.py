"""Tools in ChatGLM3's own format: calls as the model writes them, and the grammar that makes it write one."""

import json
import keyword
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from chatglm3.engines.request_errors import RequestError

MAX_DEPTH = 8
"""Levels of a parameter's schema that the grammar follows, references among them; below, any value may come."""
_OF_NO_EFFECT = frozenset(
    {"title", "description", "default", "examples", "deprecated", "$defs", "definitions", "$schema", "$id", "$comment"}
)
"""Keywords that allow and forbid nothing by themselves."""

# Python literals that are JSON values too, and names that Python takes for arguments.
_VALUES = rf"""
any: STRING | NUMBER | "True" | "False" | "None" | "[" (any (", " any)*)? "]" | "{{" (entry (", " entry)*)? "}}"
entry: STRING ": " any
argument: ARGUMENT "=" any
ARGUMENT: /[A-Za-z_][A-Za-z0-9_]{{0,40}}/ & ~/{"|".join(keyword.kwlist)}/
STRING: /'([^'\\\x00-\x1f\x7f]|\\['"\\nt])*'/ | /"([^"\\\x00-\x1f\x7f]|\\['"\\nt])*"/
INTEGER: /-?(0|[1-9][0-9]{{0,17}})/
NUMBER: /-?(0|[1-9][0-9]{{0,17}})(\.[0-9]{{1,17}})?(e[+-]?[0-9]{{1,2}})?/
"""
_TYPES = {
    "string": "STRING",
    "integer": "INTEGER",
    "number": "NUMBER",
    "boolean": '("True" | "False")',
    "null": '"None"',
}


def call_message(name: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    """The message with which the model calls a tool, as it stands in the official history."""
    if all(_is_argument_name(key) for key in arguments):
        code = f"tool_call({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    else:
        code = repr(dict(arguments))
    # The space is the one that encoding puts before a text: the official history keeps it.
    return {"role": "assistant", "metadata": name, "content": f" ```python\n{code}\n```"}


def calls_grammar(tools: Sequence[Mapping[str, Any]], strict: Collection[str] = ()) -> str:
    """A grammar, in llguidance's Lark dialect, of a reply that calls one of `tools`, which are in the official form.

    Arguments come in the order of the tool's properties; those that are not required may be left out. RequestError
    if a tool's parameters are no JSON schema of an object, or say more than the grammar follows and the tool's name is
    in `strict`.
    """
    grammar, calls = _Grammar(), []
    for tool in tools:
        calls.append(grammar.call(tool))
        if grammar.not_followed and tool["name"] in strict:
            raise RequestError(
                f"a call of tool {tool['name']!r} cannot be kept to its parameters' {grammar.not_followed[0]}; "
                f"leave strict or the keyword out"
            )
    return "\n".join([f"start: {' | '.join(calls)}", *grammar.rules, _VALUES])


class _Grammar:
    """Rules that grow with each tool. The methods return what stands for a thing on the right side of a rule."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        self.not_followed: list[str] = []
        """What the schema of the last tool says beyond what its rules allow."""

    def call(self, tool: Mapping[str, Any]) -> str:
        """A whole reply that calls the tool."""
        schema = tool.get("parameters") or {}
        self.not_followed, self._root = [], schema
        self._references: dict[tuple[str, int], str] = {}
        if isinstance(reference := schema.get("$ref"), str):  # as of a model that holds itself
            schema = self._found(reference) or schema
        properties = _properties(schema, tool["name"])
        self._note_others(schema, "type", "properties", "required", "additionalProperties")
        if not properties and schema.get("additionalProperties") is False:
            arguments = '"tool_call()"'
        elif not properties:
            arguments = '"tool_call(" (argument (", " argument)*)? ")"'
        elif all(map(_is_argument_name, properties)):
            arguments = f'"tool_call(" {self._entries(schema, properties, "{}=", 0)} ")"'
        else:
            arguments = self._dictionary(schema, properties, 0)
        opening = f'{_text(tool["name"] + chr(10))} " "? {_text("```python" + chr(10))}'
        return self._rule(f"{opening} {arguments} {_text(chr(10) + '```')}")

    def _value(self, schema: Any, depth: int) -> str:
        """Python literals that `schema` allows; more than these where it says what is not known here."""
        if not isinstance(schema, dict):
            return "any"
        if depth >= MAX_DEPTH:
            self.not_followed.append(f"more than {MAX_DEPTH} levels")
            return "any"
        if isinstance(reference := schema.get("$ref"), str):
            self._note_others(schema, "$ref")
            return self._referred(reference, depth)
        if isinstance(choices := schema.get("anyOf") or schema.get("oneOf"), list):
            self._note_others(schema, "anyOf", "oneOf")
            return _any_of([self._value(choice, depth + 1) for choice in choices])
        if isinstance(values := [schema["const"]] if "const" in schema else schema.get("enum"), list) and values:
            self._note_others(schema, "const", "enum", "type")
            return _any_of([_text(repr(value)) for value in values])
        self._note_others(schema, "type", "properties", "required", "items", "additionalProperties")
        kinds = schema.get("type")
        return _any_of([self._typed(kind, schema, depth) for kind in (kinds if isinstance(kinds, list) else [kinds])])

    def _typed(self, kind: Any, schema: Mapping[str, Any], depth: int) -> str:
        if kind == "array":
            item = self._value(schema.get("items"), depth + 1)
            return f'"[" ({item} (", " {item})*)? "]"'
        if kind == "object":
            properties = _properties(schema, "")
            if properties:
                return self._dictionary(schema, properties, depth)
            return '"{}"' if schema.get("additionalProperties") is False else '"{" (entry (", " entry)*)? "}"'
        return _TYPES.get(kind, "any") if isinstance(kind, str) else "any"

    def _dictionary(self, schema: Mapping[str, Any], properties: Mapping[str, Any], depth: int) -> str:
        return f'"{{" {self._entries(schema, properties, "{!r}: ", depth)} "}}"'

    def _entries(self, schema: Mapping[str, Any], properties: Mapping[str, Any], key: str, depth: int) -> str:
        """The required properties and any of the others, in order, with commas between them."""
        required = schema.get("required", [])
        # From the last one backwards: what may follow when nothing has come yet, and when something has.
        first = later = '""'
        for name, its_schema in reversed(list(properties.items())):
            entry = self._rule(f"{_text(key.format(name))} {self._value(its_schema, depth + 1)}")
            with_it, and_it = f"{entry} {later}", f'", " {entry} {later}'
            is_required = name in required
            first = self._rule(with_it if is_required else f"{with_it} | {first}")
            later = self._rule(and_it if is_required else f"{and_it} | {later}")
        return first

    def _referred(self, reference: str, depth: int) -> str:
        """A rule for each level at which a schema stands, which may hold itself."""
        if (found := self._found(reference)) is None:
            self.not_followed.append(f"$ref {reference!r}")
            return "any"
        place = reference, depth
        if place not in self._references:
            self._references[place] = self._rule(self._value(found, depth + 1))
        return self._references[place]

    def _found(self, reference: str) -> dict[str, Any] | None:
        """What stands in the tool's own schema at `#/$defs/name`."""
        found: Any = self._root
        for part in reference.removeprefix("#/").split("/"):
            found = found.get(part) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else None

    def _note_others(self, schema: Mapping[str, Any], *followed: str) -> None:
        """Note the keywords that are none of those."""
        self.not_followed += [key for key in schema if key not in followed and key not in _OF_NO_EFFECT]
        if isinstance(schema.get("additionalProperties"), dict):
            self.not_followed.append("additionalProperties")

    def _rule(self, body: str) -> str:
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name


def _properties(schema: Mapping[str, Any], tool: str) -> dict[str, Any]:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise RequestError(f"parameters of tool {tool!r} are no JSON schema of an object: see properties and required")
    return properties


def _any_of(alternatives: Sequence[str]) -> str:
    return f"({' | '.join(alternatives)})" if alternatives else "any"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _is_argument_name(name: str) -> bool:
    return name.isidentifier() and name.isascii() and not keyword.iskeyword(name)
