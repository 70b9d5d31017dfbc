"""Requests to an endpoint as users send them, each with the times of its tokens."""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from chatglm3.endpoint import Endpoint, EndpointError


@dataclass(frozen=True)
class Prompt:
    """What one request asks."""

    messages: list[dict[str, Any]]
    max_tokens: int


@dataclass
class Outcome:
    """One request. Times are seconds since the load began; those of tokens are of events with text."""

    due: float
    """When it was to be sent: waiting for a generator that is late counts too."""
    sent: float = 0.0
    texts: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece of text and the next: a piece may be of several tokens."""
        return [later - earlier for earlier, later in zip(self.texts, self.texts[1:], strict=False)]

    @property
    def token_s(self) -> float | None:
        """Seconds a token, after the first; None of an answer that has no second."""
        later = self.completion_tokens - 1
        return (self.ended - self.texts[0]) / later if self.texts and later > 0 else None


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Arrival times of `count` users who know nothing of each other, `rate` a second."""
    chance, now = random.Random(seed), 0.0
    times = []
    for _ in range(count):
        now += chance.expovariate(rate)
        times.append(now)
    return times


async def at_times(endpoint: Endpoint, model: str, prompts: Sequence[Prompt], times: Sequence[float]) -> list[Outcome]:
    """An open loop: each request is sent at its time, however many are still being answered."""
    began = time.perf_counter()
    tasks = []
    for prompt, due in zip(prompts, times, strict=True):
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - began)))
        tasks.append(asyncio.create_task(_ask(endpoint, model, prompt, began, due)))
    return list(await asyncio.gather(*tasks))


async def at_once(endpoint: Endpoint, model: str, prompts: Sequence[Prompt], concurrency: int) -> list[Outcome]:
    """A closed loop: so many users, each of whom asks again when he is answered."""
    began, waiting = time.perf_counter(), iter(prompts)
    done: list[Outcome] = []

    async def user(prompts: Iterator[Prompt]) -> None:
        for prompt in prompts:
            done.append(await _ask(endpoint, model, prompt, began, time.perf_counter() - began))

    await asyncio.gather(*(user(waiting) for _ in range(concurrency)))
    return done


async def _ask(endpoint: Endpoint, model: str, prompt: Prompt, began: float, due: float) -> Outcome:
    outcome = Outcome(due, sent=time.perf_counter() - began)
    body = {
        "model": model,
        "messages": prompt.messages,
        "max_tokens": prompt.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with aclosing(endpoint.events("/v1/chat/completions", body)) as events:
            async for event in events:
                if event["choices"] and event["choices"][0]["delta"].get("content"):
                    outcome.texts.append(time.perf_counter() - began)
                if usage := event.get("usage"):
                    outcome.prompt_tokens = usage["prompt_tokens"]
                    outcome.completion_tokens = usage["completion_tokens"]
    except EndpointError as error:
        outcome.error = error.kind
    outcome.ended = time.perf_counter() - began
    return outcome
