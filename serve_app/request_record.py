"""What is known of the request that is being answered: for logs, metrics, traces and quotas. Never its contents."""

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.types import Scope


@dataclass
class RequestRecord:
    """One request; whoever learns something of it writes it here."""

    id: str
    key: str = ""
    """Name of the API key."""
    answers_at_once: int = 0
    """How many answers the key may have written at a time; 0 is no limit."""
    places: asyncio.Semaphore | None = None
    """Those that the request may take in the engine."""
    model: str = ""
    """The model or adapter that answers."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    """From handing the prompt to the engine to the first token."""
    finish_reason: str = ""
    rejected: str = ""
    """Why it was turned away, in a word."""


def path_of(scope: Scope) -> str:
    """The path as routes have it: without the prefix that the application is served under."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


current: ContextVar[RequestRecord | None] = ContextVar("current", default=None)
