"""How well a model reads: exact match of greedy answers to questions it has never seen."""

from collections import defaultdict
from itertools import islice
from random import Random
from typing import Any

import torch

from chatglm3.chat import question_ids
from chatglm3.documents import documents_prompt, parse_answer
from chatglm3.tiny.knowledge import rows
from chatglm3.tiny.lessons import Lesson, assistant, lessons, user
from chatglm3.tiny.worlds import DEMO
from chatglm3.tokenizer import ChatGlmTokenizer

MAX_NEW_TOKENS = 32
EXAM_BATCH = 32


def held_out_lessons(count: int) -> list[Lesson]:
    """Lessons that no course has, whatever its seed."""
    return list(islice(lessons("held out"), count))


def demo_lessons(count: int) -> list[Lesson]:
    """The demo world's questions with all five documents: foreign to a model that was not tuned for them."""
    rng = Random("demo")
    asked = []
    for row in rows(DEMO, count, seed=1_000_003):
        documents = [document["text"] for document in row["positive_doc"] + row["negative_doc"]]
        rng.shuffle(documents)
        pair = row["QA"][0]
        messages = [user(documents_prompt(documents, pair["question"])), assistant(pair["answer"])]
        asked.append(Lesson("demo", messages))
    return asked


def marks(model: Any, tokenizer: ChatGlmTokenizer, count: int) -> dict[str, float]:
    """Exact match on `count` held-out lessons, by topic and over all, and on a quarter as many demo questions."""
    scores = exact_match(model, tokenizer, held_out_lessons(count))
    return scores | {"demo": exact_match(model, tokenizer, demo_lessons(count // 4))["demo"]}


def exact_match(model: Any, tokenizer: ChatGlmTokenizer, exam: list[Lesson]) -> dict[str, float]:
    """Share of lessons, by topic and over "all" of them, whose last message the model writes itself, to the letter.

    The demo's answers may cite or not.
    """
    hits: dict[str, list[bool]] = defaultdict(list)
    for lesson, reply in zip(exam, answer(model, tokenizer, exam), strict=True):
        written = parse_answer(reply).text if lesson.topic == "demo" else reply
        hit = written == lesson.messages[-1]["content"]
        for topic in (lesson.topic, "all", *["bare"][: lesson.bare]):
            hits[topic].append(hit)
    return {topic: sum(found) / len(found) for topic, found in sorted(hits.items())}


@torch.no_grad()
def answer(model: Any, tokenizer: ChatGlmTokenizer, exam: list[Lesson]) -> list[str]:
    """The model's greedy reply to each lesson's messages but the last, in the same order."""
    model.eval()
    prompts = [question_ids(tokenizer, lesson.messages[:-1], "bare" if lesson.bare else "chat") for lesson in exam]
    replies = [""] * len(exam)
    order = sorted(range(len(exam)), key=lambda place: len(prompts[place]))
    for start in range(0, len(order), EXAM_BATCH):
        places = order[start : start + EXAM_BATCH]
        width = max(len(prompts[place]) for place in places)
        ids = torch.tensor([[tokenizer.pad_id] * (width - len(prompts[p])) + prompts[p] for p in places])
        ids = ids.to(model.device)
        new = model.generate(
            ids,
            attention_mask=(ids != tokenizer.pad_id).long(),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(tokenizer.stop_ids),
            pad_token_id=tokenizer.pad_id,
        )
        for place, row in zip(places, new[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in tokenizer.stop_ids), len(row))
            replies[place] = tokenizer.decode(row[:end]).strip()
    model.train()
    return replies
