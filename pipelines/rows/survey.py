"""First pass over the shards: check every line, and keep of a good one what tells duplicates and documents apart."""

from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import orjson
from rensa import RMinHash

from chatglm3 import ModelError
from chatglm3.bm25 import plain_text
from chatglm3.chat import render
from chatglm3.documents import seed_document
from pipelines.rows.cleaning import clean_conversation, clean_sample, digest, mask_personal_data, shingles
from pipelines.rows.lengths import ruler_of
from pipelines.rows.lines import LONGEST_LINE, Line, Piece, RowError, read_lines
from pipelines.rows.recipe import least_tokens
from pipelines.rows.shards import BadRow, Conversation, Sample, parse_row

PERMUTATIONS = 64
RECORD = np.dtype(
    [
        ("piece", "u4"),
        ("line", "u4"),
        ("offset", "u8"),
        ("content", "u8"),
        ("key", "S32"),
        ("document", "u8"),
        ("answer", "u8"),
        ("pair", "u8"),
        ("signature", "u4", PERMUTATIONS),
    ]
)
"""What is kept of a good line, 0.3 kB: where it stands, a digest of its bytes, `key` (the sample's identity), digests
of its document, of its answer and of its question with its document, all as plain text, and the document's MinHash.
A conversation has no answer and no pair: 0. Its document is `document_of` it."""


@dataclass(frozen=True)
class Rules:
    """What makes a line good."""

    preset: str
    tokenizer: str
    max_tokens: int
    mask_personal_data: bool


@dataclass
class Findings:
    """What is in a piece, or in all of them."""

    lines: int = 0
    blank: int = 0
    """How many of the lines are empty."""
    records: np.ndarray = field(default_factory=lambda: np.empty(0, RECORD))
    questions: list[str] = field(default_factory=list)
    """Of each record: letters and digits alone."""
    bad: list[BadRow] = field(default_factory=list)


def examine(piece: Piece, index: int, rules: Rules) -> Findings:
    """Check the lines of a piece. Line numbers count from its start: what stands before it is not known here."""
    findings = Findings()
    records = []
    for line in read_lines(piece):
        findings.lines = line.number
        if not line.content.strip():
            findings.blank += 1
            continue
        try:
            record, question = _record(line, rules)
        except RowError as error:
            findings.bad.append(BadRow(piece.name, line.number, str(error), _shown(line.content, rules), error.kind))
        else:
            records.append((index, line.number, line.offset, *record))
            findings.questions.append(question)
    findings.records = np.array(records, RECORD)
    return findings


def _shown(line: bytes, rules: Rules) -> str:
    """The beginning of a bad line. What its cut might leave of a number or an address is beyond the end."""
    text = line[:1000].decode("utf-8", "replace")
    return (mask_personal_data(text, Counter()) if rules.mask_personal_data else text)[:200]


def join(pieces: list[Piece], found: list[Findings]) -> Findings:
    """The findings of all pieces, in order, with line numbers counted from the start of their files."""
    whole = Findings()
    before, path = 0, ""
    for piece, part in zip(pieces, found, strict=True):
        before, path = (before if piece.path == path else 0), piece.path
        part.records["line"] += before
        whole.bad += [replace(row, line=row.line + before) for row in part.bad]
        whole.questions += part.questions
        before += part.lines
        whole.lines += part.lines
        whole.blank += part.blank
    whole.records = np.concatenate([part.records for part in found]) if found else whole.records
    return whole


def signature(text: str) -> np.ndarray:
    """MinHash (Broder, 1997) of a text's runs of SHINGLE characters, [PERMUTATIONS] of uint32."""
    minhash = RMinHash(num_perm=PERMUTATIONS, seed=1)
    minhash.update(shingles(text))
    return np.array(minhash.digest(), np.uint32)


def sample_key(sample: Sample) -> str:
    """Samples with the same question, answer and document are one, whatever their white space and letter case."""
    return _key("\0".join(map(plain_text, (sample.question, sample.answer, sample.positive))).encode())


def conversation_key(conversation: Conversation) -> str:
    """Identity of a conversation: its messages and tools."""
    return _key(orjson.dumps([conversation.messages, conversation.tools], option=orjson.OPT_SORT_KEYS))


def document_of(conversation: Conversation) -> str:
    """What a conversation's side of the split depends on: the document of a prompt of the `seed` preset, otherwise
    the user's first message.
    """
    texts = [message["content"] for message in conversation.messages if message["role"] == "user"]
    first = texts[0] if texts else conversation.messages[0]["content"]
    return seed_document(first) or first


def _key(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _record(line: Line, rules: Rules) -> tuple[tuple[Any, ...], str]:
    if not line.is_whole:
        raise RowError(f"the line is longer than {LONGEST_LINE >> 20} MiB")
    row = parse_row(line.content, with_negatives=False)
    content = int.from_bytes(blake2b(line.content.strip(), digest_size=8).digest())
    cleaning = rules.preset != "seed", rules.mask_personal_data, Counter[str]()
    if isinstance(row, Conversation):
        row = clean_conversation(row, *cleaning)
        _check_conversation(row, rules)
        text = plain_text(document_of(row))
        return (content, conversation_key(row).encode(), digest(text), 0, 0, signature(text)), ""
    row = clean_sample(row, *cleaning)
    _check_sample(row, rules)
    question, answer, document = map(plain_text, (row.question, row.answer, row.positive))
    digests = map(digest, (document, answer, f"{question}\0{document}"))
    return (content, sample_key(row).encode(), *digests, signature(document)), "".join(filter(str.isalnum, question))


def _check_sample(sample: Sample, rules: Rules) -> None:
    if rules.preset == "chat":
        raise RowError("a document question, but --preset chat takes conversations")
    if (least := least_tokens(sample, ruler_of(rules.tokenizer))) > rules.max_tokens:
        raise RowError("question and answer leave no room within --max_tokens", f" {rules.max_tokens}: {least} tokens")


def _check_conversation(conversation: Conversation, rules: Rules) -> None:
    tokenizer = ruler_of(rules.tokenizer).tokenizer
    try:
        tokens = len(render(tokenizer, conversation.messages, conversation.tools)[0])
    except ModelError as error:
        raise RowError("the conversation cannot be written in ChatGLM3's format", f": {error}") from None
    if tokens > rules.max_tokens:
        raise RowError("the conversation is longer than --max_tokens", f" {rules.max_tokens}: {tokens} tokens")
