"""What the prepare stage counts while it writes: numbers and a few rows, never all rows; parts add up to the whole."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.rows.recipe import Built, Kitchen

SAMPLES_PER_KIND = 5
SAMPLES_SHOWN = 20
_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass
class Statistics:
    """Of one part of the rows, or of all of them."""

    rows: Counter[str] = field(default_factory=Counter)
    """By side of the split."""
    kinds: Counter[str] = field(default_factory=Counter)
    documents: Counter[int] = field(default_factory=Counter)
    """Rows by how many documents their prompts have."""
    places: Counter[int] = field(default_factory=Counter)
    """Rows by the golden document's number."""
    twins: int = 0
    """Second rows of contrastive pairs."""
    quotes: Counter[bool] = field(default_factory=Counter)
    """Answers from documents by whether they quote."""
    changes: Counter[str] = field(default_factory=Counter)
    """What was dropped, cut and rewritten."""
    prompt_tokens: list[np.ndarray] = field(default_factory=list)
    answer_tokens: list[np.ndarray] = field(default_factory=list)
    shown: list[np.ndarray] = field(default_factory=list)
    """Digests of the documents in training prompts."""
    samples: list[Built] = field(default_factory=list)

    @classmethod
    def of(cls, side: str, built: list[Built], kitchen: Kitchen) -> "Statistics":
        """The statistics of some rows of one side, which were made in `kitchen`."""
        found = cls(changes=kitchen.counts)
        for each in built:
            found.rows[side] += 1
            found.kinds[each.kind] += 1
            found.twins += each.kind == "twin" and each.row["golden"] is None
            if "documents" in each.row:
                found.documents[each.row["documents"]] += 1
            if each.row.get("golden"):
                found.places[each.row["golden"]] += 1
            if each.quoted is not None:
                found.quotes[each.quoted] += 1
            if sum(other.kind == each.kind for other in found.samples) < SAMPLES_PER_KIND:
                found.samples.append(each)
        found.prompt_tokens = [np.array([each.prompt_tokens for each in built], np.int32)]
        found.answer_tokens = [np.array([each.answer_tokens for each in built], np.int32)]
        found.shown = [np.unique(np.array(kitchen.shown, np.uint64))] if side == "train" else []
        return found

    def add(self, other: "Statistics") -> None:
        """Count another part's rows too."""
        for name in ("rows", "kinds", "documents", "places", "quotes", "changes"):
            getattr(self, name).update(getattr(other, name))
        self.twins += other.twins
        self.prompt_tokens += other.prompt_tokens
        self.answer_tokens += other.answer_tokens
        self.shown += other.shown
        kinds = Counter(each.kind for each in self.samples)
        for each in other.samples:
            if kinds[each.kind] < SAMPLES_PER_KIND:
                kinds[each.kind] += 1
                self.samples.append(each)

    def summary(self) -> dict[str, Any]:
        """The numbers of the report."""
        prompt, answer = self.lengths()
        documents = sum(self.quotes.values())
        return {
            "rows": dict(self.rows),
            "kinds": dict(sorted(self.kinds.items())),
            "twins": self.twins,
            "tokens": int(prompt.sum() + answer.sum()),
            "label_share": round(float(answer.sum() / max(prompt.sum() + answer.sum(), 1)), 4),
            "tokens_of_a_prompt": quantiles(prompt),
            "tokens_of_an_answer": quantiles(answer),
            "tokens_of_an_example": quantiles(prompt + answer),
            "documents_in_a_prompt": {str(k): self.documents[k] for k in sorted(self.documents)},
            "place_of_the_golden_document": {str(k): self.places[k] for k in sorted(self.places)},
            "answers_that_quote": round(self.quotes[True] / documents, 4) if documents else None,
            "changes": dict(sorted(self.changes.items())),
        }

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and answer tokens of every row."""
        empty = np.empty(0, np.int32)
        return np.concatenate([empty, *self.prompt_tokens]), np.concatenate([empty, *self.answer_tokens])

    def documents_seen(self, dev_documents: np.ndarray) -> int:
        """How many of the dev side's golden documents a training prompt shows."""
        return len(np.intersect1d(dev_documents, np.concatenate([dev_documents[:0], *self.shown])))


def quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Minimum, median, 90 and 99 % and maximum; the nearest length that occurs."""
    if not len(lengths):
        return {}
    return {name: int(np.quantile(lengths, q, method="nearest")) for name, q in _QUANTILES.items()}
