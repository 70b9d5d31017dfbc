"""A sample becomes training rows: which documents, in which order, and what the model is to answer."""

import random
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from chatglm3.chat import render
from chatglm3.documents import REFUSAL, cited_answer, documents_prompt, seed_prompt
from pipelines.cleaning import Candidate, digest, plain_text, usable_distractors
from pipelines.lengths import NUMBERING, SHORTEST_DOCUMENT, Document, Ruler, fit
from pipelines.mining import bm25
from pipelines.quotes import find_quote
from pipelines.shards import Conversation, Sample

Row = dict[str, Any]
Kind = Literal["golden among distractors", "golden alone", "refusal", "twin", "seed", "conversation"]


@dataclass(frozen=True)
class Recipe:
    """The numbers of the multi-document recipe; `prepare -h` explains each."""

    distractors: dict[int, float]
    hard_share: float
    golden_only_share: float
    refusal_share: float
    twin_share: float
    quotes: bool
    quote_recall: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Built:
    """A row that was made, and what the report wants to know of it."""

    row: Row
    kind: Kind
    prompt_tokens: int
    answer_tokens: int
    quoted: bool | None = None
    """Whether its answer quotes; None where there is nothing to quote."""

    @property
    def tokens(self) -> int:
        """Of the whole example in the chat format."""
        return self.prompt_tokens + self.answer_tokens


@dataclass
class Kitchen:
    """What every row is made with. `counts` gathers what was dropped, cut and changed on the way."""

    recipe: Recipe
    ruler: Ruler
    barred: Container[int] = frozenset()
    """Digests of documents that must not be distractors."""
    counts: Counter[str] = field(default_factory=Counter)
    shown: list[int] = field(default_factory=list)
    """Digests of the documents that prompts were made of."""


def least_tokens(sample: Sample, ruler: Ruler) -> int:
    """What the sample's row takes at least, with its documents cut as far as they may be."""
    answer = max(sample.answer, REFUSAL, key=ruler.tokens)
    return ruler.example(documents_prompt([], sample.question), answer) + SHORTEST_DOCUMENT + 2 * NUMBERING


def seed_row(sample: Sample, kitchen: Kitchen) -> Built:
    """The predecessor's row: the positive document alone, character for character unless it is too long."""
    evidence = _evidence(sample.positive, "", sample.answer)
    budget = kitchen.recipe.max_tokens - kitchen.ruler.example(seed_prompt("", sample.question), sample.answer)
    document = sample.positive
    if kitchen.ruler.tokens(document) > budget:
        document = fit([Document(document, evidence)], budget, kitchen.ruler, kitchen.counts)[0].text
    prompt = seed_prompt(document, sample.question)
    return _built({"instruction": prompt, "output": sample.answer}, "seed", kitchen.ruler)


def conversation_row(conversation: Conversation, key: str, kitchen: Kitchen) -> Built:
    """A conversation as it is; one question and its answer become an instruction row, which fits both formats."""
    messages = conversation.messages
    is_plain = not conversation.tools and all(set(message) == {"role", "content"} for message in messages)
    if is_plain and [message["role"] for message in messages] == ["user", "assistant"]:
        row = {"instruction": messages[0]["content"], "output": messages[1]["content"]}
        return _built(row, "conversation", kitchen.ruler)
    ids, is_target = render(kitchen.ruler.tokenizer, messages, conversation.tools)  # type: ignore[arg-type]
    row = {"messages": messages, **({"tools": conversation.tools} if conversation.tools else {}), "id": key}
    return Built(row, "conversation", len(ids) - sum(is_target), sum(is_target))


def multidoc_rows(sample: Sample, key: str, kitchen: Kitchen) -> list[Built]:
    """One row, or a pair of contrastive twins: golden document among distractors, alone, or missing.

    The choice depends on the sample's own text and the recipe alone (`key` stands for both), so it is the same in
    every run and order.
    """
    recipe = kitchen.recipe
    chance = random.Random(f"{recipe.seed}:{key}")
    ranked = _hardest_first(sample, usable_distractors(sample, kitchen.barred, kitchen.counts))
    golden = Candidate(sample.positive, plain_text(sample.positive), marked=False)
    kind = _kind(recipe, bool(ranked), chance)
    count = _count(recipe, chance)
    if kind == "golden alone":
        count = 0
    elif kind == "refusal" and chance.random() < _alone_among_answered(recipe):
        count = 0  # as often one document alone as with an answer: their number must not give the refusal away
    elif kind == "refusal":
        count = min(count, max(len(ranked) - 1, 0))
    if kind == "refusal":
        return [_row(sample, key, kind, _choose(ranked, count + 1, recipe.hard_share, chance), None, kitchen)]
    # The hardest one is kept for a twin, in whose row it takes the golden document's place.
    others = _choose(ranked[1:] if kind == "twin" else ranked, count, recipe.hard_share, chance)
    place = chance.randint(0, len(others))
    rows = [_row(sample, key, kind, [*others[:place], golden, *others[place:]], place, kitchen)]
    if kind == "twin":
        rows.append(_row(sample, f"{key}-twin", kind, [*others[:place], ranked[0], *others[place:]], None, kitchen))
    return rows


