"""What an answer must look like, as a grammar that llguidance follows token by token. Needs no torch."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from chatglm3.engines.request_errors import RequestError
from chatglm3.tokenizer import CONTROL_TOKENS, ChatGlmTokenizer

MAX_TEXT = 2**16
"""Characters of a schema, a regular expression or a grammar."""
MAX_ITEMS = 10_000
"""Sum of the numbers of items that a schema names. llguidance builds a rule an item: a billion ends the process."""
# Where only one text can come, llguidance would have it encoded, and allow these tokens alone. Encoding puts a space
# before it, which cannot come: nothing would be allowed. So every way to write the text is, and the model chooses.
_OPTIONS = '%llguidance {"no_forcing": true}'
# As json.dumps writes it. Were any white space allowed, a model that is unsure would go on with it for ever.
_JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,  # oneOf is followed as anyOf
}
# Half of llguidance's own: nothing that was tried then takes a fifth of a second to compile, or 30 ms for a mask.
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    max_lexer_states=50_000,  # of 2 kB each
    max_grammar_size=100_000,
    verbose_errors=False,
)


@dataclass(frozen=True)
class Guide:
    """A constraint on an answer, from its first character to its last."""

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    text: str = ""
    """The schema as JSON, the regular expression in Rust's syntax, or the grammar in llguidance's Lark dialect."""
    after: str = ""
    """What the answer begins with before that: in ChatGLM3's chat format, the line of its metadata."""

    def __post_init__(self) -> None:
        if len(self.text) > MAX_TEXT:
            raise RequestError(f"a {self.kind} has at most {MAX_TEXT} characters, not {len(self.text)}")
        if any("\ud800" <= character <= "\udfff" for character in self.text):
            raise RequestError(f"the {self.kind} is not valid Unicode: remove lone surrogates")
        if self.kind == "json_schema":
            _check_schema(self.text)
        if self.kind == "grammar" and "%json" in self.text:
            raise RequestError("a grammar must not hold %json: send the schema as json")

    def lark(self) -> str:
        """The whole answer in llguidance's Lark dialect, `after` and the spaces that the tokenizer adds included."""
        # Each text of a conversation is encoded with a space before it, which decoding takes off again.
        lead = f'" "? {json.dumps(self.after)} " "?' if self.after else '" "?'
        return f"{_OPTIONS}\nstart: {lead} body\nbody: {self._body()}\n"

    def _body(self) -> str:
        match self.kind:
            case "json_object":
                return _json_body({"type": "object"})
            case "json_schema":
                return _json_body(json.loads(self.text))
            case "regex":
                pattern = regex_to_lark(self.text).replace("\n", "\\n")
                return f"/{pattern}/"
            case "grammar":
                return f"%lark {{\n{self.text}\n}}"


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise RequestError("the json_schema is no JSON object, or one of too many levels")
    items, nodes = 0.0, [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            sizes = (node.get(key) for key in ("minItems", "maxItems"))
            items += sum(abs(size) for size in sizes if isinstance(size, int | float))  # none takes another's room
            nodes.extend(node.values())
        elif isinstance(node, list):
            nodes.extend(node)
    if not items <= MAX_ITEMS:
        raise RequestError(f"minItems and maxItems of the json_schema sum up to {items:g}, above {MAX_ITEMS}")


def _json_body(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': _JSON_OPTIONS})}"


class GuideCompiler:
    """Guides as matchers over one tokenizer's vocabulary. Safe in threads."""

    def __init__(self, tokenizer: ChatGlmTokenizer) -> None:
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(Vocabulary(tokenizer)), n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.stop_ids)
        )
        self._compiled: Callable[[Guide], LLMatcher] = lru_cache(16)(self._compile)

    def matcher(self, guide: Guide) -> LLMatcher:
        """A matcher at the start of an answer. RequestError if the guide is wrong, or more than llguidance can do."""
        return self._compiled(guide).deep_copy()

    def _compile(self, guide: Guide) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, guide.lark(), log_level=0, limits=LIMITS)
        matcher.compute_bitmask()  # finds what the compilation does not
        raise_if_stuck(matcher, guide)
        return matcher


def raise_if_stuck(matcher: LLMatcher, guide: Guide) -> None:
    """RequestError if the guide's matcher cannot go on, in one line."""
    if matcher.is_error():
        reason = matcher.get_error().split("<")[0].split("\n\n")[0]
        raise RequestError(f"the {guide.kind} cannot be followed: {' '.join(reason.split())[:200]}")


class Vocabulary:
    """What llguidance must know of a tokenizer: the bytes of each token."""

    def __init__(self, tokenizer: ChatGlmTokenizer) -> None:
        pieces = [tokenizer.piece(token_id) for token_id in range(tokenizer.vocab_size)]
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = None
        controls = range(tokenizer.vocab_size - len(CONTROL_TOKENS), tokenizer.vocab_size)
        # None of an answer's text: control ids, ids that print nothing, and the space as a byte, which encoding never
        # makes and which decoding would not take off.
        self.special_token_ids = [
            token for token, piece in enumerate(pieces) if not piece or piece == b" " or token in controls
        ]
        self.tokens = [piece if isinstance(piece, bytes) else piece.replace("▁", " ").encode() for piece in pieces]
        for token in self.special_token_ids:
            self.tokens[token] = b"<|%d|>" % token
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        """Ids of a text; llguidance asks for them only where it forces tokens."""
        return self._encode(text.decode())
