"""How good answers are: exact match, F1, ROUGE-L, BLEU-4, citations, refusals, each with a confidence interval."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import jieba
import numpy as np
from numpy.typing import NDArray

from chatglm3.documents import parse_answer

jieba.setLogLevel(logging.WARNING)  # it reports the loading of its dictionary on stderr

# Punctuation as CMRC 2018's official script lists it. (Its "……" is two characters and never equals one.)
PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
MetricName = Literal[
    "exact_match",
    "f1",
    "rouge_l",
    "bleu_4",
    "citation_accuracy",
    "citation_precision",
    "citation_recall",
    "refusal_precision",
    "refusal_recall",
]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
NGRAM = 4
RESAMPLES = 1000

Points = dict[str, tuple[float, ...]]
"""Metric -> what one row adds to the sums that the metric is computed from: its points and the points possible, for
BLEU what `ngram_counts` gives. The last number is 0 where the row says nothing about the metric."""
Array = NDArray[np.float64]
Groups = Sequence[Hashable] | None
"""The document group of each row, whose rows are right or wrong together; None: each row is a group of its own."""


@dataclass(frozen=True)
class Score:
    """A metric over many rows, 0 to 1, with its 95 % bootstrap interval; `n` rows of `groups` had a say in it."""

    value: float
    low: float
    high: float
    n: int
    groups: int | None = None
    """None in scores.json of former versions, whose intervals took each row for a group of its own."""

    def __str__(self) -> str:
        """In percent, with the interval."""
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def score(prediction: str, gold: str, golden: int | None = None, answerable: bool = True) -> Points:
    """Score one reply. `gold` is the answer without citation, `golden` the document that holds it (1-based).

    As in SQuAD 2.0, a refusal and an answer have nothing in common, however their characters overlap. Accurate is a
    citation of the golden document and no other; precise are citations as far as they are golden ones, and those of
    an answer that no document holds are not. BLEU looks at rows with an answer only: refusals all have the same words.
    """
    answer = parse_answer(prediction)
    gold = parse_answer(gold).text if answerable else gold
    right_refusal = float(answer.refused and not answerable)
    if answer.refused or not answerable:
        exact, run, subsequence = [right_refusal] * 3
    else:
        exact, run, subsequence = (measure(answer.text, gold) for measure in (exact_match, f1, rouge_l))
    has_golden = float(answerable and golden is not None)
    cited = float(golden in answer.citations)
    return {
        "exact_match": (exact, 1.0),
        "f1": (run, 1.0),
        "rouge_l": (subsequence, 1.0),
        "bleu_4": (*ngram_counts("" if answer.refused else answer.text, gold), float(answerable)),
        "citation_accuracy": (float(answer.citations == (golden,)), has_golden),
        "citation_precision": (cited, float(len(answer.citations)) if has_golden or not answerable else 0.0),
        "citation_recall": (cited, has_golden),
        "refusal_precision": (right_refusal, float(answer.refused)),
        "refusal_recall": (right_refusal, float(not answerable)),
    }


def value_of(metric: str, sums: Array) -> Array:
    """The metric of summed points [..., numbers] -> [...]; nan where nothing was possible."""
    if metric == "bleu_4":
        return np.where(sums[..., -1] > 0, bleu(sums), np.nan)
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def summarize(rows: Sequence[Points], groups: Groups = None) -> dict[str, Score]:
    """Each metric over all rows. Metrics with no possible points (no unanswerable rows, say) are left out.

    The interval is that of the cluster bootstrap (Field and Welsh 2007; of questions about one text, arXiv:2411.00640):
    groups are drawn, not rows, for several questions about one document are not as many witnesses.
    """
    tables = points_of(rows)
    drawn = resampled_sums([by_group(table, groups) for table in tables.values()])
    scores = {}
    for (name, table), sums in zip(tables.items(), drawn, strict=True):
        low, high = np.nanquantile(value_of(name, sums), (0.025, 0.975))
        value = value_of(name, table.sum(0))
        scores[name] = Score(float(value), float(low), float(high), *say(table, groups))
    return scores


def say(table: Array, groups: Groups) -> tuple[int, int]:
    """How many rows, and of how many groups, say something about a metric."""
    return int(np.count_nonzero(table[:, -1])), int(np.count_nonzero(by_group(table, groups)[:, -1]))


def points_of(rows: Sequence[Points]) -> dict[str, Array]:
    """Metric -> points of all rows [rows, numbers]. Metrics that no row says anything about are left out."""
    found = {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return {name: table for name, table in found.items() if table[:, -1].any()}


def by_group(table: Array, groups: Groups) -> Array:
    """The rows' points added up over each group, [groups, numbers]."""
    if groups is None:
        return table
    _, number = np.unique(np.array(groups), return_inverse=True)
    sums = np.zeros((number.max() + 1, table.shape[1]))
    np.add.at(sums, number, table)
    return sums


