"""What each API key has used of its limits: buckets that fill up again by the minute."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from serve_app.keys import Limits


@dataclass(frozen=True)
class Standing:
    """How a key stands to its limits after it asked for admission."""

    retry_after_s: float
    """0 if it was admitted; otherwise when to ask again."""
    exhausted: str = ""
    """The limit that it has used up: requests or tokens."""
    left: tuple[tuple[str, int, int, float], ...] = ()
    """For each limit: requests or tokens, the limit, what is left of it, and seconds until all of it is there again."""
    is_alone: bool = False
    """Whether this process counted, for want of the ledger of all replicas."""

    @property
    def headers(self) -> dict[str, str]:
        """The same as OpenAI's headers."""
        headers = {"retry-after": str(math.ceil(self.retry_after_s))} if self.retry_after_s else {}
        for kind, limit, remaining, reset_s in self.left:
            headers[f"x-ratelimit-limit-{kind}"] = str(limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(remaining)
            headers[f"x-ratelimit-reset-{kind}"] = f"{reset_s:.2f}s"
        return headers


class Ledger(Protocol):
    """Who counts: this process alone, or one for all replicas."""

    async def admit(self, name: str, limits: Limits) -> Standing:
        """Count one request of the key called `name`, if it has a request and any token left."""

    async def reserve(self, name: str, limits: Limits, tokens: int) -> Standing:
        """Take as many tokens as an admitted request may need, if they are there; all of a minute's for one that needs
        more than that."""

    async def settle(self, name: str, limits: Limits, tokens: int, reserved: Standing | None = None) -> None:
        """Count what a request used beyond what it reserved; below 0 it gets that back, from who answered `reserve`
        with `reserved`."""


class LocalLedger:
    """Counts in this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    async def admit(self, name: str, limits: Limits) -> Standing:
        """See `Ledger.admit`."""
        buckets = self._of(name, limits)
        for kind, bucket in buckets.items():
            if wait_s := bucket.seconds_until(1):
                return Standing(wait_s, kind, _left(buckets))
        if "requests" in buckets:
            buckets["requests"].level -= 1
        return Standing(0.0, left=_left(buckets))

    async def reserve(self, name: str, limits: Limits, tokens: int) -> Standing:
        """See `Ledger.reserve`."""
        buckets = self._of(name, limits)
        if bucket := buckets.get("tokens"):
            if wait_s := bucket.seconds_until(min(tokens, bucket.limit)):
                return Standing(wait_s, "tokens", _left(buckets))
            bucket.level -= tokens
        return Standing(0.0, left=_left(buckets))

    async def settle(self, name: str, limits: Limits, tokens: int, reserved: Standing | None = None) -> None:
        """See `Ledger.settle`."""
        if bucket := self._of(name, limits).get("tokens"):
            bucket.level = min(bucket.limit, bucket.level - tokens)

    def _of(self, name: str, limits: Limits) -> "dict[str, _Bucket]":
        now = self._clock()
        numbers = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
        buckets = {}
        for kind, limit in numbers.items():
            if limit:
                bucket = self._buckets.setdefault((name, kind), _Bucket(limit, limit, now))
                bucket.fill(limit, now)
                buckets[kind] = bucket
        return buckets


@dataclass
class _Bucket:
    limit: int
    """Of a minute; also the most it holds."""
    level: float
    filled: float

    def fill(self, limit: int, now: float) -> None:
        self.limit = limit
        self.level = min(limit, self.level + (now - self.filled) * limit / 60)
        self.filled = now

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.level) * 60 / self.limit)


def _left(buckets: dict[str, _Bucket]) -> tuple[tuple[str, int, int, float], ...]:
    return tuple(
        (kind, bucket.limit, max(0, int(bucket.level)), bucket.seconds_until(bucket.limit))
        for kind, bucket in buckets.items()
    )