def triple(sample: Sample, negatives: int, kitchen: Kitchen) -> Row | None:
    """The question, its document and its hardest distractors, to train a retriever on; None without distractors."""
    ranked = _hardest_first(sample, usable_distractors(sample, kitchen.barred, Counter()))
    if not ranked:
        return None
    return {"query": sample.question, "pos": [sample.positive], "neg": [d.text for d in ranked[:negatives]]}


def _hardest_first(sample: Sample, distractors: Sequence[Candidate]) -> list[Candidate]:
    """Those that the data marks as hard, then the others; either by BM25 for the question."""
    scores = bm25(plain_text(sample.question), [distractor.plain for distractor in distractors])
    order = sorted(range(len(distractors)), key=lambda i: (not distractors[i].marked, -scores[i], distractors[i].plain))
    return [distractors[index] for index in order]


def _kind(recipe: Recipe, has_distractors: bool, chance: random.Random) -> Kind:
    drawn = chance.random()
    shares = (recipe.refusal_share, recipe.twin_share, recipe.golden_only_share)
    kinds: tuple[Kind, ...] = ("refusal", "twin", "golden alone")
    for kind, limit in zip(kinds, accumulate(shares), strict=True):
        if drawn < limit:
            return kind if has_distractors else "golden alone"
    return "golden among distractors"


def _count(recipe: Recipe, chance: random.Random) -> int:
    """How many distractors."""
    counts = sorted(recipe.distractors)
    return chance.choices(counts, [recipe.distractors[count] for count in counts])[0]


def _alone_among_answered(recipe: Recipe) -> float:
    """Share of the rows with one document, among the rows with an answer."""
    return recipe.golden_only_share / max(1 - recipe.refusal_share, 1e-9)


def _choose(ranked: Sequence[Candidate], count: int, hard_share: float, chance: random.Random) -> list[Candidate]:
    """`count` of the distractors, fewer if there are no more, in random order: the hardest ones and random others."""
    hard = round(count * hard_share)
    others = list(ranked[hard:])
    chosen = [*ranked[:hard], *chance.sample(others, min(count - hard, len(others)))]
    chance.shuffle(chosen)
    return chosen


def _row(sample: Sample, key: str, kind: Kind, texts: list[Candidate], golden: int | None, kitchen: Kitchen) -> Built:
    """The row of these documents, cut to fit. `golden` is the index of the one that holds the answer, if one does."""
    recipe, ruler = kitchen.recipe, kitchen.ruler
    kitchen.shown += [digest(text.plain) for text in texts]
    documents = [Document(text.text) for text in texts]
    quote = None
    if golden is not None:
        quote = find_quote(sample.answer, sample.positive, recipe.quote_recall) if recipe.quotes else None
        documents[golden].evidence = _evidence(sample.positive, quote, sample.answer)
    built = _compose(sample, key, kind, documents, quote, ruler)
    room = recipe.max_tokens - ruler.example(documents_prompt([], sample.question), built.row["output"])
    cuts: Counter[str] = Counter()
    while built.tokens > recipe.max_tokens and room > -recipe.max_tokens:
        if quote and room < SHORTEST_DOCUMENT + NUMBERING:
            quote = ""
        cuts.clear()
        built = _compose(sample, key, kind, fit(documents, room, ruler, cuts), quote, ruler)
        room -= NUMBERING  # where texts are joined there may be a token more than in each alone
    kitchen.counts += cuts
    return built


def _compose(sample: Sample, key: str, kind: Kind, documents: list[Document], quote: str | None, ruler: Ruler) -> Built:
    """The row of documents that fit. `quote` is what the answer quotes: empty for nothing, None if not asked for."""
    golden = next((number for number, document in enumerate(documents, 1) if document.evidence), None)
    row: Row = {"instruction": documents_prompt([document.text for document in documents], sample.question)}
    quoted = None
    if golden is None:
        row |= {"output": REFUSAL, "answer": REFUSAL}
    else:
        # A document that had to be cut to less than its evidence cannot be quoted.
        found = quote if quote and quote in documents[golden - 1].text else ""
        row |= {"output": cited_answer(sample.answer, golden, found), "answer": sample.answer}
        quoted = None if quote is None else bool(found)
    row |= {"golden": golden, "documents": len(documents), "id": key}
    return _built(row, kind, ruler, quoted)


def _built(row: Row, kind: Kind, ruler: Ruler, quoted: bool | None = None) -> Built:
    answer = ruler.tokens(row["output"]) + 1  # and the token that ends the turn
    return Built(row, kind, ruler.example(row["instruction"], row["output"]) - answer, answer, quoted)


def _evidence(document: str, quote: str | None, answer: str) -> tuple[int, int]:
    """Where in the document the quote, or else the answer, stands; its start if neither does."""
    for text in (quote, answer):
        start = document.find(text) if text else -1
        if start >= 0:
            return start, start + len(text)
    return 0, 0