def resampled_sums(tables: Sequence[Array]) -> list[Array]:
    """Column sums of each table in bootstrap samples of its rows, the same rows of all: [RESAMPLES, numbers] each."""
    if not tables:
        return []
    side_by_side = np.hstack(tables)
    num_rows, random = len(side_by_side), np.random.default_rng(0)
    draws = (np.bincount(random.integers(0, num_rows, num_rows), minlength=num_rows) for _ in range(RESAMPLES))
    sums = np.array([draw @ side_by_side for draw in draws])
    return np.split(sums, np.cumsum([table.shape[1] for table in tables])[:-1], axis=1)


def exact_match(prediction: str, gold: str) -> float:
    """1.0 if both are equal in lower case without PUNCTUATION: CMRC 2018's `calc_em_score`."""
    return float(_bare(prediction) == _bare(gold))


def f1(prediction: str, gold: str) -> float:
    """CMRC 2018's `calc_f1_score`: F1 of the longest common run of segments (a substring, not a subsequence).

    A segment is a Chinese character, or a word or mark of other writing. For the latter the official script calls
    nltk.word_tokenize; here a regular expression keeps words and numbers such as `3.5` and `1,000` whole, which gave
    the same F1 for 99 % of 3,245 answers of CMRC, DRCD, XQuAD and DuReader, and a mean 0.0004 away.
    """
    return _f1(segments(prediction), segments(gold), _longest_common_run)


def rouge_l(prediction: str, gold: str) -> float:
    """ROUGE-L (F1 of the longest common subsequence) over jieba's words, white space left out."""
    return _f1(_words(prediction), _words(gold), _longest_common_subsequence)


def ngram_counts(prediction: str, gold: str) -> tuple[float, ...]:
    """What a row adds to corpus BLEU, over jieba's words: for n = 1 to 4 the prediction's n-grams that the gold answer
    has too (each at most as often as there), then all of its n-grams, and both lengths in words."""
    words, gold_words = _words(prediction), _words(gold)
    grams = [(_ngrams(words, n), _ngrams(gold_words, n)) for n in range(1, NGRAM + 1)]
    common = [float((ours & theirs).total()) for ours, theirs in grams]
    return (*common, *(float(ours.total()) for ours, _ in grams), float(len(words)), float(len(gold_words)))


def bleu(sums: Array) -> Array:
    """BLEU-4 of summed `ngram_counts` [..., 10 or more] -> [...], Papineni et al. 2002: of the corpus, not smoothed.

    It is what `sacrebleu.corpus_bleu(..., smooth_method="none", use_effective_order=True)` computes: where all answers
    are shorter than four words, the longest n-grams that there are count.
    """
    common, total = sums[..., :NGRAM], sums[..., NGRAM : 2 * NGRAM]
    words, gold_words = sums[..., 2 * NGRAM], sums[..., 2 * NGRAM + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.where(total > 0, np.log(common / total), 0.0)
        mean = logarithms.sum(-1) / np.maximum((total > 0).sum(-1), 1)
        brevity = np.minimum(0.0, 1 - gold_words / words)
        return np.where(words > 0, np.exp(mean + brevity), 0.0)


def segments(text: str) -> list[str]:
    """CMRC 2018's `mixed_segmentation(rm_punc=True)`: Chinese characters singly, other writing by words."""
    return re.findall(r"[一-龥]|[^\W一-龥]+(?:(?:[.']|(?<=\d),(?=\d))[^\W一-龥]+)*|[^\w\s]", _bare(text))


def _bare(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in PUNCTUATION)


def _words(text: str) -> list[str]:
    return [word for word in jieba.cut(text) if not word.isspace()]


def _ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def _f1(prediction: list[str], gold: list[str], common: Callable[[list[str], list[str]], int]) -> float:
    """Harmonic mean of precision and recall, which is 2 * common / (both lengths); 0 where nothing is common."""
    return 2 * common(prediction, gold) / max(len(prediction) + len(gold), 1)


def _longest_common_run(a: list[str], b: list[str]) -> int:
    longest, row = 0, [0] * (len(b) + 1)
    for item in a:
        row = [0] + [row[j] + 1 if item == other else 0 for j, other in enumerate(b)]
        longest = max(longest, *row)
    return longest


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for item in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if item == other else max(above[j + 1], row[j]))
    return row[-1]
