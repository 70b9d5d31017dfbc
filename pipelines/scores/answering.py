"""Questions put to an engine, many at once, as evaluate and merge do."""

import asyncio
import time
from collections.abc import Iterable

from chatglm3 import parse_reply
from chatglm3.chat import PromptFormat, question_ids
from chatglm3.engines import Engine, RequestError, Sampling, complete
from chatglm3.tokenizer import ChatGlmTokenizer
from pipelines.scores.questions import Answer


async def ask_all(
    engine: Engine,
    tokenizer: ChatGlmTokenizer,
    instructions: Iterable[str],
    prompt_format: PromptFormat,
    sampling: Sampling,
    at_once: int,
) -> list[Answer]:
    """The answers in order, `at_once` being written at a time; an empty one to a question that does not fit into the
    model's context.
    """
    turns = asyncio.Semaphore(at_once)

    async def answer(instruction: str) -> Answer:
        prompt = question_ids(tokenizer, [{"role": "user", "content": instruction}], prompt_format)
        async with turns:
            started = time.monotonic()
            try:
                completion = await complete(engine, prompt, sampling)
            except RequestError:
                return Answer("", 0, 0.0)
            seconds = time.monotonic() - started
        text = parse_reply(completion.text).content if prompt_format == "chat" else completion.text
        return Answer(text, len(completion.token_ids), seconds)

    return await asyncio.gather(*map(answer, instructions))
