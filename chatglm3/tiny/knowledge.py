"""Made-up Chinese knowledge bases: documents, questions with exact answers, and shards of them on disk.

A knowledge base is written folder by folder. A folder holds a few families of documents: relatives have similar names
and tell the same kinds of things, so each is a hard negative for questions about another. Questions never need a
document of another folder. The same seed always gives the same text.

`python -m chatglm3.tiny.knowledge --out DIR --samples N` writes shards in the Multi-Doc-QA-Chinese schema.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

from chatglm3.tiny.worlds import (
    INVENTED_FAMILIES,
    INVENTED_MEMBERS,
    INVENTED_NAMES,
    INVENTED_VALUES,
    PRETRAINING,
    WORLDS,
    Attribute,
    Kind,
    World,
)

FAMILIES, MEMBERS = 3, 4
NEGATIVES = 4
SHARD_ROWS = 500

_HOLE = re.compile(r"\{(\w+)\}|[#^@~]")
_RUN = re.compile(r"(.)\*+")
_CHARACTERS = {"#": digits, "^": digits[1:], "@": ascii_uppercase, "~": ascii_lowercase}


@dataclass(frozen=True)
class Document:
    """One document: its subject, what it says of it, and the text that says so."""

    subject: str
    facts: dict[Attribute, str]
    text: str


@dataclass(frozen=True)
class Question:
    """A question about one document of a folder, and the words of that document that answer it."""

    text: str
    answer: str
    attribute: Attribute
    document: Document


Row = dict[str, Any]
"""One line of a shard: QA, positive_doc, negative_doc."""


def fill(pattern: str, rng: Random, world: World, **fixed: str) -> str:
    """Draw a text from a pattern (see `worlds`); `fixed` gives the words of holes such as `{e}`."""

    def draw(hole: re.Match[str]) -> str:
        if name := hole.group(1):
            return fixed.get(name) or rng.choice(world.words[name])
        return rng.choice(_CHARACTERS[hole.group()])

    text = _HOLE.sub(draw, rng.choice(pattern.split("|")))
    return _RUN.sub(lambda run: run[1] * len(run[0]), text)


def draw_folder(world: World, rng: Random, families: int = FAMILIES, members: int = MEMBERS) -> list[list[Document]]:
    """Write one folder: families of related documents, no two with the same subject."""
    folder: list[list[Document]] = []
    subjects: set[str] = set()
    for _ in range(families):
        kind = _invent_kind(rng) if rng.random() < world.invented else rng.choice(world.kinds)
        shared = fill(kind.family, rng, world)
        family: list[Document] = []
        while len(family) < members:
            subject = fill(kind.member, rng, world, family=shared)
            if subject not in subjects:
                subjects.add(subject)
                family.append(_write_document(world, kind, subject, rng))
        folder.append(family)
    return folder


def ask(world: World, document: Document, rng: Random, attribute: Attribute | None = None) -> Question:
    """Ask a document for one of its facts, in its own word or in people's."""
    attribute = attribute or rng.choice(list(document.facts))
    literal = not attribute.asked or rng.random() < world.literal_share
    wording = rng.choice(world.literal if literal else attribute.asked)
    question = fill(wording, rng, world, e=document.subject, a=attribute.name)
    text = fill(rng.choice(world.wraps), rng, world, q=question)
    return Question(text, document.facts.get(attribute, ""), attribute, document)


def _invent_kind(rng: Random) -> Kind:
    """Make up a kind whose names, attributes and values are mostly random characters."""
    names = {fill(INVENTED_NAMES, rng, PRETRAINING) for _ in range(rng.randint(3, 10))}
    attributes = [Attribute(name, rng.choice(rng.choice(INVENTED_VALUES).split("|"))) for name in sorted(names)]
    family, member = (rng.choice(pattern.split("|")) for pattern in (INVENTED_FAMILIES, INVENTED_MEMBERS))
    return Kind(family, member, tuple(attributes))


def _write_document(world: World, kind: Kind, subject: str, rng: Random) -> Document:
    """Write what a document says of its subject: an opening and short sentences, full ones, or a mixture."""
    least, most = world.facts
    count = min(rng.randint(least, most), len(kind.attributes))
    facts = {attribute: fill(attribute.value, rng, world) for attribute in rng.sample(kind.attributes, count)}
    style = rng.choice(("opening", "full", "full first"))
    opening = fill(rng.choice(world.openings), rng, world, e=subject) if style == "opening" else ""
    sentences: list[str] = []
    for attribute, value in facts.items():
        full = style == "full" or (style == "full first" and not sentences)
        pattern = rng.choice(world.full if full else world.short)
        sentences.append(fill(pattern, rng, world, e=subject, a=attribute.name, v=value))
    while rng.random() < world.filler_share:
        # Not first after a full sentence is due: a document names its subject before it says "its".
        sentences.insert(rng.randint(1, len(sentences)), fill(rng.choice(world.fillers), rng, world))
    join = rng.choice("。。，；")
    return Document(subject, facts, opening + join.join(sentences) + "。")


def rows(world: World, samples: int, seed: int, negatives: int = NEGATIVES) -> Iterator[Row]:
    """Yield rows in the Multi-Doc-QA-Chinese schema: one question, its document, and negatives of the same folder,
    half of them relatives of the document as far as it has so many."""
    rng = Random(f"rows {seed}")
    written = 0
    while written < samples:
        folder = draw_folder(world, rng)
        for family in folder:
            strangers = [document for other in folder if other is not family for document in other]
            for document in family[: samples - written]:
                question = ask(world, document, rng)
                relatives = [relative for relative in family if relative is not document]
                hard = rng.sample(relatives, min(negatives // 2, len(relatives)))
                yield _row(question, hard, rng.sample(strangers, negatives - len(hard)), rng)
                written += 1


def _row(question: Question, hard: list[Document], easy: list[Document], rng: Random) -> Row:
    negatives: list[dict[str, Any]] = [{"text": document.text, "hard": True} for document in hard]
    negatives += [{"text": document.text} for document in easy]
    rng.shuffle(negatives)
    return {
        "QA": [{"question": question.text, "answer": question.answer}],
        "positive_doc": [{"text": question.document.text}],
        "negative_doc": negatives,
    }


def write_shards(folder: str | Path, world: str, samples: int, seed: int, negatives: int = NEGATIVES) -> list[Path]:
    """Write `samples` rows of a world ("pretraining" or "demo") to `folder` as `WORLD-001.json`, ...; the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(WORLDS[world], samples, seed, negatives)]
    paths: list[Path] = []
    for start in range(0, len(lines), SHARD_ROWS):
        paths.append(folder / f"{world}-{len(paths) + 1:03}.json")
        paths[-1].write_text("".join(lines[start : start + SHARD_ROWS]), encoding="utf-8", newline="\n")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="Write made-up Multi-Doc-QA-Chinese shards.")
    parser.add_argument("--out", required=True, help="folder to write the shards to")
    parser.add_argument("--samples", type=int, default=2000, help="number of rows (default: 2000)")
    parser.add_argument("--world", choices=sorted(WORLDS), default="demo", help="whose documents (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    arguments = parser.parse_args()
    for path in write_shards(arguments.out, arguments.world, arguments.samples, arguments.seed):
        print(path)


if __name__ == "__main__":
    main()
