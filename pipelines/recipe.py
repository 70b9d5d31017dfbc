"""A sample becomes a training row: which documents, in which order, and what the model is to answer."""

import hashlib
import random
from dataclasses import dataclass, replace
from typing import Any, Protocol

from chatglm3.documents import REFUSAL, cited_answer, documents_prompt, seed_prompt
from pipelines.shards import Sample, normal

Row = dict[str, Any]
SHORTEST_DOCUMENT = 32  # tokens; a document that would be cut below this is left out instead
OVERHEAD = 16  # tokens of control ids and role lines around a prompt and its answer in the chat format


class Tokenizer(Protocol):
    """What the recipe needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Text to ids."""

    def decode(self, ids: list[int]) -> str:
        """Ids to text."""


@dataclass(frozen=True)
class Recipe:
    """The multi-document recipe's numbers; see `prepare -h`."""

    distractors: int
    refusal_share: float
    max_tokens: int
    seed: int


def seed_row(sample: Sample) -> Row:
    """The predecessor's row: the positive document alone, character for character."""
    return {"instruction": seed_prompt(sample.positive, sample.question), "output": sample.answer}


def multidoc_row(sample: Sample, recipe: Recipe, tokenizer: Tokenizer) -> Row:
    """The golden document among distractors at a random place, or distractors alone and a refusal.

    The choice depends on the sample's own text and `recipe.seed` only, so it is the same in every run and order.
    """
    chance = random.Random(f"{recipe.seed}:{sample.question}:{sample.positive}")
    usable = usable_distractors(sample)
    # As many documents with a refusal as with an answer: their number must not give the refusal away.
    most = len(usable) if recipe.refusal_share else len(usable) + 1
    total = max(1, min(recipe.distractors + 1, most))
    refuse = bool(usable) and chance.random() < recipe.refusal_share
    documents = choose_distractors(usable, sample.hard, total if refuse else total - 1, chance)
    golden = None if refuse else chance.randint(0, len(documents))
    if golden is not None:
        documents.insert(golden, sample.positive)
    output = REFUSAL if golden is None else cited_answer(sample.answer, golden + 1)
    budget = recipe.max_tokens - OVERHEAD - len(tokenizer.encode(documents_prompt([], sample.question) + output))
    documents, golden = fit_documents(documents, golden, sample.answer, budget, tokenizer)
    if golden is not None:
        output = cited_answer(sample.answer, golden + 1)
    return {
        "instruction": documents_prompt(documents, sample.question),
        "output": output,
        "answer": REFUSAL if golden is None else sample.answer,
        "golden": None if golden is None else golden + 1,
        "documents": len(documents),
        "source": sample.source,
    }


def usable_distractors(sample: Sample) -> list[str]:
    """The negatives without the answer; the others would be golden too. Single characters are in every text."""
    answer = normal(sample.answer)
    return [text for text in sample.negatives if len(answer) < 2 or answer not in normal(text)]


def choose_distractors(usable: list[str], marked: frozenset[str], count: int, chance: random.Random) -> list[str]:
    """Up to `count` of `usable` in random order, half of them `marked` as hard where there are enough."""
    hard = [text for text in usable if text in marked]
    easy = [text for text in usable if text not in marked]
    chance.shuffle(hard)
    chance.shuffle(easy)
    wanted = max(count // 2, count - len(easy))
    chosen = hard[:wanted] + easy[: count - min(wanted, len(hard))]
    chance.shuffle(chosen)
    return chosen


def fit_documents(
    documents: list[str], golden: int | None, answer: str, budget: int, tokenizer: Tokenizer
) -> tuple[list[str], int | None]:
    """Cut documents to `budget` tokens: the longest distractor first, the golden one last and around the answer.

    Returns the documents and the golden one's new index. The question and the answer are never cut.
    """
    lengths = [len(tokenizer.encode(text)) + 4 for text in documents]  # 4: the number in brackets and the line end
    while (excess := sum(lengths) - budget) > 0:
        distractors = [i for i in range(len(documents)) if i != golden and lengths[i]]
        longest = max(distractors, key=lengths.__getitem__, default=golden)
        if longest is None or (longest == golden and lengths[longest] <= SHORTEST_DOCUMENT):
            break
        keep = max(lengths[longest] - excess, SHORTEST_DOCUMENT if longest == golden else 0)
        if longest != golden and keep < SHORTEST_DOCUMENT:
            documents[longest], lengths[longest] = "", 0
            continue
        start = documents[longest].find(answer) if longest == golden else -1
        middle = start + len(answer) // 2 if start >= 0 else 0
        documents[longest] = _cut(documents[longest], middle, keep - 6, tokenizer)
        lengths[longest] = keep
    kept = [i for i in range(len(documents)) if documents[i]]
    return [documents[i] for i in kept], None if golden is None else kept.index(golden)


def _cut(text: str, around: int, tokens: int, tokenizer: Tokenizer) -> str:
    """At most `tokens` tokens of `text`, among them the character `around`, with as much before it as after."""
    low, high = 0, len(text)
    while low < high:  # how many characters fit, found by bisection: tokens do not end at characters
        middle = (low + high + 1) // 2
        if len(tokenizer.encode(_window(text, around, middle))) <= tokens:
            low = middle
        else:
            high = middle - 1
    return _window(text, around, low)


def _window(text: str, around: int, size: int) -> str:
    start = max(0, min(around - size // 2, len(text) - size))
    return text[start : start + size]


def on_dev_side(document: str, share: float, seed: int) -> bool:
    """Whether a document belongs to the dev side: a property of its text, so it is the same in every run and order."""
    digest = hashlib.sha256(f"{seed}:{normal(document)}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def without_dev_documents(sample: Sample, share: float, seed: int) -> Sample:
    """A training sample whose distractors are no documents of the dev side: training never sees those."""
    return replace(sample, negatives=tuple(text for text in sample.negatives if not on_dev_side(text, share, seed)))
