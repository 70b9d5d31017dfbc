"""What is known of the request that is being answered: for logs, metrics, traces and quotas. Never its contents."""

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from serve_app.allowance import Allowance
from serve_app.errors import ApiError


@dataclass
class RequestRecord:
    """One request; whoever learns something of it writes it here."""

    id: str
    key: str = ""
    """Name of the API key."""
    allowance: Allowance | None = None
    """What it takes of the key's limits."""
    places: asyncio.Semaphore | None = None
    """Those that the request may take in the engine."""
    model: str = ""
    """The model or adapter that answers."""
    prompt: Sequence[int] | None = None
    """The last one that was counted: all choices of a prompt are asked with the same list."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    """From handing the prompt to the engine to the first token."""
    finish_reason: str = ""
    rejected: str = ""
    """Why it was turned away, in a word."""


async def take_on(answers: int, tokens: int) -> None:
    """Take what a request will read and may write from what its key may use. ApiError if that is too little."""
    if (record := current.get()) and record.allowance:
        try:
            await record.allowance.take(answers, tokens)
        except ApiError as refusal:
            record.rejected = refusal.code
            raise


current: ContextVar[RequestRecord | None] = ContextVar("current", default=None)
