"""What one request takes of its key's limits: asked for before anything is read, and settled when it has ended."""

import asyncio
from collections import Counter

from serve_app.errors import ApiError
from serve_app.keys import Key
from serve_app.ledger import Ledger, Standing


class Allowance:
    """One request's part of what its key may use. Refusals are ApiErrors."""

    def __init__(self, key: Key, ledger: Ledger, under_way: Counter[str]) -> None:
        """`under_way` counts the answers of each key that this process has taken on."""
        self.headers: dict[str, str] = {}
        """How the key stands to its limits, for the answer."""
        self._name, self._limits = key.name, key.limits
        self._ledger = ledger
        self._under_way = under_way
        self._answers = 0
        self._reserved = 0
        self._reserving: asyncio.Task[Standing] | None = None
        self._standing: Standing | None = None

    async def admit(self) -> None:
        """Count the request."""
        if self._limits.requests_per_minute or self._limits.tokens_per_minute:
            self._hold_to(await self._ledger.admit(self._name, self._limits))

    async def take(self, answers: int, tokens: int) -> None:
        """Take the answers that it wants written, and the tokens that it will read and may write."""
        self._take_answers(answers)
        if self._limits.tokens_per_minute:
            # Shielded: at a deadline between the ledger's count and its answer, `settle` must know of it.
            self._reserving = asyncio.create_task(self._reserve(tokens))
            self._hold_to(await asyncio.shield(self._reserving))

    async def settle(self, used: int) -> None:
        """Give back its answers, and what it reserved beyond the tokens that it used."""
        self._under_way[self._name] -= self._answers
        if self._reserving:
            await asyncio.wait((self._reserving,))
        if self._limits.tokens_per_minute and used != self._reserved:
            await self._ledger.settle(self._name, self._limits, used - self._reserved, self._standing)

    def _take_answers(self, answers: int) -> None:
        limit = self._limits.answers_at_once
        if limit and answers > limit:
            raise ApiError(
                400,
                f"these are {answers} answers, and this key may have {limit} written at once; ask for fewer at a time",
                code="answers_at_once_exceeded",
            )
        if limit and self._under_way[self._name] + answers > limit:
            raise ApiError(
                429,
                f"this key may have {limit} answers written at once (each of n counts); try again",
                code="answers_at_once_exceeded",
                headers={"Retry-After": "1"},
            )
        self._under_way[self._name] += answers
        self._answers += answers

    async def _reserve(self, tokens: int) -> Standing:
        standing = await self._ledger.reserve(self._name, self._limits, tokens)
        self._reserved += 0 if standing.retry_after_s else tokens
        self._standing = standing
        return standing

    def _hold_to(self, standing: Standing) -> None:
        self.headers = standing.headers
        if standing.retry_after_s:
            raise ApiError(
                429,
                f"the key's {standing.exhausted} per minute are used up; try again in "
                f"{standing.headers['retry-after']} s",
                code=f"{standing.exhausted}_per_minute_exceeded",
                headers=standing.headers,
            )
