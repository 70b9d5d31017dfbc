"""A progress bar for long work, on a terminal; nothing in a log or a pipe."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

Item = TypeVar("Item")


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """Iterate over `items` behind a bar that says `what` on stderr and goes away at the end."""
    console = Console(stderr=True)
    return rich_track(items, what, total, console=console, transient=True, disable=not sys.stderr.isatty())
