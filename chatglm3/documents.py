"""Document questions as prompts, and cited answers as text: the one builder for training, evaluation and questions."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

REFUSAL = "根据提供的文档无法回答该问题。"
_QUOTE = re.compile(r"原文(?P<citations>(?:\[\d+\])+)：(?P<quote>[^\n]+)\n答：")
_CITATIONS = re.compile(r"(?:\[\d+\])+\s*$")


@dataclass(frozen=True)
class DocumentAnswer:
    """An answer taken apart: its text, the 1-based numbers of the documents it cites, whether it is a refusal."""

    text: str
    citations: tuple[int, ...]
    refused: bool
    quote: str = ""
    """Words of the cited document that the answer rests on; empty where it quotes none."""


def seed_prompt(document: str, question: str) -> str:
    """The predecessor's single-document prompt, character for character."""
    # Concatenated, not formatted: braces and percent signs in a document are text.
    return (
        "你现在是一个可以根据文档内容进行问答的机器人，以下是用于参考的文档内容：\n\n"
        + document
        + "\n问题为："
        + question
        + "\n答："
    )


def seed_document(prompt: str) -> str:
    """The document in a `seed_prompt`; empty for another text."""
    start, middle, end = seed_prompt("\0", "\0").split("\0")
    document, _, question = prompt.removeprefix(start).rpartition(middle)
    return document if prompt.startswith(start) and question.endswith(end) else ""


def documents_prompt(documents: Sequence[str], question: str) -> str:
    """The multi-document prompt: the seed's, with numbered documents, so that answers can cite `[i]`."""
    return seed_prompt("\n".join(f"[{number}] {text}" for number, text in enumerate(documents, 1)), question)


def cited_answer(answer: str, number: int, quote: str = "") -> str:
    """The text a model learns to write when document `number` (1-based) holds `answer`: evidence first, if there is a
    `quote` of one line, then the answer."""
    if quote:
        return f"原文[{number}]：{quote}\n答：{answer}"
    space = " " if answer.endswith("]") else ""  # so that a number which the answer ends with is none of its citations
    return f"{answer}{space}[{number}]"


def parse_answer(reply: str) -> DocumentAnswer:
    """Take quote and citations off a model's reply; the reverse of `cited_answer`."""
    reply = reply.strip()
    if head := _QUOTE.match(reply):
        return DocumentAnswer(reply[head.end() :].strip(), _numbers(head["citations"]), False, head["quote"])
    tail = _CITATIONS.search(reply)
    text = reply[: tail.start()].rstrip() if tail else reply
    return DocumentAnswer(text, _numbers(tail.group()) if tail else (), refused=text == REFUSAL)


def _numbers(citations: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(map(int, re.findall(r"\d+", citations))))


def format_digest() -> str:
    """sha256 of the prompt and answer wording: models tuned with another wording must not be asked with this one."""
    prompts = [seed_prompt("{d}", "{q}"), documents_prompt(["{d}", "{e}"], "{q}")]
    answers = [cited_answer("{a}", 1), cited_answer("{a}", 1, "{s}"), REFUSAL]
    return hashlib.sha256("\0".join(prompts + answers).encode()).hexdigest()
