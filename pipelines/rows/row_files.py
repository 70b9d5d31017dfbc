"""Second pass over the shards: each output file is made by one task from the lines that belong to it."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import orjson

from chatglm3.bm25 import plain_text
from pipelines.rows.cleaning import clean_conversation, clean_sample, digest
from pipelines.rows.corpus import open_corpus, read_documents
from pipelines.rows.data_statistics import Statistics
from pipelines.rows.lengths import ruler_of
from pipelines.rows.lines import read_line
from pipelines.rows.recipe import (
    Built,
    Kitchen,
    Recipe,
    Row,
    conversation_row,
    hardest_first,
    multidoc_rows,
    seed_row,
    triple,
)
from pipelines.rows.shards import Conversation, Sample, parse_row

ROWS_PER_FILE = 500


@dataclass(frozen=True)
class Part:
    """One output file: the lines that become its rows, in order of their keys."""

    side: str
    number: int
    sources: np.ndarray
    """[rows] of `lines.SOURCE`."""

    @property
    def name(self) -> str:
        """The file's name below the data folder."""
        return f"{self.side}/part-{self.number:05d}.jsonl"


@dataclass(frozen=True)
class Order:
    """How all parts are written."""

    folder: str
    shards: list[str]
    preset: str
    tokenizer: str
    mask_personal_data: bool
    recipe: Recipe
    dev_documents: np.ndarray
    """Digests of the documents that training must not see."""
    negatives: int
    """How many a triple has at most; 0 for no triples."""
    corpus: str = ""
    """Folder with an index of each side's golden documents to draw hard distractors from; empty for none."""

    @property
    def composes(self) -> bool:
        """Whether texts are brought to NFC and stripped: not where the row is to be the predecessor's."""
        return self.preset != "seed"


def split_into_parts(side: str, sources: np.ndarray) -> list[Part]:
    """Parts of ROWS_PER_FILE samples, which come in the order of their keys."""
    starts = range(0, len(sources), ROWS_PER_FILE)
    return [Part(side, number, sources[start : start + ROWS_PER_FILE]) for number, start in enumerate(starts)]


def write_part(part: Part, order: Order) -> Statistics:
    """Write the file of a part, and its triples if they are wanted; returns what the report needs."""
    barred = frozenset(order.dev_documents.tolist()) if part.side == "train" else frozenset()
    kitchen = Kitchen(order.recipe, ruler_of(order.tokenizer), barred)
    built: list[list[Built]] = [[] for _ in part.sources]
    triples: list[Row | None] = [None for _ in part.sources]
    for index in np.lexsort((part.sources["offset"], part.sources["shard"])):  # in the order of the disk
        shard, offset, key, _, has_triple = part.sources[index].item()
        item = parse_row(read_line(order.shards[shard], offset))
        if isinstance(item, Conversation):
            item = clean_conversation(item, order.composes, order.mask_personal_data, kitchen.counts)
            built[index] = [conversation_row(item, key.decode(), kitchen)]
            continue
        item = clean_sample(item, order.composes, order.mask_personal_data, kitchen.counts)
        kitchen.counts += Counter({"questions after the first of a row, not used": item.unused_pairs})
        if order.corpus:
            item = _with_neighbours(item, part.side, order)
        is_seed, wants_triple = order.preset == "seed", order.negatives and has_triple
        ranked = hardest_first(item, kitchen) if wants_triple or not is_seed else []
        name = key.decode()
        built[index] = [seed_row(item, name, kitchen)] if is_seed else multidoc_rows(item, ranked, name, kitchen)
        if wants_triple:
            triples[index] = triple(item, ranked[: order.negatives])
    for group, made in zip(part.sources["group"].tolist(), built, strict=True):
        for each in made:  # twins too: whoever scores them must know that they are about one document
            each.row["group"] = f"{group:016x}"
    rows = [each for made in built for each in made]
    _write(Path(order.folder, part.name), [each.row for each in rows])
    if order.negatives:
        _write(Path(order.folder, "triples", part.name), [row for row in triples if row])
    return Statistics.of(part.side, rows, kitchen)


def _with_neighbours(sample: Sample, side: str, order: Order) -> Sample:
    """The sample with the documents of other rows that look most like an answer among its negatives."""
    corpus = open_corpus(f"{order.corpus}/{side}")
    nearest = corpus.nearest(sample.question, digest(plain_text(sample.positive)))
    texts = read_documents(nearest, order.shards, order.mask_personal_data)
    return replace(sample, negatives=(*sample.negatives, *texts))


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(one_line(row))


def one_line(row: Row) -> str:
    """A row as a line of JSON. Unicode's other line ends are escaped: many readers split there, Ray Data's too."""
    text = orjson.dumps(row).decode()
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085") + "\n"
