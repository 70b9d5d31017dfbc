"""Hard distractors from everywhere: a BM25 index of the golden documents of all rows of one side of the split."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from chatglm3.bm25 import K1, B, character_pairs, plain_text, rarity
from pipelines.rows.cleaning import clean_sample
from pipelines.rows.lines import read_line
from pipelines.rows.shards import Sample, parse_row

NEIGHBOURS = 10
"""Documents that a sample gets beside its own negatives, if so many have anything in common with its question."""


@dataclass(frozen=True)
class Corpus:
    """The index on disk, a file an array, which every process maps into its memory.

    `terms` [terms] are pairs of characters, in order; those documents that have the i-th stand from `starts[i]` to
    `starts[i + 1]` in `documents`, with what the term adds to their score in `weights`. `digests` [documents] are in
    order; `groups` and `sources` [documents] say which are nearly equal and where each stands.
    """

    terms: np.ndarray
    starts: np.ndarray
    documents: np.ndarray
    weights: np.ndarray
    digests: np.ndarray
    groups: np.ndarray
    sources: np.ndarray

    def nearest(self, question: str, document: int) -> np.ndarray:
        """Sources of the documents that BM25 puts first for a question, but for the group of its own `document`."""
        scores = np.zeros(len(self.digests), np.float32)
        for term in np.unique(character_pairs(plain_text(question))):
            place = int(np.searchsorted(self.terms, term))
            if place < len(self.terms) and self.terms[place] == term:
                span = slice(self.starts[place], self.starts[place + 1])
                scores[self.documents[span]] += self.weights[span]
        own = int(np.searchsorted(self.digests, np.uint64(document)))
        if own < len(self.digests) and self.digests[own] == document:
            scores[self.groups == self.groups[own]] = 0
        least = np.partition(scores, -NEIGHBOURS)[-NEIGHBOURS] if len(scores) > NEIGHBOURS else 0
        likely = np.flatnonzero((scores > 0) & (scores >= least))
        best = likely[np.argsort(-scores[likely], kind="stable")][:NEIGHBOURS]  # equal ones by their digests
        return np.asarray(self.sources[best])


def write_corpus(
    folder: Path, texts: Iterable[str], digests: np.ndarray, groups: np.ndarray, where: np.ndarray
) -> None:
    """Write the index of `texts`, whose digests are in order. Takes some 20 bytes of memory a character."""
    # Gigabytes of text have an index as large: what is not needed any more goes at once.
    pairs, times = [], []
    for text in texts:
        found, counts = np.unique(character_pairs(plain_text(text)), return_counts=True)
        pairs.append(found)
        times.append(counts.astype(np.float32))
    sizes = [len(found) for found in pairs]
    lengths = np.array([counts.sum() + 1 for counts in times])
    norms = (K1 * (1 - B + B * lengths / lengths.mean())).astype(np.float32)
    codes = np.concatenate(pairs)
    del pairs
    weights = np.concatenate(times)
    del times
    documents = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
    weights *= (K1 + 1) / (weights + norms[documents])
    order = np.argsort(codes, kind="stable")
    codes = codes[order]
    starts = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]])
    terms, starts = codes[starts], np.append(starts, len(codes))
    del codes
    documents, weights = documents[order], weights[order]
    del order
    present = np.diff(starts)
    weights *= np.repeat(rarity(present, len(sizes)).astype(np.float32), present)
    folder.mkdir()
    index = Corpus(terms, starts, documents, weights, digests, groups, where)
    for name, array in vars(index).items():
        np.save(folder / f"{name}.npy", array)


@lru_cache(maxsize=2)
def open_corpus(folder: str) -> Corpus:
    """The index that `write_corpus` wrote, mapped."""
    names = Corpus.__dataclass_fields__
    return Corpus(**{name: np.load(Path(folder, f"{name}.npy"), mmap_mode="r") for name in names})


def read_documents(sources: np.ndarray, shards: list[str], mask: bool) -> list[str]:
    """The golden documents of some lines, cleaned as their samples are."""
    texts = []
    for shard, offset in zip(sources["shard"].tolist(), sources["offset"].tolist(), strict=True):
        sample = parse_row(read_line(shards[shard], offset), with_negatives=False)
        assert isinstance(sample, Sample)
        texts.append(clean_sample(sample, True, mask, Counter()).positive)
    return texts
