"""Engines that stand in for a model where what it says does not matter, or must be what a tuned one would say."""

import asyncio
from collections.abc import AsyncGenerator

from chatglm3.engines import AdapterFolders, Delta, EngineError, Load, Sampling


class Clockwork:
    """An engine that answers every prompt with one text, a character and a token a step.

    The text's 💥 is where the engine dies.
    """

    healthy = True
    max_batch = 32

    def __init__(self, text: str, step_s: float = 0.0, context_length: int = 8192) -> None:
        self.text = text
        self.step_s = step_s
        self.context_length = context_length
        self.adapters = AdapterFolders()
        self.asked: list[list[int]] = []
        self.running = 0

    @property
    def load(self) -> Load:
        return Load(self.running, waiting=2, waiting_tokens=30, cache_use=0.25, prefix_hits=4, prefix_queries=10)

    async def prepare(self, sampling: Sampling) -> None:
        pass

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        self.asked.append(prompt_ids)
        self.running += 1
        try:
            for character in f"\n{self.text}":  # after ChatGLM3's metadata line
                await asyncio.sleep(self.step_s)
                if character == "💥":
                    raise EngineError("the engine has died")
                yield Delta(character, (5,))
            await asyncio.sleep(self.step_s)
            yield Delta("", (2,), "stop")
        finally:
            self.running -= 1

    def close(self) -> None:
        pass
