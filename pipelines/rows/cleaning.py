"""Clean texts: Unicode NFC, personal data masked on request, distractors that would teach something wrong dropped."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from chatglm3.bm25 import plain_text
from pipelines.rows.shards import Conversation, Sample

PERSONAL_DATA = {
    # It may not begin within a word, or a long one would be tried from each of its characters.
    "e-mail addresses": ("[邮箱]", r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"),
    "identity card numbers": (
        "[身份证号]",
        r"(?<![0-9A-Za-z])[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])\d{3}[0-9Xx](?![0-9A-Za-z])",
    ),
    "phone numbers": (
        "[电话]",
        r"(?<![0-9A-Za-z.])(?:(?:\+?86[- ]?)?1[3-9]\d(?:[- ]?\d{4}){2}|\(?0\d{2,3}\)?[- ]\d{7,8}|[48]00-\d{3}-?\d{4})"
        r"(?![0-9A-Za-z])",
    ),
}
"""Kind -> what stands in the text instead, and the form of it in mainland China."""


SHINGLE = 5  # characters


@dataclass(frozen=True)
class Candidate:
    """A document that may stand in a prompt."""

    text: str
    plain: str
    """The text as `plain_text` gives it."""
    marked: bool
    """Whether the data says that it is hard."""


def digest(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def text_pairs(text: str) -> frozenset[str]:
    """Each two neighbouring characters of a text, white space left out; of a single character, itself."""
    text = "".join(text.split())
    return frozenset(text[i : i + 2] for i in range(len(text) - 1)) or frozenset([text])


def shingles(text: str) -> list[str]:
    """Its runs of SHINGLE characters, by which texts are compared; of a shorter text, itself."""
    return [text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))]


def near_copy_of(text: str, similarity: float) -> Callable[[str], bool]:
    """A test for texts whose shingles have at least this Jaccard similarity with those of `text`; 1 is never met."""
    ours = shingles(text)
    whole, probes = frozenset(ours), ours[:: len(ours) // 8 + 1]

    def is_near_copy(other: str) -> bool:
        if similarity >= 1 or not similarity <= len(other) / max(len(text), 1) <= 1 / similarity:
            return False
        if sum(probe in other for probe in probes) * 2 < len(probes):  # a hundred times as fast, and nearly always no
            return False
        theirs = frozenset(shingles(other))
        return len(whole & theirs) >= similarity * len(whole | theirs)

    return is_near_copy


def clean_sample(sample: Sample, compose: bool, mask: bool, counts: Counter[str]) -> Sample:
    """The sample with all its texts cleaned alike, so that an answer stays in its document."""

    def clean(text: str, counts: Counter[str] = counts) -> str:
        text = clean_text(text, compose, mask, counts)
        return text.strip() if compose else text

    return replace(
        sample,
        question=clean(sample.question),
        answer=clean(sample.answer),
        positive=clean(sample.positive),
        negatives=tuple(map(clean, sample.negatives)),
        hard=frozenset(clean(text, Counter()) for text in sample.hard),
    )


def clean_conversation(conversation: Conversation, compose: bool, mask: bool, counts: Counter[str]) -> Conversation:
    """The conversation with all texts in its messages and tools cleaned."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return clean_text(value, compose, mask, counts)
        if isinstance(value, dict):
            return {name: clean(inner) for name, inner in value.items()}
        return [clean(inner) for inner in value] if isinstance(value, list) else value

    return Conversation(clean(conversation.messages), clean(conversation.tools))


def clean_text(text: str, compose: bool, mask: bool, counts: Counter[str]) -> str:
    """The text in Unicode's NFC if `compose`, and with personal data masked if `mask`; what changed is counted."""
    if compose and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        counts["texts brought to NFC"] += 1
    return mask_personal_data(text, counts) if mask else text


def mask_personal_data(text: str, counts: Counter[str]) -> str:
    """Text with a word in place of each of PERSONAL_DATA; what was found is counted."""
    for kind, (word, pattern) in PERSONAL_DATA.items():
        text, found = re.subn(pattern, word, text)
        if found:
            counts[f"masked: {kind}"] += found
    return text


def usable_distractors(
    sample: Sample, barred: Container[int], near_copies: float, counts: Counter[str]
) -> list[Candidate]:
    """The negatives that may stand beside the positive document, each once, in order.

    Dropped and counted are: copies of the positive document or of each other, those that hold the answer (they would
    be golden too; answers of a single character are in every text), those whose digest is `barred`, and those that are
    nearly the positive document, with a similarity of `near_copies` or more.
    """
    answer, golden = plain_text(sample.answer), plain_text(sample.positive)
    seen, is_near_copy = {golden}, near_copy_of(golden, near_copies)
    kept = []
    for text in sample.negatives:
        plain = plain_text(text)
        if plain in seen:
            counts["distractors dropped: copy of another document"] += 1
        elif len(answer) > 1 and answer in plain:
            counts["distractors dropped: hold the answer"] += 1
        elif digest(plain) in barred:
            counts["distractors dropped: documents of the dev side"] += 1
        elif is_near_copy(plain):
            counts["distractors dropped: nearly the golden document"] += 1
        else:
            kept.append(Candidate(text, plain, text in sample.hard))
        seen.add(plain)
    return kept
