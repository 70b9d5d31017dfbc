"""First pass over the shards: check every line, and keep of a good one what tells duplicates and documents apart."""

from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rensa import RMinHash

from chatglm3.chat import render
from pipelines.cleaning import clean_conversation, clean_sample, digest, plain_text
from pipelines.lengths import ruler_of
from pipelines.lines import Line, Piece, RowError, read_lines
from pipelines.recipe import least_tokens
from pipelines.shards import BadRow, Conversation, Sample, parse_row

PERMUTATIONS = 64
SHINGLE = 5  # characters
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
A conversation has none of these: 0."""


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
        if line.content is not None and not line.content.strip():
            continue
        try:
            record, question = _record(line, rules)
        except RowError as error:
            raw = (line.content or b"")[:200].decode("utf-8", "replace")
            findings.bad.append(BadRow(Path(piece.path).name, line.number, str(error), raw))
        else:
            records.append((index, line.number, line.offset, *record))
            findings.questions.append(question)
    findings.records = np.array(records, RECORD)
    return findings


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
    whole.records = np.concatenate([part.records for part in found]) if found else whole.records
    return whole


def signature(text: str) -> np.ndarray:
    """MinHash (Broder, 1997) of a text's runs of SHINGLE characters, [PERMUTATIONS] of uint32."""
    minhash = RMinHash(num_perm=PERMUTATIONS, seed=1)
    minhash.update([text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))])
    return np.array(minhash.digest(), np.uint32)


def sample_key(sample: Sample) -> str:
    """Samples with the same question, answer and document are one, whatever their white space and letter case."""
    return _key("\0".join(map(plain_text, (sample.question, sample.answer, sample.positive))).encode())


def conversation_key(conversation: Conversation) -> str:
    """Identity of a conversation: its messages and tools."""
    return _key(orjson.dumps([conversation.messages, conversation.tools], option=orjson.OPT_SORT_KEYS))


def _key(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _record(line: Line, rules: Rules) -> tuple[tuple[Any, ...], str]:
    row = parse_row(line.content, with_negatives=False)
    content = int.from_bytes(blake2b((line.content or b"").strip(), digest_size=8).digest())
    if isinstance(row, Conversation):
        row = clean_conversation(row, rules.mask_personal_data, Counter())
        _check_conversation(row, rules)
        return (content, conversation_key(row).encode(), 0, 0, 0, np.zeros(PERMUTATIONS, np.uint32)), ""
    row = clean_sample(
        replace(row, negatives=(), hard=frozenset()), rules.preset != "seed", rules.mask_personal_data, Counter()
    )
    _check_sample(row, rules)
    question, answer, document = map(plain_text, (row.question, row.answer, row.positive))
    digests = map(digest, (document, answer, f"{question}\0{document}"))
    return (content, sample_key(row).encode(), *digests, signature(document)), "".join(filter(str.isalnum, question))


def _check_sample(sample: Sample, rules: Rules) -> None:
    if rules.preset == "chat":
        raise RowError("a document question, but --preset chat takes conversations")
    if (least := least_tokens(sample, ruler_of(rules.tokenizer))) > rules.max_tokens:
        raise RowError(f"question and answer take {least} tokens, --max_tokens is {rules.max_tokens}")


def _check_conversation(conversation: Conversation, rules: Rules) -> None:
    tokenizer: Any = ruler_of(rules.tokenizer).tokenizer
    tokens = len(render(tokenizer, conversation.messages, conversation.tools)[0])
    if tokens > rules.max_tokens:
        raise RowError(f"the conversation has {tokens} tokens, --max_tokens is {rules.max_tokens}")
