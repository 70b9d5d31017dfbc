"""BM25: which documents look as if they answered a question, to train on hard ones and to fit many into a prompt."""

from collections.abc import Sequence

import numpy as np

K1, B = 1.5, 0.75


def plain_text(text: str) -> str:
    """Text as it is compared: without white space, in lower case."""
    # Not NFKC: full-width commas are in every Chinese text, and rewriting them all took half of the time of prepare.
    return "".join(text.split()).lower()


def bm25(question: str, documents: Sequence[str]) -> np.ndarray:
    """Okapi BM25 (Robertson and Zaragoza, 2009) of each document for the question, [documents]; terms are pairs of
    characters, which need no word segmentation.

    Texts as `plain_text` gives them. An index of a hundred documents that are asked once would cost more than
    it saves: their characters are looked through in one sweep.
    """
    if not documents or len(question) < 2:
        return np.zeros(len(documents))
    term, document, count = _occurrences(np.unique(character_pairs(question)), documents)
    lengths = np.array([len(text) for text in documents])
    norms = K1 * (1 - B + B * lengths / max(lengths.mean(), 1))
    weights = rarity(np.bincount(term), len(documents))[term] * count * (K1 + 1) / (count + norms[document])
    scores = np.bincount(document, weights, minlength=len(documents))
    return np.asarray(scores.round(9))  # so that no machine's rounding changes an order


def likeliest_first(question: str, documents: Sequence[str]) -> list[int]:
    """Indices of documents, those first that BM25 puts first for the question; equal ones in order."""
    scores = bm25(plain_text(question), [plain_text(text) for text in documents])
    return sorted(range(len(documents)), key=lambda index: (-scores[index], index))


def rarity(present: np.ndarray, documents: int) -> np.ndarray:
    """Inverse document frequency of terms that are `present` in so many of `documents`."""
    return np.asarray(np.log(1 + (documents - present + 0.5) / (present + 0.5)))


def character_pairs(text: str) -> np.ndarray:
    """Each two neighbouring UTF-16 units of a text as one number, [units - 1] of uint32."""
    codes = _codes(text)
    return np.asarray(codes[:-1].astype(np.uint32) << 16 | codes[1:])


def _occurrences(terms: np.ndarray, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where terms stand: (term, document, how often) of each of the pairs that occur, by term and then by document.

    No table of all terms and documents: of a long question and the lines of a long document it would fill the memory.
    """
    codes = _codes("\n".join(documents))
    begins = np.zeros(1 << 16, bool)
    begins[terms >> 16] = True
    places = np.flatnonzero(begins[codes[:-1]])  # most characters begin no term
    found = codes[places].astype(np.uint32) << 16 | codes[places + 1]
    rows = np.minimum(np.searchsorted(terms, found), len(terms) - 1)
    hits = terms[rows] == found
    ends = np.flatnonzero(codes == ord("\n"))  # plain text has no line ends of its own
    columns = np.searchsorted(ends, places[hits])
    cells, count = np.unique(rows[hits] * len(documents) + columns, return_counts=True)
    return *np.divmod(cells, len(documents)), count


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-16-le", "surrogatepass"), np.uint16)
