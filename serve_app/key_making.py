"""A new API key on the command line."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cluster.config import Config
from serve_app.keys import Limits, add_key


class KeysConfig(Config):
    """Make an API key for somebody: prints it once, and appends its hash to the file.

    A server that was started with api_keys=FILE takes it within a second. To end a key, remove its line.
    """

    action: Annotated[Literal["add"], "positional"]
    """add is all there is."""
    name: Annotated[str, "positional"]
    """Who the key is for; it stands in the audit log."""
    file: str = "keys"
    """File of keys; made if there is none."""
    requests_per_minute: int = Field(0, ge=0)
    """Requests the key may make; 0 is what the server gives to keys without a limit of their own."""
    tokens_per_minute: int = Field(0, ge=0)
    """Tokens it may use, read and written together; 0 as above."""
    answers_at_once: int = Field(0, ge=0)
    """Answers it may have written at a time in one replica; 0 as above."""


def make_key(config: KeysConfig) -> None:
    """Print a new key to stdout."""
    limits = Limits(config.requests_per_minute, config.tokens_per_minute, config.answers_at_once)
    key = add_key(Path(config.file), config.name, limits)
    print(f"{config.name}'s key, which cannot be shown again; its hash is in {config.file}:", file=sys.stderr)
    print(key)
