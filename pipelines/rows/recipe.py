"""A sample becomes training rows: which documents, in which order, and what the model is to answer."""

import random
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Literal

from chatglm3.bm25 import bm25, plain_text
from chatglm3.chat import render
from chatglm3.documents import REFUSAL, cited_answer, documents_prompt, seed_prompt
from chatglm3.fitting import NUMBERING
from pipelines.rows.cleaning import Candidate, digest, usable_distractors
from pipelines.rows.lengths import SHORTEST_DOCUMENT, Document, Ruler, fit
from pipelines.rows.quotes import find_answer, find_quote
from pipelines.rows.shards import Conversation, Sample

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
    near_copies: float
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
    """What the sample's row takes at least, with its documents cut as far as they may be: not below the answer."""
    answer = max(sample.answer, REFUSAL, key=ruler.tokens)
    shortest = max(SHORTEST_DOCUMENT, ruler.tokens(sample.answer) if sample.answer in sample.positive else 0)
    return ruler.example(documents_prompt([], sample.question), answer) + shortest + 3 * NUMBERING


def seed_row(sample: Sample, key: str, kitchen: Kitchen) -> Built:
    """The predecessor's row: the positive document alone, character for character unless it is too long."""

    def compose(documents: list[Document]) -> Built:
        row = {"instruction": seed_prompt(documents[0].text, sample.question), "output": sample.answer, "id": key}
        return _built(row, "seed", kitchen.ruler)

    overhead = kitchen.ruler.example(seed_prompt("", sample.question), sample.answer)
    built = _fitted([Document(sample.positive, _evidence(sample))], compose, overhead, "", kitchen)
    assert built, "the first pass lets no row through that cannot be cut to fit"
    return built


def conversation_row(conversation: Conversation, key: str, kitchen: Kitchen) -> Built:
    """A conversation as it is; one question and its answer become an instruction row, which fits both formats."""
    messages = conversation.messages
    is_plain = not conversation.tools and all(set(message) == {"role", "content"} for message in messages)
    if is_plain and [message["role"] for message in messages] == ["user", "assistant"]:
        row = {"instruction": messages[0]["content"], "output": messages[1]["content"], "id": key}
        return _built(row, "conversation", kitchen.ruler)
    ids, is_target = render(kitchen.ruler.tokenizer, messages, conversation.tools)
    row = {"messages": messages, **({"tools": conversation.tools} if conversation.tools else {}), "id": key}
    return Built(row, "conversation", len(ids) - sum(is_target), sum(is_target))


def hardest_first(sample: Sample, kitchen: Kitchen) -> list[Candidate]:
    """The sample's usable distractors: those that the data marks as hard, then the others; either by BM25."""
    distractors = usable_distractors(sample, kitchen.barred, kitchen.recipe.near_copies, kitchen.counts)
    scores = bm25(plain_text(sample.question), [distractor.plain for distractor in distractors])
    order = sorted(range(len(distractors)), key=lambda i: (not distractors[i].marked, -scores[i], distractors[i].plain))
    return [distractors[index] for index in order]


def multidoc_rows(sample: Sample, ranked: Sequence[Candidate], key: str, kitchen: Kitchen) -> list[Built]:
    """One row, or a pair of contrastive twins: golden document among distractors, alone, or missing.

    `ranked` are the distractors as `hardest_first` gives them.
    The choice depends on the sample's own text and the recipe alone (`key` stands for both), so it is the same in
    every run and order.
    """
    recipe = kitchen.recipe
    chance = random.Random(f"{recipe.seed}:{key}")
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


def triple(sample: Sample, hardest: Sequence[Candidate]) -> Row | None:
    """The question, its document and hard distractors, to train a retriever on; None without distractors."""
    if not hardest:
        return None
    return {"query": sample.question, "pos": [sample.positive], "neg": [candidate.text for candidate in hardest]}


def _kind(recipe: Recipe, has_distractors: bool, chance: random.Random) -> Kind:
    drawn = chance.random()
    shares = (recipe.refusal_share, recipe.twin_share, recipe.golden_only_share)
    kinds: tuple[Kind, ...] = ("refusal", "twin", "golden alone")
    for kind, limit in zip(kinds, accumulate(shares), strict=True):
        if drawn < limit:
            return kind if has_distractors else "golden alone"
    return "golden among distractors" if has_distractors else "golden alone"


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
    kitchen.shown += [digest(text.plain) for text in texts]
    documents = [Document(text.text) for text in texts]
    empty = documents_prompt([], sample.question)

    def row(output: str, quote: str = "") -> Built | None:
        compose = partial(_compose, sample, key, kind, quote, kitchen)
        return _fitted(documents, compose, kitchen.ruler.example(empty, output), quote, kitchen)

    built = None
    if golden is None:
        built = row(REFUSAL)
    elif kitchen.recipe.quotes:
        span = find_quote(sample.question, sample.answer, sample.positive, kitchen.recipe.quote_recall)
        if span:
            documents[golden].evidence = span
            quote = sample.positive[slice(*span)]
            built = row(cited_answer(sample.answer, len(texts), quote), quote)
    if golden is not None and not built:
        documents[golden].evidence = _evidence(sample)
        built = row(cited_answer(sample.answer, len(texts)))
    assert built, "the first pass lets no row through that cannot be cut to fit"
    return built


def _evidence(sample: Sample) -> tuple[int, int]:
    """Where the answer stands in the positive document, or its beginning."""
    start = len(sample.positive) - len(sample.positive.lstrip())
    return find_answer(sample.question, sample.answer, sample.positive) or (start, start)


def _fitted(
    documents: list[Document],
    compose: Callable[[list[Document]], Built],
    overhead: int,
    needed: str,
    kitchen: Kitchen,
) -> Built | None:
    """The row that `compose` makes of the documents, which are cut if it would be too long.

    `overhead` is what it takes without them, in tokens. None if no document keeps the words that are `needed`.
    """
    limit, cuts, kept = kitchen.recipe.max_tokens, Counter[str](), documents
    # Where texts are joined there may be a token more than in each alone: then a little less room is tried.
    for room in range(limit - overhead, 0, -NUMBERING):
        if not any(needed in document.text for document in kept):
            return None
        built = compose(kept)
        if built.tokens <= limit:
            kitchen.counts += cuts
            return built
        cuts.clear()
        kept = fit(documents, room, kitchen.ruler, cuts)
    return None


def _compose(sample: Sample, key: str, kind: Kind, quote: str, kitchen: Kitchen, documents: list[Document]) -> Built:
    """The row of documents that fit. `quote` is what the answer quotes; empty for nothing."""
    golden = next((number for number, document in enumerate(documents, 1) if document.evidence), None)
    row: Row = {"instruction": documents_prompt([document.text for document in documents], sample.question)}
    quoted = None
    if golden is None:
        row |= {"output": REFUSAL, "answer": REFUSAL}
    else:
        row |= {"output": cited_answer(sample.answer, golden, quote), "answer": sample.answer}
        quoted = bool(quote) if kitchen.recipe.quotes else None
    row |= {"golden": golden, "documents": len(documents), "id": key}
    return _built(row, kind, kitchen.ruler, quoted)


def _built(row: Row, kind: Kind, ruler: Ruler, quoted: bool | None = None) -> Built:
    answer = ruler.tokens(row["output"]) + 1  # and the token that ends the turn
    return Built(row, kind, ruler.example(row["instruction"], row["output"]) - answer, answer, quoted)
