"""API keys: a file of names, hashes and limits, read again when it changes. The keys themselves are never stored.

A line a key: `NAME SHA256 [requests_per_minute=N] [tokens_per_minute=N] [answers_at_once=N]`; a line that begins with #
is a comment.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

from cluster.errors import StageError

log = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0
_NAME = re.compile(r"[\w.@-]{1,64}")


@dataclass(frozen=True)
class Limits:
    """What a key may use; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    """Of prompts and answers together."""
    answers_at_once: int = 0
    """Written at the same time in one replica; each of a request's choices is one."""


_LIMIT = re.compile(rf"({'|'.join(field.name for field in fields(Limits))})=(\d{{1,12}})")


@dataclass(frozen=True)
class Key:
    """A key that is let in."""

    name: str
    digest: str
    """sha256 of the key, in hex. Keys are 256 random bits: there is nothing to guess, so no slow hash is needed."""
    limits: Limits


class KeyFile:
    """The keys of a file, as it is now. A file that is damaged or gone leaves the keys that were there before."""

    def __init__(self, path: str | Path, limits: Limits) -> None:
        """`limits` are those of keys that have none of their own. StageError if the file cannot be used."""
        self._path = Path(path)
        self._limits = limits
        self._state = self._stat()
        self._keys = read_keys(self._path, limits)
        self._checked = time.monotonic()

    def find(self, presented: str) -> Key | None:
        """The key that was presented, if it is one; takes as long for one that nearly is."""
        self._refresh()
        digest = hashlib.sha256(presented.encode(errors="surrogateescape")).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < CHECK_EVERY_S:
            return
        self._checked = now
        if (state := self._stat()) == self._state:
            return
        self._state = state
        try:
            self._keys = read_keys(self._path, self._limits)
            log.info("%s was read again: %d keys", self._path, len(self._keys))
        except StageError as error:
            log.error("%s; the keys of before stay valid", error)

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns


def read_keys(path: Path, limits: Limits) -> list[Key]:
    """The keys in a file. StageError that names the line where it is damaged."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise StageError(
            f"api_keys {path} cannot be read ({reason}); python -m serve_app keys add NAME --file {path} makes one"
        ) from None
    keys = [
        _key(line, f"{path} line {number}", limits)
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    names = [key.name for key in keys]
    if twice := {name for name in names if names.count(name) > 1}:
        raise StageError(f"{path} names {min(twice)} twice; remove one of its lines")
    return keys


def add_key(path: Path, name: str, limits: Limits) -> str:
    """A new key for `name`, whose hash is appended to the file; the key itself is known only to the caller."""
    if not _NAME.fullmatch(name):
        raise StageError(f"{name!r} cannot name a key: use up to 64 letters, digits and . _ @ -")
    if path.exists() and any(key.name == name for key in read_keys(path, Limits())):
        raise StageError(f"{path} has a key for {name} already; remove its line first, and the old key ends")
    key = f"glm3-{secrets.token_urlsafe(32)}"
    given = [f"{limit}={number}" for limit, number in vars(limits).items() if number]
    line = " ".join([name, hashlib.sha256(key.encode()).hexdigest(), *given])
    try:
        with os.fdopen(os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600), "a+") as file:
            file.seek(0)
            text = file.read()
            file.write(("" if text.endswith("\n") or not text else "\n") + line + "\n")
    except OSError as error:
        raise StageError(f"--file {path} cannot be written ({error.strerror})") from None
    return key


def _key(line: str, where: str, limits: Limits) -> Key:
    name, digest, *rest = [*line.split(), ""] if len(line.split()) < 2 else line.split()
    if not _NAME.fullmatch(name) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise StageError(f"{where} is not `NAME SHA256`; python -m serve_app keys add NAME writes such lines")
    own = {}
    for word in rest:
        if not (limit := _LIMIT.fullmatch(word)):
            raise StageError(f"{where}: {word!r} is no limit; use one of {'=N, '.join(vars(limits))}=N")
        own[limit[1]] = int(limit[2])
    return Key(name, digest, replace(limits, **own))
