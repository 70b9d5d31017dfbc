"""Which samples are copies, which documents are nearly the same, and on which side of the split each sample stands."""

import math
from collections import Counter, defaultdict

import numpy as np

from pipelines.rows.cleaning import digest, text_pairs

BANDS = 16
"""Of the signature's 64 values: documents that agree in all four of a band may be compared. That holds for 99.98 % of
the pairs with a Jaccard similarity of 0.8, and still for 89 % with 0.6."""
SIMILAR_QUESTIONS = 0.8
"""Jaccard similarity of character pairs from which questions with the same answer in the same document are one."""


def exact_copies(records: np.ndarray, replay: np.ndarray) -> np.ndarray:
    """Mask of the records that repeat another's `key`. The one that stays is no `replay`, if there is such a one; for
    the rest it is chosen by its bytes, not its place.
    """
    order = np.lexsort((records["content"], replay, records["key"]))
    keys = records["key"][order]
    copies = np.zeros(len(records), bool)
    copies[order[1:]] = keys[1:] == keys[:-1]
    return copies


def group_documents(records: np.ndarray, similarity: float) -> np.ndarray:
    """For each record the digest that stands for its group of equal and nearly equal documents.

    It is the least digest of the group's documents, so it does not depend on the records' order.
    """
    documents, first, inverse = np.unique(records["document"], return_index=True, return_inverse=True)
    parents = np.arange(len(documents))
    if similarity < 1 and len(documents) > 1:
        for a, b in _similar_pairs(records["signature"][first], similarity):
            _unite(parents, a, b)
    roots = np.array([_root(parents, index) for index in range(len(documents))], int)
    return np.asarray(documents[roots][inverse])


def near_copies(records: np.ndarray, groups: np.ndarray, questions: list[str]) -> np.ndarray:
    """Mask of the records that ask a similar question, with the same answer, of the same group of documents.

    Conversations, which have no answer, are none.
    """
    copies = np.zeros(len(records), bool)
    same = np.stack([groups, records["answer"]], axis=1)
    _, inverse, sizes = np.unique(same, axis=0, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero((sizes[inverse] > 1) & (records["answer"] != 0))
    frequency = Counter(pair for index in candidates.tolist() for pair in text_pairs(questions[index]))
    kept: defaultdict[tuple[int, str], list[frozenset[str]]] = defaultdict(list)
    for index in candidates[np.argsort(records["key"][candidates], kind="stable")].tolist():
        pairs = text_pairs(questions[index])
        places = [kept[int(inverse[index]), pair] for pair in _telling(pairs, frequency)]
        if any(_jaccard(pairs, other) >= SIMILAR_QUESTIONS for place in places for other in place):
            copies[index] = True
        else:
            for place in places:
                place.append(pairs)
    return copies


def _telling(pairs: frozenset[str], frequency: Counter[str]) -> list[str]:
    """The rarest pairs of a question, of which every similar question has one among its own rarest.

    The prefix filter of Chaudhuri, Ganti and Kaushik (2006): who shares none of them shares too few of the others.
    """
    rarest = sorted(pairs, key=lambda pair: (frequency[pair], pair))
    return rarest[: len(pairs) - math.ceil(SIMILAR_QUESTIONS * len(pairs)) + 1]


def on_dev_side(groups: np.ndarray, counted: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Mask of the records whose group belongs to the dev side, which its digest and `seed` decide.

    A group with more than twice `share` of the records that are `counted` does not: a form filled in a thousand times
    would take most of the data from training.
    """
    each, inverse = np.unique(groups, return_inverse=True)
    rows = np.bincount(inverse, counted, minlength=len(each))
    drawn = np.array([digest(f"{seed}:{group}") < share * 2**64 for group in each.tolist()], bool)
    return np.asarray((drawn & (rows <= 2 * share * counted.sum()))[inverse])


def _similar_pairs(signatures: np.ndarray, similarity: float) -> list[tuple[int, int]]:
    """Pairs whose signatures agree in at least `similarity` of their values, among those that share a band.

    In a band's bucket each is compared with the first and with the one before it, not with all: a thousand copies of a
    form would be half a million pairs.
    """
    pairs: set[tuple[int, int]] = set()
    for band in np.split(signatures, BANDS, axis=1):
        order = np.lexsort(band.T)
        ordered = band[order]
        starts = np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)]
        heads = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
        previous = np.r_[order[:1], order[:-1]]
        inside = ~starts
        for others in (heads[inside], previous[inside]):
            here = order[inside]
            alike = (signatures[here] == signatures[others]).mean(axis=1) >= similarity
            pairs.update(zip(here[alike].tolist(), others[alike].tolist(), strict=True))
    return sorted(pairs)


def _root(parents: np.ndarray, index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = parents[index]
    return int(index)


def _unite(parents: np.ndarray, a: int, b: int) -> None:
    a, b = _root(parents, a), _root(parents, b)
    parents[max(a, b)] = min(a, b)


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(len(a | b), 1)
